"""Measurements of airl_kernels and of its peers. Start with `python -m bench.ops --help`; nothing imports this."""
