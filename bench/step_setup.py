"""A real AIRL step at a chosen size: prompts and samples of exactly so many tokens, models with random weights."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from airl_fast.config import Config
from airl_fast.lab import Lab, load_material, make_lab
from airl_fast.models.build import build_model, build_tokenizer
from airl_fast.models.load import load_language_model
from airl_fast.rollout.engine import Engine
from airl_fast.traces import TraceMaker
from airl_fast.types import Example
from bench.errors import BadArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """prompts: a step's prompts. group: samples of each. Lengths in tokens. size: a key of BUILDS."""

    prompts: int = 8
    group: int = 16
    prompt_tokens: int = 64
    completion_tokens: int = 64
    seed: int = 0
    size: str = "tiny"

    @property
    def tokens(self) -> int:
        """Sampled tokens of one step, what tokens/s counts."""
        return self.prompts * self.group * self.completion_tokens


# The vocabulary is the tokenizer's of the task's text, at any size: `bench.updates` has the published ones.
BUILDS = {
    "tiny": {"hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate_size": 192, "vocab_size": 384},
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 384,
    },
}


def natural_dtype(device: torch.device) -> str:
    """What a run on this device trains in."""
    return "bfloat16" if device.type == "cuda" else "float32"


def config_of(scenario: Scenario, model: Path, device: str, dtype: str) -> Config:
    """The tiny preset's head and losses; plain AIRL as the paper has it otherwise."""
    return Config.model_validate(
        {
            "seed": scenario.seed,
            "steps": 1000,
            "device": device,
            "data": {"task": "arithmetic", "options": {"train_size": 4 * scenario.prompts, "dev_size": 1}},
            "model": {"path": str(model), "dtype": dtype},
            "discriminator": {"head": "action", "optim": {"learning_rate": 1e-4}},
            "policy": {"optim": {"learning_rate": 1e-4}},
            "rollout": {
                "prompts_per_step": scenario.prompts,
                "samples_per_prompt": scenario.group,
                "max_new_tokens": scenario.completion_tokens,
            },
            "evaluate": {"final": False},
        }
    )


def save_model(scenario: Scenario, folder: Path) -> None:
    """A random model of the scenario's size and a tokenizer of the task's text, as a model directory."""
    length = max(256, scenario.prompt_tokens + scenario.completion_tokens + 1)
    build = Config.model_validate({"model": {"build": BUILDS[scenario.size] | {"max_length": length}}}).model.build
    config = Config.model_validate({"model": {"build": build.model_dump()}, "data": {"task": "arithmetic"}})
    examples = load_material(config).train[:2000]
    tokenizer = build_tokenizer([text for e in examples for text in (e.prompt, e.expert)], build)
    model = build_model(build, tokenizer, scenario.seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Endless:
    """An engine whose samples never end of themselves, so that every step has the same number of tokens."""

    engine: Engine

    @property
    def name(self) -> str:
        return self.engine.name

    def sample(self, prompts, per_prompt, params):
        return self.engine.sample(prompts, per_prompt, replace(params, end_token=-1, other_ends=()))

    def push(self, lm, version: str) -> None:
        self.engine.push(lm, version)

    def check(self, lm, version: str):
        return self.engine.check(lm, version)

    def close(self) -> None:
        self.engine.close()


def lab_of(scenario: Scenario, model: Path, device: torch.device, dtype: str | None = None) -> Lab:
    """dtype: of policy and discriminator; None takes the device's."""
    config = config_of(scenario, model, str(device), dtype or natural_dtype(device))
    material = load_material(config)
    lm = load_language_model(config.model, device)
    lab = make_lab(config, material, lm, device)
    maker = LongPrompts(
        **{f.name: getattr(lab.maker, f.name) for f in fields(TraceMaker)}, tokens=scenario.prompt_tokens
    )
    bridge = replace(lab.reward.bridge, maker=maker)
    reward = replace(lab.reward, bridge=bridge)
    return replace(lab, maker=maker, reward=reward, engine=Endless(lab.engine))


@dataclass(frozen=True, slots=True, kw_only=True)
class LongPrompts(TraceMaker):
    """Digits, a token each, before every prompt until it has `tokens` tokens."""

    tokens: int

    def missing(self, example: Example) -> int:
        own = len(TraceMaker.prompt_tokens(self, example))
        if own > self.tokens:
            raise BadArgument(f"--prompt-tokens {self.tokens}: the task's prompts have {own} tokens; give as many.")
        return self.tokens - own

    def prompt_tokens(self, example: Example) -> tuple[int, ...]:
        (digit,) = self.chat.tokenizer.encode("7", add_special_tokens=False)
        return (digit,) * self.missing(example) + tuple(TraceMaker.prompt_tokens(self, example))
