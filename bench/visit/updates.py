"""The updates of a step at real models' sizes, each row recorded as it is measured.

python -m bench.visit.updates --records FILE --budget-s S [--device cpu]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.updates import VARIANTS, Shape, UpdateRow, header, measure, setting_of
from bench.visit.records import append

STAGE = "updates"
POLICIES, DISCRIMINATOR, SHAPE = ("qwen2.5-1.5b", "qwen2.5-3b"), "qwen2.5-0.5b", Shape()
TOY = Shape(prompts=2, group=2, prompt_tokens=9, completion_tokens=5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.updates")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    toy = options.device == "cpu"
    setting = setting_of(
        shape=TOY if toy else SHAPE,
        discriminator="tiny" if toy else DISCRIMINATOR,
        variants=VARIANTS,
        repeats=1 if toy else 3,
        budget=options.budget_s,
        device=torch.device(options.device),
    )
    append(options.records, STAGE, "update-header", **header(setting))
    for entry in measure(("tiny",) if toy else POLICIES, setting):
        if isinstance(entry, UpdateRow):
            append(options.records, STAGE, "update", row=asdict(entry))
            print(f"{entry.policy} {entry.variant}: {entry.seconds}, {entry.peak_mib} MiB", flush=True)
        else:
            append(options.records, STAGE, "left-out", reason=entry)
            print(entry, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
