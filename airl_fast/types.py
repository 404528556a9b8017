"""The frozen records that stages hand to each other. Shapes: N packed tokens, M loss rows, S sequences.

A *loss row* is a position whose next token belongs to a completion (end-of-turn included). Everything a loss,
reward or advantage needs per token lives on the M loss rows, not on all N tokens: prompts never appear there, so
no mask is needed and `loss_cu_seqlens` cuts rewards into exactly one segment per completion.
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

    group: index of the prompt within the batch. tokens: completion ids, end-of-turn last when `finished`.
    logprobs: the sampler's log-probability of each token (None for experts and perturbed traces).
    text: the completion without its end-of-turn token.
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
class TraceBatch:
    """Packed traces. Row r = loss_rows[m] holds the state that predicts labels[m] = tokens[r + 1].

    tokens, positions: int64 [N]. cu_seqlens: int32 [S+1], prompt and completion of every sequence.
    loss_rows, labels: int64 [M]. loss_cu_seqlens: int32 [S+1], completions only.
    behaviour_logprobs: f32 [M], the sampler's; NaN where there was no sampler.
    step_ends, block_ends: bool [M], true where labels[m] closes a reasoning step, or the think or answer block; both
    are true at a completion's last token.
    group, kind: int64 [S]. pair: int64 [S], index of the sequence a perturbed one was made from, -1 otherwise.
    correct: bool [S]. lengths, loss_lengths: the lengths behind the two cu_seqlens, kept on the host so that nothing
    has to ask the device for them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    loss_rows: torch.Tensor
    labels: torch.Tensor
    loss_cu_seqlens: torch.Tensor
    behaviour_logprobs: torch.Tensor
    step_ends: torch.Tensor
    block_ends: torch.Tensor
    group: torch.Tensor
    kind: torch.Tensor
    pair: torch.Tensor
    correct: torch.Tensor
    lengths: tuple[int, ...]
    loss_lengths: tuple[int, ...]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @property
    def num_sequences(self) -> int:
        return self.group.numel()

    @property
    def num_loss_tokens(self) -> int:
        return self.labels.numel()

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """[S] -> [M]: each sequence's value at each of its loss rows."""
        return torch.repeat_interleave(values, self.loss_cu_seqlens.diff(), output_size=self.num_loss_tokens)
