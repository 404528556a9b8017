"""The first minute on a GPU: one case of every operation, packed attention, and AIRL steps of a small model.

    python -m bench.visit.smoke --records FILE [--device cpu] [--jobs 6]

What breaks first, breaks here: each case's traceback is kept and the others run. The operations are those of
`bench/cases.py`, forward and backward, in float32 and bfloat16, against float64 (`bench/verify.py`).
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.cases import CASES, Case
from bench.inputs import make_inputs
from bench.peers import airl
from bench.shapes import parse_shape
from bench.verify import Yardstick
from bench.visit.shards import device_is_alive, pending, run_cases, run_shards

STAGE = "smoke"
# A real vocabulary and width, so that the kernels are those of the benchmark; few tokens.
SHAPES = {
    "cuda": ("linear:64x896x151936", "head:4096x896x1000", "sequences:32x300", "logits:64x151936"),
    "cpu": ("linear:16x32x300", "head:64x32x50", "sequences:4x30", "logits:16x300"),
}
HEADS = {"cuda": ((14, 2, 64), (12, 2, 128)), "cpu": ((6, 2, 16), (4, 2, 32))}  # queries, keys, width


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.smoke")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--shard", type=int)
    options = parser.parse_args(arguments)
    if options.shard is None:
        flags = ["--records", str(options.records), "--device", options.device, "--jobs", str(options.jobs)]
        command = [sys.executable, "-m", "bench.visit.smoke", *flags, "--shard"]
        return run_shards(lambda shard: [*command, str(shard)], options.jobs, options.records, STAGE)
    todo = cases(options.device)
    names = pending(tuple(todo), options.shard, options.jobs, options.records, STAGE)
    return run_cases(names, lambda name: todo[name](), options.records, STAGE, options.shard, device_is_alive)


def cases(device: str) -> dict[str, Callable[[], None]]:
    """By name; the slowest to start first, so that the processes end together."""
    steps = {f"AIRL step {dtype}": partial(airl_step_case, dtype, device) for dtype in _types(device)}
    attention = {
        f"attention {heads}x{width}, {kv} key heads": partial(attention_case, heads, kv, width, device)
        for heads, kv, width in HEADS[device]
    }
    return steps | attention | {
        f"{case.op} {case.mode}, {shape} {dtype}": partial(operation_case, case, shape, dtype, device)
        for dtype in ("bfloat16", "float32")
        for case in CASES
        for shape in SHAPES[device]
        if case.runs_at(parse_shape(shape)) and (case.family != "sequences" or dtype == "float32")
    }  # fmt: skip


def _types(device: str) -> tuple[str, ...]:
    return ("bfloat16", "float32") if device == "cuda" else ("float32",)


def operation_case(case: Case, shape: str, dtype: str, device: str) -> None:
    place, kind, parsed = torch.device(device), getattr(torch, dtype), parse_shape(shape)
    yardstick = Yardstick(case, parsed, kind, place)
    run = airl.prepare(case, parsed)
    check = yardstick.check(run, make_inputs(case, parsed, kind, place), ours=True)
    assert check.passed, f"{check.what} is off by {check.error:.3g} of its size, allowed are {check.budget:.3g}"


def attention_case(heads: int, kv_heads: int, width: int, device: str) -> None:
    """Packed attention with shared prompts against the dense masked product in float64, forward and backward."""
    from airl_fast.models.attention import SharedPrefixAttention, attend_dense, dense_mask
    from airl_fast.models.flash import choose_kernel, pieces
    from airl_fast.types import Segments

    place, dtype = torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32
    segments = Segments(prompts=(3, 90, 1), completions=(30, 1, 170, 5, 2, 11, 29, 299, 3), counts=(3, 1, 5))
    generator = torch.Generator().manual_seed(heads + width)
    shapes = [(segments.num_rows, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(place, dtype) for shape in shapes)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    right = attend_dense(*exact, dense_mask(segments, place), width**-0.5)
    expected = (right, *torch.autograd.grad(right, exact, grad.double()))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    kernel = choose_kernel("auto", place, dtype)
    ours = SharedPrefixAttention.apply(*inputs, width**-0.5, pieces(segments, place, kernel), kernel)
    found = (ours, *torch.autograd.grad(ours, inputs, grad))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
    for name, mine, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = ((mine.double() - theirs).norm() / theirs.norm()).item()
        assert error <= tolerance, f"{name} of {kernel.name} is off by {error:.3g} of its size, allowed {tolerance}"


def airl_step_case(dtype: str, device: str) -> None:
    """Two whole steps of the trainer, built-in sampler included; everything that they log is finite."""
    from airl_fast.batches import Replay
    from airl_fast.metrics import Metrics
    from airl_fast.train import airl_step
    from bench.step_setup import Scenario, lab_of, save_model

    scenario, place = Scenario(prompts=4, group=4, prompt_tokens=48, completion_tokens=16), torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        save_model(scenario, Path(folder))
        lab, replay = lab_of(scenario, Path(folder), place, dtype=dtype), Replay(0)
        with Metrics(Path(folder) / "m.jsonl", total_steps=2, device=place) as meter:
            for step in (1, 2):
                result = airl_step(lab, step, meter, replay)
                values = meter.log(step, tokens=result.tokens, **result.records)
                values.pop("policy/kl_to_start", None)  # NaN where there is no reference model, as here
                wrong = {k: v for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
                assert not wrong, f"step {step} logged {wrong}"
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
