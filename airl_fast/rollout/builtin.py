"""The built-in sampler: batched decoding with a KV cache, for small models and machines without vLLM.

It keeps the log-probability of every sampled token under exactly the distribution it was drawn from (after
temperature and top-p), which PPO needs as log π_old.
"""

from collections.abc import Sequence

import torch

from airl_fast.models.load import LanguageModel
from airl_fast.rollout.engine import Sample, SamplingParams
from airl_fast.rollout.prefill import read_prompts


class Builtin:
    """The sampler as an Engine: it decodes with the trainer's own weights, so a push copies nothing."""

    name = "builtin"

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def sample(self, prompts: Sequence[Sequence[int]], per_prompt: int, params: SamplingParams) -> list[list[Sample]]:
        return sample(self._lm, prompts, per_prompt, params)

    def push(self, lm: LanguageModel, version: str) -> None:
        self._lm = lm

    def check(self, lm: LanguageModel, version: str) -> None:
        return None

    def close(self) -> None:
        pass


@torch.no_grad()
def sample(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], per_prompt: int, params: SamplingParams
) -> list[list[Sample]]:
    """`per_prompt` samples of each prompt, grouped by prompt, in the order given."""
    generator = torch.Generator(device=lm.device).manual_seed(params.seed)
    rows = [list(prompt) for prompt in prompts for _ in range(per_prompt)]
    # Equal lengths together: less padding, and the order given is restored afterwards.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    samples: list[Sample | None] = [None] * len(rows)
    for begin in range(0, len(order), params.batch_size):
        chosen = order[begin : begin + params.batch_size]
        for i, drawn in zip(chosen, _decode(lm, [rows[i] for i in chosen], params, generator), strict=True):
            samples[i] = drawn
    return [samples[i : i + per_prompt] for i in range(0, len(samples), per_prompt)]


def _decode(
    lm: LanguageModel, prompts: list[list[int]], params: SamplingParams, generator: torch.Generator
) -> list[Sample]:
    distinct = list(dict.fromkeys(map(tuple, prompts)))  # read once each; their samples part at the first draw
    place = {prompt: i for i, prompt in enumerate(distinct)}
    source = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=lm.device)
    read = read_prompts(lm, distinct)
    cache, mask = read.cache, read.mask[source]
    cache.batch_select_indices(source)
    logits, positions, padded = read.logits[source], mask.sum(1, keepdim=True) - 1, len({*map(len, distinct)}) > 1
    alive = torch.arange(len(prompts), device=lm.device)  # rows still being decoded; finished ones leave the cache
    drawn: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for step in range(params.max_new_tokens):
        logits = logits.float()
        logits[:, lm.num_tokens :] = float("-inf")  # padding of the vocabulary
        chosen, chosen_logprobs = choose(logits, params.temperature, params.top_p, generator)
        ended = chosen == params.end_token
        for row, token, logprob, end in zip(
            alive.tolist(), chosen.tolist(), chosen_logprobs.tolist(), ended.tolist(), strict=True
        ):
            drawn[row].append(token)
            logprobs[row].append(logprob)
            finished[row] = end
        if step + 1 == params.max_new_tokens:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if bool(ended.any()):
            keep = (~ended).nonzero()[:, 0]
            if len(keep) == 0:
                break
            cache.batch_select_indices(keep)
            tokens, positions, mask, alive = tokens[keep], positions[keep], mask[keep], alive[keep]
        logits = lm.model(
            input_ids=tokens,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return [
        Sample(tokens=tuple(t), logprobs=tuple(p), finished=f)
        for t, p, f in zip(drawn, logprobs, finished, strict=True)
    ]


def choose(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row from f32 logits [R, V]; returns ids int64 [R] and their log-probabilities f32 [R].

    Nucleus sampling (Holtzman et al. 2020): the fewest tokens whose probability reaches top_p, renormalised.
    """
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, torch.zeros_like(logits[:, 0])  # the distribution is a point
    logits = logits / temperature
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # mass before this token already suffices
        logits = logits.scatter(-1, index, ordered.masked_fill(outside, float("-inf")))
    logprobs = logits.log_softmax(-1)
    # One uniform number a row, looked up in the distribution function: torch.multinomial draws one for every token.
    # The factor keeps rounding from reaching the total, past which no token lies.
    below = logprobs.exp().cumsum(-1)
    uniform = torch.rand(len(logits), 1, device=logits.device, generator=generator) * (1 - 2**-22)
    ids = torch.searchsorted(below, uniform * below[:, -1:], right=True)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]
