"""Every preset is described, resolves and dry-runs."""

import importlib.util
import re
from pathlib import Path

import pytest

from airl_fast.cli import main
from airl_fast.commands.settings import PRESETS
from airl_fast.config import Config
from airl_fast.overrides import find_preset, load_config
from tests.airl_fast.run_cases import DATA

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
# Presets of published data: where it lies under the data folder, and the file that must be there.
NEEDS = {"gsm8k-tiny": ("gsm8k", "train.jsonl"), "gsm8k-reward": ("gsm8k", "train.jsonl")}


def load(name: str, *words: str) -> Config:
    source, origin = find_preset(name, PRESETS)
    return load_config(Config, source, words, origin=origin)


def test_the_presets_that_must_exist_do() -> None:
    assert set(NAMES) >= {"tiny", "tiny-linear", "tiny-noisy", "tiny-sft", "tiny-grpo", "gsm8k-tiny"}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_in_one_line_what_it_is(name: str, capsys: pytest.CaptureFixture) -> None:
    first = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    description = first.removeprefix("# ")
    assert first != description and 20 <= len(description) <= 100 and description.endswith(".")
    assert main(["presets"]) == 0
    assert re.search(rf"^{re.escape(name)} +{re.escape(description)}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_resolves_to_a_valid_configuration(name: str) -> None:
    config = load(name)
    again = load_config(Config, config.model_dump(mode="json"), [], origin=name)
    assert again == config
    assert load(name, "seed=2").seed == 2


def test_variants_change_what_they_are_named_after() -> None:
    tiny = load("tiny")
    assert (tiny.algorithm, tiny.discriminator.head, tiny.data.task) == ("airl", "action", "arithmetic")
    assert load("tiny-sft").algorithm == "sft" and load("tiny-grpo").algorithm == "grpo"
    linear = load("tiny-linear")
    assert linear.discriminator.head == "linear" and linear.policy.kl_coef > 0
    assert load("tiny-noisy").data.options["warmstart_mode"] == "noisy"
    for name in ("tiny-linear", "tiny-noisy", "tiny-sft", "tiny-grpo"):  # the same start policy and prompts
        variant = load(name)
        assert (variant.model, variant.evaluate.prompts) == (tiny.model, tiny.evaluate.prompts)
        assert variant.data.num_experts == tiny.data.num_experts


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).model.path is None])
def test_a_preset_that_makes_its_model_dry_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = []
    if name in NEEDS:
        folder, file = NEEDS[name]
        if not (DATA / folder / file).is_file():
            pytest.skip(f"no {file} at {DATA / folder}; set AIRL_DATA to the folder with the published data")
        words = [f"data.path={DATA / folder}", "data.num_experts=50"]
    monkeypatch.chdir(tmp_path)
    if load(name).rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        assert main(["train", name, *words, "--dry-run"]) == 2
        assert "rollout.engine=vllm needs the package vllm, which is not installed" in capsys.readouterr().err
        words.append("rollout.engine=builtin")  # all else about it fits together
    assert main(["train", name, *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    config = load(name)
    assert f"algorithm       {config.algorithm}, {config.steps} steps, seed 0" in said
    assert said.endswith("dry run: configuration, data and models fit together; nothing was written.\n")
    assert ("discriminator   " in said) == config.learns_reward
    assert list(tmp_path.iterdir()) == []


def test_the_models_of_tiny_stay_under_a_million_parameters(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "tiny", "--dry-run", "data.num_experts=10", "data.num_dev=5", "warm_start.examples=500"]) == 0
    sizes = re.findall(r"of ([\d.]+)M parameters", capsys.readouterr().out)
    assert len(sizes) == 2 and all(0.05 < float(size) < 1 for size in sizes)
