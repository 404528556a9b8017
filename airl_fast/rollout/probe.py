"""The sync sentinel: does the sampler hold the weights that the trainer has?

Both score the same few completions after every push. Two things are asked of the sampler's log-probabilities s and
the trainer's t:

- they are near each other: mean |s - t| within `rollout.sync_ceiling`. That finds a sampler that is plainly wrong.
- they move together. Rounding differs between the two (much in bfloat16), so a sampler that missed a small update is
  *near* all the same. But what it missed is exactly the trainer's movement. From a reference push on, the changes Δs
  and Δt must agree: mean |Δs - Δt| ≤ 4 ρ + mean |Δt| / 10, where the rounding ρ is mean |s - t| at the reference. A
  sampler that missed an update has Δs = 0; one that took part of the weights lacks their part of the movement. In
  float32 ρ is about 1e-6, and any update shows. In bfloat16 the movement has to exceed the rounding first: the
  reference stays until the trainer has moved by 8 ρ, so that small steps add up. An answer that is the same to the
  bit though the trainer moved needs no such patience.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from airl_kernels import linear_logprob

from airl_fast.errors import UserError
from airl_fast.models.load import LanguageModel
from airl_fast.rollout.engine import SyncStats

_RESOLVED = 8.0  # the reference moves up when the trainer has moved by this many times the rounding
_TOLERANCE = 4.0  # times the rounding: it changes sign and size as the weights move
_SHARE = 0.1  # of the movement: bfloat16 adapters, and a trainer on 4-bit weights, move a little differently
_FINEST = 1e-6  # nats; float32 rounds a log-probability of a few nats by about this much
_VISIBLE = 1e-3  # nats; a movement of the trainer that cannot leave every bit of a sampler's answers as it was


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One probe: a prompt's ids and the ids of the completion whose log-probabilities are compared."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(slots=True)
class Sentinel:
    """Judges the log-probabilities of the probes, f32 [M] over all their completion tokens, after each push."""

    ceiling: float
    _reference: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)
    _last: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)

    def judge(self, trainer: torch.Tensor, sampler: torch.Tensor, version: str) -> SyncStats:
        """UserError when the sampler does not hold the trainer's weights. `version` names them."""
        difference = _mean(sampler - trainer)
        if not difference <= self.ceiling:  # a NaN is no agreement either
            raise UserError(
                f"the sampler is out of step with the policy at {version}: their log-probabilities differ by "
                f"{difference:.3g} nats a token, more than rollout.sync_ceiling={self.ceiling:g}; continue from the "
                "last checkpoint with --resume auto."
            )
        if self._reference is None:
            self._reference = self._last = (trainer, sampler)
            return SyncStats(difference=difference, moved=0.0)
        moved, stuck = _mean(trainer - self._last[0]), torch.equal(sampler, self._last[1])
        since, followed = trainer - self._reference[0], sampler - self._reference[1]
        rounding = max(_mean(self._reference[1] - self._reference[0]), _FINEST)
        apart = _mean(followed - since)
        if (stuck and moved > _VISIBLE) or apart > _TOLERANCE * rounding + _SHARE * _mean(since):
            raise UserError(
                f"the sampler is stale at {version}: the policy's log-probabilities moved by {_mean(since):.3g} nats a "
                f"token and the sampler's by {_mean(followed):.3g}, {apart:.3g} apart; continue from the last "
                "checkpoint with --resume auto."
            )
        self._last = (trainer, sampler)
        if _mean(since) > _RESOLVED * rounding:
            self._reference = self._last
        return SyncStats(difference=difference, moved=moved)


@torch.no_grad()
def trainer_logprobs(lm: LanguageModel, probes: Sequence[Scored]) -> torch.Tensor:
    """log π(token) of every completion token of the probes, one probe after the other, f32 [M] on the CPU.

    A plain forward of one probe at a time: it shares nothing with the packing of the training step.
    """
    found = []
    for probe in probes:
        tokens = torch.tensor([[*probe.prompt, *probe.completion]], device=lm.device)
        hidden = lm.backbone(input_ids=tokens, use_cache=False).last_hidden_state[0]
        hidden = hidden[len(probe.prompt) - 1 : -1].contiguous()
        labels = tokens[0, len(probe.prompt) :]
        found.append(linear_logprob(hidden, targets=labels, **lm.projection))
    return torch.cat(found).float().cpu()


def _mean(difference: torch.Tensor) -> float:
    return difference.abs().mean().item()
