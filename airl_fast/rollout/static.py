"""Decoding by steps of fixed shape, in which nothing asks the device: what a CUDA graph can hold.

`Decoder.advance` is the step: read a token a row, draw the next, note it, note who has ended. All that changes from
step to step lies in tensors of the device; its shapes depend on how many rows it takes and how much of the cache it
shows alone. On CUDA each pair of these is captured once and replayed (graphs.py); anywhere else the same code runs
as it stands, which is how it is tested against the plain loop (builtin.py).

Rows that end do not leave at once: they are drawn on, unseen, until the host looks. It looks every `LOOK` tokens, and
when half of the rows or fewer go on, they are closed up to a half, a quarter, … of the batch. So a step never carries
more than twice the rows that it looked like needing, there are few sizes to capture, and the host waits for the
device once in `LOOK` tokens.
"""

import sys
from collections.abc import Sequence

import torch

from airl_fast.errors import UserError
from airl_fast.models.attention import packed_kernel, sliding_window, why_not_shared
from airl_fast.models.load import LanguageModel
from airl_fast.rollout.engine import Sample, SamplingParams
from airl_fast.rollout.graphs import Graphs
from airl_fast.rollout.pick import pick
from airl_fast.rollout.prefill import Prefill, read_prompts
from airl_fast.rollout.static_cache import StaticKeys, row_bytes
from airl_fast.rollout.uniform import Uniform

LOOK = 16  # tokens between two looks at who has ended
_FEWEST = 8  # rows: below that a step costs what one row does
_QUARTERS = 4  # attention reads the cache in so many lengths
_ROUND = 256  # places a cache is rounded up to, so that a slightly longer prompt finds it fitting
_CACHE, _KEPT = 1 / 4, 1 / 10  # shares of a GPU's memory: the most a cache takes, and the most that outlives a call
_LOGITS = 6  # float32 copies of the logits that a step holds: log-softmax, its exp, their sums, …


def why_not_static(lm: LanguageModel) -> str | None:
    """Why this model is decoded by the plain loop on a GPU too, None when it need not be."""
    config, name = lm.model.config.get_text_config(), type(lm.model).__name__
    if packed_kernel(lm.backbone) is None:
        return why_not_shared(lm.model) or f"{name} keeps its own attention"
    if sliding_window(config) is not None:
        return f"{name} has sliding windows"
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return f"{name} routes tokens to experts"
    if lm.regimes:
        return f"{name} has other rotary factors {lm.regimes}"
    return None


