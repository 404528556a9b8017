"""Sample policies on held-out prompts and say how often they are right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from airl_fast.batches import sample_traces
from airl_fast.lab import Lab
from airl_fast.models.load import LanguageModel
from airl_fast.types import Example, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """P prompts and n traces of each, prompt after prompt; a trace's group is its prompt. correct: bool [P, n]."""

    examples: tuple[Example, ...]
    traces: tuple[Trace, ...]
    per_prompt: int

    @property
    def correct(self) -> np.ndarray:
        return np.array([bool(trace.correct) for trace in self.traces]).reshape(-1, self.per_prompt)

    @property
    def prompts(self) -> np.ndarray:
        """int64 [P * n]: the prompt of each trace."""
        return np.array([trace.group for trace in self.traces])


def sample_policy(lab: Lab, lm: LanguageModel, examples: Sequence[Example], per_prompt: int, purpose: str) -> Samples:
    """`per_prompt` samples of `lm`, by the engine that the run trains with."""
    lab.engine.push(lm, purpose)
    lab.engine.check(lm, purpose)
    traces = sample_traces(lab, examples, per_prompt, 0, purpose)
    return Samples(examples=tuple(examples), traces=tuple(traces), per_prompt=per_prompt)
