"""Regimes: lengths that a model reads with other rotary factors than shorter ones.

Two kinds of rotary embedding take their factors from the longest position of the whole forward pass: `longrope` (Phi-3,
Phi-3.5 and Phi-4-mini with 128k contexts) has short and long ones, `dynamic` grows them with the length. A sequence
beside a longer one would then get other factors than alone. What transformers computes for a sequence alone is what
counts here, so only sequences of one regime share a pass: `pack` gives every regime its own copy of a prompt,
`hidden_states` makes one pass a regime, and the built-in sampler decodes each regime by itself.

`dynamic` also keeps the factors of the longest sequence it has seen; `forget_lengths` makes every pass begin anew.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Regimes:
    """switches: ascending; lengths above one have other factors than lengths up to it. growing: every length above it
    has factors of its own, None for none. False when all lengths are read alike."""

    switches: tuple[int, ...] = ()
    growing: int | None = None

    def __bool__(self) -> bool:
        return bool(self.switches) or self.growing is not None

    def __or__(self, other: "Regimes") -> "Regimes":
        """Of two models that read the same batch."""
        growing = [limit for limit in (self.growing, other.growing) if limit is not None]
        return Regimes(
            switches=tuple(sorted({*self.switches, *other.switches})), growing=min(growing) if growing else None
        )

    def of(self, length: int) -> tuple[int, int]:
        """Equal for lengths that may share a pass."""
        alone = self.growing is not None and length > self.growing
        return bisect_left(self.switches, length), length if alone else 0

    def room(self, length: int) -> int | None:
        """How many lengths, `length` the first, are left of its regime; None when it has no end."""
        if self.growing is not None and length > self.growing:
            return 1
        ends = [end for end in (*self.switches, self.growing) if end is not None and end >= length]
        return min(ends) - length + 1 if ends else None

    def __str__(self) -> str:
        ends = [f"above {end} tokens" for end in self.switches]
        if self.growing is not None:
            ends.append(f"with every length above {self.growing}")
        return " and ".join(ends)


ONE = Regimes()


def regimes_of(model: torch.nn.Module) -> Regimes:
    """Those of a model of transformers, or of its backbone, as its configuration says."""
    config, found = model.config.get_text_config(), ONE
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type") or rope.get("type") or ""
        if "dynamic" in kind:
            found |= Regimes(growing=int(config.max_position_embeddings))
        elif kind == "longrope":
            found |= Regimes(switches=(int(rope["original_max_position_embeddings"]),))
    return found


def _rope_parameters(config: PreTrainedConfig) -> list[dict]:
    """One for the whole model, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in given.values() if isinstance(value, dict)]
    return kinds or [given]


def forget_lengths(model: torch.nn.Module) -> None:
    """Make each pass of the model independent of the lengths of those before it."""
    for module in model.modules():
        remembers = any("dynamic" in kind or kind == "longrope" for _, kind in _kinds(module))
        if remembers and _forget not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_forget)


def _kinds(module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(prefix of its attributes, kind) of every rotary embedding in a module of transformers."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield "", kinds
    elif isinstance(kinds, dict):
        yield from ((f"{layer}_", kind) for layer, kind in kinds.items())


def _forget(module: torch.nn.Module, inputs: tuple) -> None:
    for prefix, kind in _kinds(module):
        if "dynamic" in kind:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
        elif prefix:  # transformers 5.17 stumbles over the long factors that it has kept for a kind of layer
            module.__dict__.pop(f"{prefix}long_inv_freq", None)
