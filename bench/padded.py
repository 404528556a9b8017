"""The plain way to run a batch: every sequence whole, its prompt repeated, padded to the longest.

The specification of packed, prompt-sharing forwards, and what they are timed against.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch

from airl_fast.types import TraceBatch


def padded_hidden_states(backbone: torch.nn.Module, batch: TraceBatch) -> torch.Tensor:
    """What `airl_fast.models.forward.hidden_states` returns, [N, H], from a padded forward of all S sequences.

    The prompt's rows are those of its first sequence: every copy computes the same.
    """
    rows = _row_table(batch)
    index = torch.from_numpy(np.maximum(rows, 0)).to(batch.tokens.device)
    hidden = backbone(input_ids=batch.tokens[index], use_cache=False).last_hidden_state
    place = np.empty(batch.segments.num_rows, dtype=np.int64)
    flat, real = rows.ravel()[::-1], np.flatnonzero(rows.ravel()[::-1] >= 0)
    place[flat[real]] = rows.size - 1 - real  # reversed, so that the first of several writes last
    return hidden.flatten(0, 1)[torch.from_numpy(place).to(hidden.device)]


def _row_table(batch: TraceBatch) -> np.ndarray:
    """int64 [S, T]: the packed row of every place, -1 past a sequence's end."""
    prompts, lengths = batch.segments.prompts, batch.loss_lengths
    starts = np.cumsum(prompts) - prompts
    width = max(prompts[p] + n for p, n in zip(batch.prompt_of, lengths, strict=True))
    table = np.full((len(lengths), width), -1, dtype=np.int64)
    ends = np.cumsum(lengths)
    labels = batch.label_rows.cpu().numpy()
    for s, (p, n) in enumerate(zip(batch.prompt_of, lengths, strict=True)):
        table[s, : prompts[p]] = starts[p] + np.arange(prompts[p])
        table[s, prompts[p] : prompts[p] + n] = labels[ends[s] - n : ends[s]]
    return table


@contextmanager
def padded() -> Iterator[None]:
    """Everything that runs inside computes its hidden states the padded way."""
    with (
        patch("airl_fast.models.forward.hidden_states", padded_hidden_states),
        patch("airl_fast.discriminator.hidden_states", padded_hidden_states),
    ):
        yield
