"""Whole AIRL steps of a model of real size with the built-in sampler, each recorded as it ends.

    python -m bench.visit.steps --records FILE [--device cpu]

The vocabulary is the embedded task's (`bench/step_setup.py`); `bench.visit.updates` has the published one.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.step_setup import Scenario, natural_dtype, save_model
from bench.step_variants import WARM, ours
from bench.visit.records import append

STAGE = "steps"
REAL = Scenario(prompts=8, group=16, prompt_tokens=128, completion_tokens=96, size="qwen2.5-0.5b")
TOY = Scenario(prompts=2, group=2, prompt_tokens=48, completion_tokens=6)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.steps")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device, scenario = torch.device(options.device), TOY if options.device == "cpu" else REAL

    def note(step: int, seconds: float, phases: dict[str, float]) -> None:
        rates = {name: scenario.tokens / spent for name, spent in phases.items() if spent > 0}
        append(
            options.records, STAGE, "step", step=step, warm=step <= WARM, seconds=seconds, phase_seconds=phases,
            tokens_per_s=scenario.tokens / seconds, phase_tokens_per_s=rates, scenario=asdict(scenario),
            dtype=natural_dtype(device),
        )  # fmt: skip
        print(f"step {step}: {seconds:.3f} s, {phases}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        save_model(scenario, Path(folder))
        found = ours(scenario, Path(folder), device, 1 if device.type == "cpu" else 3, plain=False, on_step=note)
    append(
        options.records, STAGE, "step-end", backend=found.backend, peak_mib=found.peak_mib, start_mib=found.start_mib
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
