"""Small runs of TRL's own trainers that several test files compare, made here from nothing."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from airl_kernels.integrations import trl as ours
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from airl_fast.config import BuildConfig
from airl_fast.models.build import build_model, build_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed; `make peers` installs it.")
datasets = pytest.importorskip("datasets", reason="datasets is not installed; `make peers` installs it with TRL.")

WORDS = tuple(f"count {a} and {b}, then say {a + b}." for a in range(7) for b in range(7))
PADDED = 24  # rows of the output layer that no token names


@functools.cache
def tokenizer_of() -> PreTrainedTokenizerBase:
    return build_tokenizer(WORDS, BuildConfig(vocab_size=320))


def small_model(architecture: str = "qwen2") -> PreTrainedModel:
    """Two layers with a vocabulary padded beyond its tokenizer's. The Qwen2 ties its output layer, the Llama not."""
    return AutoModelForCausalLM.from_pretrained(saved_model(architecture), dtype=torch.float32)


@functools.cache
def saved_model(architecture: str) -> Path:
    """Its directory: TRL loads its reference model from there."""
    folder = Path(tempfile.mkdtemp(prefix="airl-trl-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shape = BuildConfig(
        architecture=architecture, hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=48, max_length=96
    )
    model = build_model(shape, tokenizer_of(), 0)
    if architecture == "llama":
        model.config.tie_word_embeddings = False
        model = type(model)(model.config)
    model.resize_token_embeddings(len(tokenizer_of()) + PADDED, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def prompts(count: int = 12) -> "datasets.Dataset":
    return datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in WORDS[:count]])


def spread(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that differs within every group: how many distinct tokens a completion has."""
    return [len(set(ids)) / 8 for ids in completion_ids]


@dataclass(kw_only=True)
class Record(TrainerCallback):
    """What a run did: the logged numbers and the gradients of every step, and the weights it ended with."""

    logs: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: ours.Calls = field(default_factory=ours.Calls)

    def on_pre_optimizer_step(self, args, state, control, *, model, **_) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, *, logs, **_) -> None:
        if "loss" in logs:
            self.logs.append({name: float(value) for name, value in logs.items()})


def settings(config: type, folder: Path, **options: object) -> object:
    """The arguments of a run of 20 steps whose samples serve two of them each, so that ratios differ from 1."""
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 10,
        "max_steps": 20,
        "learning_rate": 0.1,
        "optim": "sgd",  # steps in proportion to the gradient: Adam would scale rounding up to a whole step
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "beta": 0.05,
        "temperature": 0.8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return config(**{**common, **options})


def train(
    folder: Path,
    make_trainer: Callable[..., object],
    config: type,
    model: PreTrainedModel,
    *,
    patched: bool,
    prepare: Callable[[object], None] = lambda trainer: None,
    arguments: dict[str, object] | None = None,
    **options: object,
) -> Record:
    """Run one of TRL's trainers, patched or as published. arguments: of the trainer; options: of its configuration."""
    record = Record()
    with ours.patched() if patched else nothing() as calls:
        trainer = make_trainer(
            model=model,
            reward_funcs=spread,
            args=settings(config, folder, **options),
            train_dataset=prompts(),
            processing_class=tokenizer_of(),
            callbacks=[record],
            **(arguments or {}),
        )
        prepare(trainer)
        trainer.train()
        record.calls = calls()
    record.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return record


@contextmanager
def nothing() -> Iterator[Callable[[], ours.Calls]]:
    yield ours.Calls


def assert_same_run(found: Record, expected: Record, *, steps: int = 20, bound: float = 2e-5) -> None:
    """Losses, metrics, gradients of every step and final weights within the rounding of fp32 sums."""
    assert len(found.logs) == len(expected.logs) == len(found.gradients) == len(expected.gradients) == steps
    for mine, theirs in zip(found.logs, expected.logs, strict=True):
        assert mine.keys() == theirs.keys() >= {"loss", "entropy", "grad_norm"}
        for name in mine.keys() - {"step_time"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-6), name
    for mine, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert relative(mine[name], theirs[name]) < 5 * bound, name
    for name, weight in expected.weights.items():
        assert relative(found.weights[name], weight) < bound, name


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm().clamp_min(1e-6))
