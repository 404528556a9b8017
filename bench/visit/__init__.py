"""The stages of `make gpu-check`, one a file: `plan.py` lists them, `bench/gpu_check.py` runs them."""
