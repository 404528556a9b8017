"""The built-in sampler: batched decoding with a KV cache, for small models and machines without vLLM.

It keeps the log-probability of every sampled token under exactly the distribution it was drawn from (after
temperature and top-p), which PPO needs as log π_old.
"""

from collections.abc import Callable, Sequence

import torch

from airl_fast.models.load import LanguageModel
from airl_fast.rollout.crossing import decode_by_regime
from airl_fast.rollout.engine import Sample, SamplingParams
from airl_fast.rollout.prefill import read_prompts

# (rows still decoded, logits f32 [R, V] of their next tokens) -> ids int64 [R], log-probabilities f32 [R].
Draw = Callable[[Sequence[int], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Stop = Callable[[int, int], bool]


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

    def draw(alive: Sequence[int], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return choose(logits, params.temperature, params.top_p, generator)

    for begin in range(0, len(order), params.batch_size):
        chosen = order[begin : begin + params.batch_size]
        limits = [params.max_new_tokens] * len(chosen)
        decoded = decode_by_regime(decode, lm, [rows[i] for i in chosen], limits, params.end_token, draw)
        for i, drawn in zip(chosen, decoded, strict=True):
            samples[i] = drawn
    return [samples[i : i + per_prompt] for i in range(0, len(samples), per_prompt)]


def decode(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end_token: int,
    draw: Draw,
    stop: Stop | None = None,
) -> list[Sample]:
    """One sample of each prompt, all of them in one batch. limits: the most tokens of each, at least one. For a model
    with regimes, prompts and samples are of one; `crossing` cuts them so.

    A row leaves the batch when it draws `end_token`, has its limit, or `stop(row, token)` says so of the token it
    has just drawn. draw: see `Draw`.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))  # read once each; their samples part at the first draw
    place = {prompt: i for i, prompt in enumerate(distinct)}
    source = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=lm.device)
    read = read_prompts(lm, distinct)
    cache, mask = read.cache, read.mask[source]
    cache.batch_select_indices(source)
    logits, positions, padded = read.logits[source], mask.sum(1, keepdim=True) - 1, len({*map(len, distinct)}) > 1
    alive = list(range(len(prompts)))  # rows still being decoded; the others leave the cache
    drawn: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    while True:
        logits = logits.float()
        logits[:, lm.num_tokens :] = float("-inf")  # padding of the vocabulary
        chosen, chosen_logprobs = draw(alive, logits)
        staying = []
        for i, (row, token, logprob) in enumerate(zip(alive, chosen.tolist(), chosen_logprobs.tolist(), strict=True)):
            drawn[row].append(token)
            logprobs[row].append(logprob)
            finished[row] = token == end_token
            if not finished[row] and len(drawn[row]) < limits[row] and not (stop and stop(row, token)):
                staying.append(i)
        if not staying:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if len(staying) < len(alive):
            keep = torch.tensor(staying, device=lm.device)
            cache.batch_select_indices(keep)
            tokens, positions, mask = tokens[keep], positions[keep], mask[keep]
            alive = [alive[i] for i in staying]
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
    """As `pick`, with one uniform number a row from the generator: torch.multinomial draws one for every token."""
    uniform = None
    if temperature != 0:
        uniform = torch.rand(len(logits), 1, device=logits.device, generator=generator)
    return pick(logits, temperature, top_p, uniform)


def pick(
    logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from f32 logits [R, V], looked up in the distribution function at `uniform`, f32 [R, 1] in
    0..1; returns ids int64 [R] and their log-probabilities f32 [R]. Temperature 0 is greedy and needs no `uniform`.

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
    # The factor keeps rounding from reaching the total, past which no token lies.
    below = logprobs.exp().cumsum(-1)
    ids = torch.searchsorted(below, uniform * (1 - 2**-22) * below[:, -1:], right=True)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]
