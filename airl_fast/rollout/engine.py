"""What every sampler is: prompts as token ids in, completions as token ids with their log-probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from airl_fast.models.load import LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """tokens: completion ids, an end last when `finished`. logprobs: one a token, under the distribution it was
    drawn from (after temperature and top-p)."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy. end_token: the template's end of turn. other_ends: further tokens that end a sample.
    seed: the draws depend on it, the weights and the prompts alone."""

    temperature: float
    top_p: float
    max_new_tokens: int
    end_token: int
    seed: int
    batch_size: int
    other_ends: tuple[int, ...] = ()

    @property
    def ends(self) -> frozenset[int]:
        return frozenset((self.end_token, *self.other_ends))


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncStats:
    """How far the sampler is from the trainer on the probe, in nats a token.

    difference: mean |log π_sampler - log π_trainer|. moved: mean |change of log π_trainer| since the last check.
    """

    difference: float
    moved: float


class Engine(Protocol):
    """A sampler that follows the trained policy. It samples the weights of the last `push`."""

    @property
    def name(self) -> str:
        """What runs, for the log."""

    def sample(self, prompts: Sequence[Sequence[int]], per_prompt: int, params: SamplingParams) -> list[list[Sample]]:
        """`per_prompt` samples of each prompt, grouped by prompt, in the order given. No id without a token."""

    def push(self, lm: LanguageModel, version: str) -> None:
        """Take over the weights of `lm`. version: names them in messages, such as "step 12"."""

    def check(self, lm: LanguageModel, version: str) -> SyncStats | None:
        """Compare with `lm`, whose weights were pushed last; UserError when the sampler does not hold them.

        None where sampler and trainer share their weights, so that there is nothing to compare.
        """

    def close(self) -> None:
        """Give back what the engine holds; it cannot be used afterwards."""
