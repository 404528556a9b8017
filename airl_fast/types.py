"""The frozen records that stages hand to each other. N packed rows, M completion tokens, S sequences, P prompts.

A model reads N rows: every prompt once, then every completion. Everything a loss, reward or advantage needs per
token lives on the M completion tokens (end-of-turn included), sequence after sequence: prompts never appear there,
so no mask is needed and `loss_cu_seqlens` cuts rewards into exactly one segment per completion.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch


class Kind(IntEnum):
    """Where a trace comes from."""

    EXPERT = 0
    POLICY = 1
    PERTURBED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt of a task.

    prompt: the user's message. answer: the gold answer as the task's `verify` understands it.
    expert: a demonstration `<think>…</think><answer>…</answer>`, or None when the prompt has none.
    """

    id: str
    prompt: str
    answer: str
    expert: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One completion of one prompt, as token ids of the policy's tokenizer.

    group: index of the prompt within the batch. tokens: completion ids, when `finished` the last one ends the turn:
    the template's end-of-turn token, or in a sample any that the model lists as an end.
    logprobs: the sampler's log-probability of each token (None for experts and perturbed traces).
    text: the completion without the token that ends it.
    pair: position, in the list the trace travels in, of the trace it was perturbed from (None otherwise).
    first_changed: character offset in `text` of the first perturbed character (None otherwise).
    correct: the verifier's verdict, None when it was not asked.
    """

    group: int
    kind: Kind
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finished: bool = True
    logprobs: tuple[float, ...] | None = None
    pair: int | None = None
    first_changed: int | None = None
    correct: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Which of the N rows attend to which, on the host. Rows: the P prompts end to end, then the S completions, those
    of a prompt next to each other. A prompt's row sees its own prompt up to itself; a completion's row sees the whole
    of its prompt and its own completion up to itself.

    prompts: the P lengths. completions: the S lengths in row order. counts: completions of each prompt.
    """

    prompts: tuple[int, ...]
    completions: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def prompt_rows(self) -> int:
        return sum(self.prompts)

    @property
    def num_rows(self) -> int:
        return sum(self.prompts) + sum(self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceBatch:
    """Packed traces, ready for a model. Token m is tokens[label_rows[m]]; the state at loss_rows[m] predicts it.

    tokens, positions: int64 [N], rows as `segments` lays them out. loss_rows, label_rows: int64 [M]; the last row of
    a shared prompt predicts the first token of each of its completions, so loss_rows may repeat.
    labels: int64 [M]. loss_cu_seqlens: int32 [S+1], one segment a completion.
    behaviour_logprobs: f32 [M], the sampler's; NaN where there was no sampler.
    step_ends, block_ends: bool [M], true where labels[m] closes a reasoning step, or the think or answer block; both
    are true at a completion's last token.
    group, kind: int64 [S]. pair: int64 [S], index of the sequence a perturbed one was made from, -1 otherwise.
    correct: bool [S].
    On the host, so that nothing has to ask the device: prompt_of [S], the prompt (0..P-1) a sequence continues;
    kinds and pairs [S]; loss_lengths [S], the lengths behind loss_cu_seqlens.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    loss_rows: torch.Tensor
    label_rows: torch.Tensor
    labels: torch.Tensor
    loss_cu_seqlens: torch.Tensor
    behaviour_logprobs: torch.Tensor
    step_ends: torch.Tensor
    block_ends: torch.Tensor
    group: torch.Tensor
    kind: torch.Tensor
    pair: torch.Tensor
    correct: torch.Tensor
    segments: Segments
    prompt_of: tuple[int, ...]
    kinds: tuple[Kind, ...]
    pairs: tuple[int, ...]
    loss_lengths: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.loss_lengths)

    @property
    def num_loss_tokens(self) -> int:
        return self.labels.numel()

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """[S] -> [M]: each sequence's value at each of its tokens."""
        return torch.repeat_interleave(values, self.loss_cu_seqlens.diff(), output_size=self.num_loss_tokens)
