"""Refuse to judge a reward on questions that it was trained on."""

from collections.abc import Iterable
from dataclasses import dataclass

from airl_fast.config import Config
from airl_fast.data.task import make_task
from airl_fast.errors import UserError

ALLOW = "--allow-training-prompts"


@dataclass(frozen=True, slots=True)
class TrainingPrompts:
    """The prompts of a run's training and warm-start splits, without regard to blanks and capitals."""

    keys: frozenset[str]

    def refuse(self, prompts: Iterable[tuple[str, str]]) -> None:
        """prompts: (place, prompt). UserError names the first that the run was trained on."""
        for place, prompt in prompts:
            if _key(prompt) in self.keys:
                raise UserError(
                    f"{place}: the run was trained on this question, so its figures would flatter; leave the trace "
                    f"out, or score it all the same with {ALLOW}."
                )


def training_prompts(config: Config) -> TrainingPrompts:
    """UserError when the training data is not where the run found it."""
    task = make_task(config.data.task, path=config.data.path, seed=config.seed, **config.data.options)
    try:
        examples = task.load("train")
        if config.warm_start.updates:
            examples = [*examples, *task.load("warmstart", config.warm_start.examples)]
    except UserError as error:
        raise UserError(
            f"the run's training questions cannot be compared with these: {error} Or skip the comparison with {ALLOW}."
        ) from None
    return TrainingPrompts(frozenset(_key(example.prompt) for example in examples))


def _key(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()
