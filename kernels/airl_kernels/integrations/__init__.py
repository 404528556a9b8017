"""Adapters that put the operations into other people's trainers, one module per library.

Nothing here is imported by `airl_kernels` itself, and a library is imported when its adapter is used, so `airl_kernels`
goes on needing torch and triton only.
"""
