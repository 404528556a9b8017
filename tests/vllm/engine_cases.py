"""Small models in both forms, on disk for vLLM and in memory for the trainer, and real updates of them."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from airl_fast.config import Config, LoraConfig
from airl_fast.models.adapters import trainable
from airl_fast.models.load import LanguageModel, wrap
from airl_fast.rollout.engine import Sample, SamplingParams
from airl_fast.rollout.probe import Scored
from airl_fast.rollout.vllm import Needs, VllmEngine

VOCABULARY, END = 96, 3
PROMPTS = [[5, 9, 1, 22, 7] * 8, [4], [8, 8, 30, 2, 1, 1, 6, 17, 11, 4, 19], [31, 12], [5, 9, 1, 22, 7] * 8 + [6]]
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=24, end_token=END, seed=1, batch_size=100)
PROBES = (
    Scored(prompt=(5, 9, 1), completion=tuple(range(10, 50))),
    Scored(prompt=(7,), completion=tuple(range(90, 50, -1))),
)


def saved_model(folder: Path, architecture: str = "qwen2", *, tied: bool = True, dtype=torch.float32) -> LanguageModel:
    """Two layers with heads of 32, the smallest that vLLM's CPU attention has. Written to `folder` besides."""
    torch.manual_seed(4)
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=96, max_position_embeddings=256, initializer_range=0.25,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    model.save_pretrained(folder)
    return wrap(model, None)


def settings(folder: Path, *, lora: bool = False, dtype: str = "float32", **rollout) -> Config:
    model = {"path": str(folder), "dtype": dtype, "lora": {"rank": 12, "alpha": 24} if lora else None}
    return Config.model_validate({"model": model, "rollout": {"engine": "vllm", **rollout}})


def started(folder: Path, start: LanguageModel, config: Config, *, longest: int = 96, probes=PROBES) -> VllmEngine:
    needs = Needs(longest=longest, sequences=32, probes=probes, scratch=folder / "scratch")
    return VllmEngine(config, start, folder, needs)


def policy_of(start: LanguageModel, folder: Path, lora: LoraConfig | None) -> LanguageModel:
    return wrap(trainable(start.model, lora, base=str(folder), seed=1), None)


def updated(lm: LanguageModel, learning_rate: float = 1e-2, steps: int = 3) -> float:
    """Supervised steps on random tokens. Returns the largest change of a weight."""
    weights = [p for p in lm.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (4, 30))
        lm.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return max((a - b).abs().max().item() for a, b in zip(weights, before, strict=True))


@torch.no_grad()
def trainers_logprobs(lm: LanguageModel, prompt: list[int], sample: Sample, temperature: float = 1.0) -> torch.Tensor:
    """What the trainer's model gives the tokens of a sample, by a plain forward of prompt and sample."""
    logits = lm.model(input_ids=torch.tensor([[*prompt, *sample.tokens]]), use_cache=False).logits
    logits = logits[0, len(prompt) - 1 : -1, : lm.num_tokens].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]


def furthest(
    lm: LanguageModel, prompts: list[list[int]], groups: list[list[Sample]], temperature: float = 1.0
) -> float:
    """max |sampler's log-probability - trainer's| over all tokens."""
    return max(
        (torch.tensor(one.logprobs) - trainers_logprobs(lm, prompt, one, temperature)).abs().max().item()
        for prompt, group in zip(prompts, groups, strict=True)
        for one in group
    )
