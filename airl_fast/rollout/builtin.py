"""The built-in sampler: batched decoding with a KV cache, for small models and machines without vLLM.

It keeps the log-probability of every sampled token under exactly the distribution it was drawn from (after
temperature and top-p), which PPO needs as log π_old. On a GPU its steps are CUDA graphs (static.py); the loop here
is what the CPU runs, models that those cannot serve, and whoever has to see a token before the next is drawn.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch.nn.attention import sdpa_kernel

from airl_fast.models.load import LanguageModel
from airl_fast.rollout.crossing import decode_by_regime
from airl_fast.rollout.engine import Sample, SamplingParams
from airl_fast.rollout.graphs import ATTENTION
from airl_fast.rollout.pick import pick
from airl_fast.rollout.prefill import read_prompts
from airl_fast.rollout.static import Static, why_not_static
from airl_fast.rollout.uniform import Uniform

# (rows still decoded, logits f32 [R, V] of their next tokens) -> ids int64 [R], log-probabilities f32 [R].
Draw = Callable[[Sequence[int], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Stop = Callable[[int, int], bool]


class Builtin:
    """The sampler as an Engine: it decodes with the trainer's own weights, so a push copies nothing.

    plain: why its steps are not to be CUDA graphs; None where they may be, on a GPU and for a model that allows it.
    """

    def __init__(self, lm: LanguageModel, *, plain: str | None = None) -> None:
        self._lm, self._plain, self._static = lm, plain, Static()

    @property
    def name(self) -> str:
        why = self._why_plain()
        return "builtin, its steps as CUDA graphs" if why is None else f"builtin, step by step: {why}"

    def sample(self, prompts: Sequence[Sequence[int]], per_prompt: int, params: SamplingParams) -> list[list[Sample]]:
        return sample(self._lm, prompts, per_prompt, params, None if self._why_plain() else self._static)

    def push(self, lm: LanguageModel, version: str) -> None:
        if lm.model is not self._lm.model:
            self._static.release()
        self._lm = lm

    def check(self, lm: LanguageModel, version: str) -> None:
        return None

    def close(self) -> None:
        self._static.release()

    def _why_plain(self) -> str | None:
        if self._lm.device.type != "cuda":
            return f"on the {self._lm.device.type}"
        return self._plain or why_not_static(self._lm)


@torch.no_grad()
def sample(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    per_prompt: int,
    params: SamplingParams,
    static: Static | None = None,
) -> list[list[Sample]]:
    """`per_prompt` samples of each prompt, grouped by prompt, in the order given. static: decodes by steps of fixed
    shape, the same tokens up to rounding; None is the plain loop."""
    uniform = Uniform(params.seed, lm.device)
    rows = [list(prompt) for prompt in prompts for _ in range(per_prompt)]
    # Equal lengths together: less padding, and the order given is restored afterwards.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    samples: list[Sample | None] = [None] * len(rows)

    def draw(alive: Sequence[int], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = None if params.temperature == 0 else uniform.next(len(logits))[:, None]
        return pick(logits, params.temperature, params.top_p, numbers)

    for begin in range(0, len(order), params.batch_size):
        chosen = order[begin : begin + params.batch_size]
        batch = [rows[i] for i in chosen]
        if static is not None:
            decoded = static.decode(lm, batch, params, uniform, len(rows[order[-1]]))
        else:
            limits = [params.max_new_tokens] * len(chosen)
            decoded = decode_by_regime(decode, lm, batch, limits, params.ends, draw)
        for i, drawn in zip(chosen, decoded, strict=True):
            samples[i] = drawn
    if static is not None:
        static.finish()
    return [samples[i : i + per_prompt] for i in range(0, len(samples), per_prompt)]


def decode(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Collection[int],
    draw: Draw,
    stop: Stop | None = None,
) -> list[Sample]:
    """One sample of each prompt, all of them in one batch. limits: the most tokens of each, at least one. For a model
    with regimes, prompts and samples are of one; `crossing` cuts them so.

    A row leaves the batch when it draws one of `ends`, has its limit, or `stop(row, token)` says so of the token it
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
            finished[row] = token in ends
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
        with sdpa_kernel(ATTENTION):
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
