"""Small model directories, and labs and runs over them with adapters and 4-bit weights."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path

import torch

from airl_fast.batches import Replay
from airl_fast.cli import main
from airl_fast.commands.settings import PRESETS
from airl_fast.config import Config
from airl_fast.lab import Lab, load_material, make_lab, make_start_model
from airl_fast.metrics import Metrics
from airl_fast.overrides import find_preset, load_config
from airl_fast.train import fit
from tests.airl_fast.run_cases import EASY

NF4 = ("model.quantise=nf4", "discriminator.quantise=nf4")
LORA = ("model.lora={rank: 8, alpha: 16}", "discriminator.lora={rank: 8, alpha: 16}")


@functools.cache
def model_directory(architecture: str = "qwen2") -> Path:
    """An untrained model of the tiny preset's size with its tokenizer, made once a session."""
    root = Path(tempfile.mkdtemp(prefix="airl-fast-test-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        assert main(["make-model", "tiny", *EASY, f"model.build.architecture={architecture}",
                     "warm_start.examples=500", "-o", str(root / "base")]) == 0  # fmt: skip
    return root / "base"


def over(base: Path, *words: str) -> tuple[str, ...]:
    """Overrides of `tiny` that put a short run on the model in `base`."""
    return (
        *EASY, "model.build=null", f"model.path={base}", "warm_start.updates=0", "evaluate.baselines=[]",
        "tensorboard=false", "discriminator.warmup_steps=0", *words,
    )  # fmt: skip


def configuration(base: Path, *words: str) -> Config:
    source, origin = find_preset("tiny", PRESETS)
    return load_config(Config, source, over(base, *words), origin=origin)


def laboratory(base: Path, *words: str) -> Lab:
    config = configuration(base, *words)
    material = load_material(config)
    device = torch.device("cpu")
    return make_lab(config, material, make_start_model(config, material.task, device), device)


def trained(lab: Lab, file: Path) -> list[dict[str, float]]:
    """What the run's own loop logs of every step."""
    logged: list[dict[str, float]] = []
    with Metrics(file, total_steps=lab.config.steps) as meter:
        fit(lab, 1, meter, Replay(0), lambda step: {}, lambda step, result, values: logged.append(values) or True)
    return logged


def frozen_bytes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every frozen parameter as bytes; of a 4-bit one also the constants that scale it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        found[name] = parameter.detach().contiguous().view(torch.uint8).clone()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                found[f"{name}.{key}"] = value.detach().contiguous().view(-1).view(torch.uint8).clone()
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
