"""A small run that several test files look at, and the overrides that make any preset small."""

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from airl_fast.cli import main

# The published files: $AIRL_DATA, else ../shared/data beside the repository.
DATA = Path(os.environ.get("AIRL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")

# One or two operations instead of four or five: short traces, and a start policy that is sometimes right.
EASY = (
    "device=cpu", "threads=1", "data.options={min_ops: 1, max_ops: 2, train_size: 40, dev_size: 16, test_size: 16}",
    "data.num_experts=40", "data.num_dev=8", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=40", "discriminator.warmup_steps=4", "discriminator.warmup_prompts=8",
    "discriminator.warmup_batch=8", "evaluate.prompts=8", "evaluate.samples=5", "evaluate.every=0",
)  # fmt: skip
SMALL = (
    *EASY, "steps=4", "checkpoint_every=2", "evaluate.every=2", "evaluate.baselines=[sft,grpo]",
    "warm_start={updates: 80, batch_size: 32, examples: 2000}",
)  # fmt: skip


def train(*words: object, config: object = "tiny", code: int = 0) -> None:
    """`airl-fast train CONFIG WORDS…` in this process, which must end with this exit code."""
    assert main(["train", str(config), *map(str, words)]) == code


@functools.cache
def small_run() -> Path:
    """The directory of one short run of `tiny` with its baselines, made once a session. Read it only.

    stdout.txt beside it holds what the command printed.
    """
    root = tempfile.mkdtemp(prefix="airl-fast-test-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with (Path(root) / "stdout.txt").open("w") as out, contextlib.redirect_stdout(out):
        train(*SMALL, f"output_dir={root}", "--run-name", "small")
    return Path(root) / "small"


def weights(directory: Path) -> dict:
    """Every tensor of the safetensors files in a model directory."""
    return {
        f"{file.name}/{k}": t for file in sorted(directory.glob("*.safetensors")) for k, t in load_file(file).items()
    }


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
