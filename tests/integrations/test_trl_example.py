"""docs/examples/trl_grpo.py as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed; `make peers` installs it.")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "trl_grpo.py"


def report(*words: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps=4", *words],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_the_recipe_runs_and_trains_as_trl_alone_does():
    patched, published = report(), report("--unpatched")
    assert patched["linear_logprob_calls"] == 6 and published["linear_logprob_calls"] == 0
    assert patched["loss"] == pytest.approx(published["loss"], abs=2e-5)
    assert len(patched["loss"]) == 4 and any(patched["loss"])
    assert patched["update_s"] > 0 and patched["peak_mib"] >= patched["peak_mib_before_training"]
