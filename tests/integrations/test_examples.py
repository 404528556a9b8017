"""The plain PyTorch examples run, and do what they say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_ppo_learns(seed, capsys):
    """From chance, where about half of the tokens are above the one before, to clearly more."""
    rewards = load("plain_ppo").train(steps=30, seed=seed)
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert first < 0.6 < 0.7 < last
    assert "step 30  reward" in capsys.readouterr().out


def test_the_training_loop_has_about_forty_lines():
    source = (EXAMPLES / "plain_ppo.py").read_text(encoding="utf-8").split("def train", 1)[1]
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 40


def test_cuda_graph(capsys):
    """main() asserts loss and gradient of two batches against float64."""
    load("cuda_graph").main()
    shown = capsys.readouterr().out
    assert "batch 2: loss" in shown and "batch 3: loss" in shown


def test_torch_compile(capsys):
    assert load("torch_compile").main() < 1e-4
    assert "compiled" in capsys.readouterr().out
