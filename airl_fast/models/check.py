"""Before packed rows are trained on or scored: does the model compute over them what it does over plain sequences?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from airl_fast.errors import UserError
from airl_fast.models.attention import keep_own_attention, packed_kernel, sliding_window
from airl_fast.models.forward import hidden_states, one_pass
from airl_fast.models.load import LanguageModel
from airl_fast.models.regimes import regimes_of
from airl_fast.pack import pack
from airl_fast.types import Kind, Trace

_PROMPT, _LENGTH = 4, 9  # tokens of what is compared
_NARROW = 3  # a sliding window that these lengths leave
_TOLERANCE = 0.05  # of states; rounding in bfloat16 stays well below
_EXACT = 1e-3  # of rotations, which are of one position each and computed in float32


def verify_packing(lm: LanguageModel, key: str = "model.path") -> None:
    """`verify_model` of a language model."""
    verify_model(lm.model, key)


@torch.no_grad()
def verify_model(model: PreTrainedModel, key: str) -> None:
    """Compare packed rows with plain sequences, two completions of one prompt; then a short trace beside long ones
    with the same trace alone. The model may be a backbone without an output layer.

    A model that computes something else over packed rows goes back to its own attention, with the reason for the log;
    one that does so even then, or reads a trace otherwise beside a longer one, is refused with UserError.
    """
    name = type(model).__name__
    problem = _packing_error(model.base_model)
    if problem is not None and packed_kernel(model.base_model) is not None:
        keep_own_attention(model, f"{name} computes something else over packed rows ({problem})")
        problem = _packing_error(model.base_model)
    if problem is not None:
        raise UserError(
            f"{key}: a {name} cannot read packed sequences ({problem}); "
            "use another architecture, such as Qwen2 or Llama."
        )
    problem = _neighbour_error(model.base_model)
    if problem is not None:
        raise UserError(
            f"{key}: a {name} reads a sequence otherwise when a longer one is beside it ({problem}), so no batch has "
            "the numbers of its sequences; use another architecture, such as Qwen2 or Llama."
        )


def _packing_error(backbone: PreTrainedModel) -> str | None:
    """As the model is, and past its sliding window, where it has one."""
    problem = _rows_error(backbone)
    if problem is None and sliding_window(backbone.config) is not None:
        with _narrow_window(backbone.config):
            problem = _rows_error(backbone)
        problem = None if problem is None else f"past its sliding window {problem}"
    return problem


def _rows_error(backbone: PreTrainedModel) -> str | None:
    ids = _ids(backbone)
    completions = (ids[_PROMPT:7], ids[7:])
    batch = pack([_trace(ids[:_PROMPT], tokens) for tokens in completions], backbone.device)
    try:
        packed = hidden_states(backbone, batch)[batch.label_rows].split(batch.loss_lengths)
    except (RuntimeError, TypeError, ValueError) as error:  # what a model raises that does not know the arguments
        return _first_line(error)
    for tokens, found in zip(completions, packed, strict=True):
        whole = torch.tensor([ids[:_PROMPT] + tokens], device=backbone.device)
        alone = backbone(input_ids=whole, use_cache=False).last_hidden_state[0, _PROMPT:]
        if (problem := _difference(found, alone)) is not None:
            return problem
    return None


def _neighbour_error(backbone: PreTrainedModel) -> str | None:
    """A trace of each length at which anything could change, those of one regime in one pass, and each alone."""
    regimes = regimes_of(backbone)
    longest = int(backbone.config.get_text_config().max_position_embeddings)
    lengths = {_LENGTH, longest, *(end + more for end in regimes.switches for more in (0, 1))}
    together: dict[object, list[int]] = {}
    for length in sorted(length for length in lengths if _LENGTH <= length <= longest):
        together.setdefault(regimes.of(length), []).append(length)
    try:
        alone = {length: _read(backbone, [length])[0] for group in together.values() for length in group}
        for group in reversed(together.values()):
            for length, found in zip(group, _read(backbone, group), strict=True):
                problem = _difference(found.states, alone[length].states)
                for ours, theirs in zip(found.rotations, alone[length].rotations, strict=True):
                    problem = problem or _difference(ours, theirs, "rotations", _EXACT)
                if problem is not None:
                    return f"of {length} tokens beside {group[-1]}: {problem}"
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return _first_line(error)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """What became of a trace's completion. states: [C, H]. rotations: what the rotary embeddings gave, [..., C, D]."""

    states: torch.Tensor
    rotations: list[torch.Tensor]


def _read(backbone: PreTrainedModel, lengths: Sequence[int]) -> list[_Reading]:
    """A trace of each length, all in one pass.

    Only a trace's first and last tokens are there, at their positions, which are all that a length is known by. Their
    rotations are compared besides their states because a trained model may hardly feel wrong ones over a few tokens.
    """
    ids = _ids(backbone)
    batch = pack([_trace(ids[:_PROMPT], ids[_PROMPT:]) for _ in lengths], backbone.device, share=False)
    last = torch.arange(_PROMPT, _LENGTH, device=backbone.device)
    positions = batch.positions.clone()
    for length, rows in zip(lengths, batch.label_rows.split(batch.loss_lengths), strict=True):
        positions[rows] = last + (length - _LENGTH)
    with _rotations(backbone) as given:
        states = one_pass(backbone, replace(batch, positions=positions))
    given = [tensor for tensor in given if tensor.ndim > 1 and tensor.shape[-2] == len(states)]
    return [
        _Reading(states=states[rows], rotations=[tensor[..., rows, :] for tensor in given])
        for rows in batch.label_rows.split(batch.loss_lengths)
    ]


@contextmanager
def _rotations(backbone: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what the model's rotary embeddings return while the block runs."""
    found: list[torch.Tensor] = []

    def keep(module, inputs, output) -> None:
        found.extend(output if isinstance(output, tuple) else [output])

    hooks = [m.register_forward_hook(keep) for m in backbone.modules() if "rotary" in type(m).__name__.lower()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _narrow_window(config) -> Iterator[None]:
    """A model that masks by its configuration's window, as ours does, now masks by a narrow one."""
    window, config.sliding_window = config.sliding_window, _NARROW
    try:
        yield
    finally:
        config.sliding_window = window


def _ids(backbone: PreTrainedModel) -> list[int]:
    return [i % len(backbone.get_input_embeddings().weight) for i in range(_LENGTH)]


def _trace(prompt: Sequence[int], tokens: Sequence[int]) -> Trace:
    return Trace(group=0, kind=Kind.POLICY, prompt_tokens=tuple(prompt), tokens=tuple(tokens), text="")


def _difference(
    found: torch.Tensor, alone: torch.Tensor, what: str = "states", tolerance: float = _TOLERANCE
) -> str | None:
    error = (found - alone).abs().max() / alone.abs().max().clamp_min(1e-6)
    return None if error <= tolerance else f"its {what} differ by {100 * error.item():.3g} %"  # NaN is an error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