class Static:
    """Decodes batches with a `Decoder`, and keeps it for the next call while it is small beside the GPU's memory:
    capturing takes as long as many tokens. Training changes weights in place, which captured steps follow; for moved
    weights, other ends or another temperature there is a new one."""

    def __init__(self) -> None:
        self._decoder: Decoder | None = None
        self._made_for: tuple | None = None

    def decode(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        uniform: Uniform,
        longest: int,
    ) -> list[Sample]:
        """One sample of each prompt, as many at once as the cache may hold. longest: prompt of the whole call."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        source = [place[tuple(prompt)] for prompt in prompts]
        read = read_prompts(lm, distinct)
        decoder = self._fitting(lm, read, len(prompts), params, longest)
        samples = []
        for begin in range(0, len(source), decoder.rows):
            samples += decoder.run(read, source[begin : begin + decoder.rows], uniform)
        return samples

    def finish(self) -> None:
        """The call is over: what is not small is given back, before anything is trained."""
        if self._decoder is not None and self._decoder.nbytes > _share(self._decoder.device, _KEPT):
            self.release()

    def release(self) -> None:
        if self._decoder is None:
            return
        device = self._decoder.device
        self._decoder = self._made_for = None
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what graphs held is in pools of their own

    def _fitting(self, lm: LanguageModel, read: Prefill, rows: int, params: SamplingParams, longest: int) -> "Decoder":
        places = longest + params.max_new_tokens
        places = -(-places // _ROUND) * _ROUND
        rows = min(rows, max(1, _share(lm.device, _CACHE) // row_bytes(read.cache, places)))
        weights = tuple(tensor.data_ptr() for tensor in (*lm.model.parameters(), *lm.model.buffers()))
        settings = (params.temperature, params.top_p, params.max_new_tokens, params.ends, lm.num_tokens)
        made_for = (id(lm.model), weights, settings)
        held = self._decoder
        if held is None or made_for != self._made_for or held.rows < rows or held.places < places:
            self.release()
            self._decoder, self._made_for = _decoder(lm, read, rows, places, params), made_for
        return self._decoder


def _decoder(lm: LanguageModel, read: Prefill, rows: int, places: int, params: SamplingParams) -> "Decoder":
    try:
        return Decoder(lm, read, rows, places, params)
    except torch.OutOfMemoryError:
        size = rows * row_bytes(read.cache, places) / 2**30
        raise UserError(
            f"rollout.engine=builtin: the cache of {rows} sequences of {places} tokens ({size:.1f} GiB) does not fit "
            "into the GPU's memory; lower rollout.batch_size."
        ) from None


def _share(device: torch.device, share: float) -> int:
    if device.type != "cuda":
        return sys.maxsize
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def halves(rows: int) -> list[int]:
    """`rows`, its half, its quarter and so on, rounded up, to the first that is no more than a few; ascending."""
    sizes = [rows]
    while sizes[-1] > _FEWEST:
        sizes.append(-(-sizes[-1] // 2))
    return sizes[::-1]


class Decoder:
    """State and step of `rows` rows over `places` places of cache.

    Row r holds what sample slot[r] is being written to. drawn, logprobs: [rows * limit], of sample s from s * limit
    on; lengths: int64 [rows], how many of them count: rows that have ended write on behind theirs.
    """

    def __init__(self, lm: LanguageModel, read: Prefill, rows: int, places: int, params: SamplingParams) -> None:
        self.lm, self.rows, self.places, self.device = lm, rows, places, lm.device
        self._params, self._limit = params, params.max_new_tokens
        self._cache = StaticKeys(read.cache, rows, places)
        self._sizes = halves(rows)
        self._dtype = read.cache.layers[0].keys.dtype

        def state(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._tokens, self._positions = state(rows, 1), state(rows, 1)
        self._first, self._slot = state(rows), state(rows)
        self._alive, self._lengths, self._step = state(rows, dtype=torch.bool), state(rows), state(1)
        self._drawn, self._logprobs = state(rows * self._limit), state(rows * self._limit, dtype=torch.float32)
        self._uniform, self._used = state(rows * self._limit, dtype=torch.float32), state(1)
        self._ends = torch.tensor(sorted(params.ends), device=self.device)
        self._columns = torch.arange(places, device=self.device)
        self._corners = {}
        self.graphs = Graphs(self.device) if self.device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Of the cache and, about, of what a captured step holds besides."""
        return self._cache.nbytes + _LOGITS * 4 * self.rows * self.lm.head.weight.shape[0]

    def run(self, read: Prefill, source: Sequence[int], uniform: Uniform) -> list[Sample]:
        """A sample of each of `source`, the prompts in `read` by number; at most `rows` of them."""
        count, width = len(source), read.mask.shape[1]
        size = self._size_for(count)
        self._begin(read, source, size, uniform)
        step = 1  # tokens drawn
        while step < self._limit:
            if (step - 1) % LOOK == 0:
                alive = self._alive[:size].tolist()
                if not any(alive):
                    break
                if (fewer := self._size_for(sum(alive))) < size:
                    self._close_up(alive, fewer, width + step)
                    size = fewer
            if self.graphs is None:
                self.advance(size, self._shown(width + step))
            else:
                self.graphs(self.advance, size, self._shown(width + step))
            step += 1
        uniform.skip(int(self._used))
        return self._samples(count)

    def advance(self, size: int, shown: int) -> None:
        """One more token of each of the first `size` rows, which see the first `shown` places of the cache."""
        if (size, shown) not in self._corners:
            self._corners[size, shown] = self._cache.corner(size, shown)
        columns = self._columns[:shown]
        visible = (columns >= self._first[:size, None]) & (columns <= self._cache.column)
        mask = torch.zeros(size, shown, dtype=self._dtype, device=self.device).masked_fill_(~visible, float("-inf"))
        logits = self.lm.model(
            input_ids=self._tokens[:size],
            attention_mask=mask[:, None, None],
            position_ids=self._positions[:size],
            past_key_values=self._corners[size, shown],
            use_cache=True,
            one_token=True,
        ).logits[:, -1]
        self._cache.column.add_(1)
        self._positions.add_(1)
        self._draw(logits)

    # ---- within ----

    def _size_for(self, count: int) -> int:
        return next(size for size in self._sizes if size >= count)

    def _shown(self, places: int) -> int:
        """The places that a step needs to see, rounded up to a quarter of the cache."""
        part = self.places // _QUARTERS
        return -(-places // part) * part

    def _begin(self, read: Prefill, source: Sequence[int], size: int, uniform: Uniform) -> None:
        """Prompts into the cache, and the first token of each."""
        padded = torch.tensor([*source, *[0] * (size - len(source))], device=self.device)
        self._cache.fill(read.cache, padded)
        lengths = read.mask.sum(1)[padded]
        self._first[:size] = read.mask.shape[1] - lengths
        self._positions[:size, 0] = lengths
        self._slot.copy_(torch.arange(self.rows))
        self._alive[:size] = torch.arange(size, device=self.device) < len(source)
        for counter in (self._lengths, self._step, self._used):
            counter.zero_()
        if self._params.temperature != 0:
            numbers = uniform.ahead(len(source) * self._limit)
            self._uniform[: len(numbers)] = numbers
        self._draw(read.logits[padded])

    def _draw(self, logits: torch.Tensor) -> None:
        """Draw from logits [R, V], with the numbers that the plain loop uses: one for each row that goes on."""
        size = len(logits)
        alive, slot = self._alive[:size], self._slot[:size]
        logits = logits.float()
        logits[:, self.lm.num_tokens :] = float("-inf")  # padding of the vocabulary
        uniform = None
        if self._params.temperature != 0:
            place = self._used + (alive.cumsum(0) - 1).clamp_min(0)
            uniform = self._uniform[place.clamp_max(len(self._uniform) - 1)][:, None]
            self._used.add_(alive.sum())
        ids, logprobs = pick(logits, self._params.temperature, self._params.top_p, uniform)
        place = slot * self._limit + self._step
        self._drawn.index_copy_(0, place, ids)
        self._logprobs.index_copy_(0, place, logprobs)
        self._lengths.index_add_(0, slot, alive.long())
        self._step.add_(1)
        alive &= (ids[:, None] != self._ends).all(1) & (self._step < self._limit)
        self._tokens[:size, 0] = ids

    def _close_up(self, alive: Sequence[bool], size: int, used: int) -> None:
        """Keep the rows that go on, in their order, and as many others as fill the size."""
        going = [row for row, on in enumerate(alive) if on]
        ended = [row for row, on in enumerate(alive) if not on]
        keep = torch.tensor([*going, *ended[: size - len(going)]], device=self.device)
        self._cache.close_up(keep, used)
        for state in (self._tokens, self._positions, self._first, self._slot, self._alive):
            state[:size] = state[keep]

    def _samples(self, count: int) -> list[Sample]:
        used, made = count * self._limit, []
        drawn, logprobs = self._drawn[:used].tolist(), self._logprobs[:used].tolist()
        for sample, length in enumerate(self._lengths[:count].tolist()):
            own = slice(sample * self._limit, sample * self._limit + length)
            tokens = tuple(drawn[own])
            made.append(Sample(tokens=tokens, logprobs=tuple(logprobs[own]), finished=tokens[-1] in self._params.ends))
        return made
