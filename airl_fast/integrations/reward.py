"""A trained discriminator as a reward for completions that another trainer sampled.

`AIRLRewardFunction` has the signature of a TRL reward function and needs no TRL itself. Its policy may have another
tokenizer than the discriminator's run: rewards come back to the policy's tokens by the characters they share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from airl_fast.advantage import advantages
from airl_fast.artifacts import START, load_policy, load_reward
from airl_fast.bridge import Bridge
from airl_fast.data.task import make_task
from airl_fast.device import pick_device
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.judge.judge import bridge_from, locate_reward
from airl_fast.lab import make_maker
from airl_fast.measures.localise import TokenValues
from airl_fast.measures.rerank import Scorer, trace_scores
from airl_fast.models.check import verify_packing
from airl_fast.models.load import LanguageModel
from airl_fast.pack import pack
from airl_fast.saved import run_config
from airl_fast.traces import TraceMaker
from airl_fast.types import Example, Kind, Trace

Prompt = str | Sequence[Mapping[str, str]]  # a user's message, or TRL's conversation of [system,] user


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Completions and, behind them, the demonstrations given with them, as traces of the policy's tokens."""

    traces: tuple[Trace, ...]
    examples: tuple[Example, ...]
    maker: TraceMaker
    bridge: Bridge


class AIRLRewardFunction:
    """The reward of an AIRL run, one number a completion when called, one a token by `token_rewards`.

    run: a run's directory, or the directory of its reward model (RUN/final/discriminator). A copy of the latter
    elsewhere needs `run_directory`, whose configuration, task and start policy belong to the reward.
    score: how token rewards become a completion's: "mean", "last" token, "min_step" (the mean of the worst reasoning
    step) or "answer" (the discounted reward to go, averaged over the answer's tokens; None where no answer is given,
    which TRL leaves out of the baseline).
    tokenizer: the policy's, whose ids `completion_ids` holds; None for that of the run's own policy.
    device: None for the configured one. trust_remote_code: run the Python files that the run's model directories bring;
    what the run's own configuration says of that is not enough. Raises UserError for what cannot be loaded.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        score: Scorer = "mean",
        tokenizer: PreTrainedTokenizerBase | None = None,
        run_directory: str | Path | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if score not in get_args(Scorer):
            raise UserError(f"score={score!r} is unknown; choose {', '.join(get_args(Scorer))}.")
        root, directory = locate_reward(Path(run), None if run_directory is None else Path(run_directory))
        self.score, self.__name__ = score, f"airl_{score}"
        self.config = run_config(root, trust_remote_code=trust_remote_code)
        self.device = pick_device(self.config) if device is None else torch.device(device)
        data = self.config.data
        task = make_task(data.task, path=data.path, seed=self.config.seed, **data.options)
        start = load_policy(root / START, self.config.model, self.device)
        verify_packing(start, str(root / START))
        maker = make_maker(self.config, task, start)
        self.model: Discriminator
        self.model, own = load_reward(directory, self.config, maker, start, self.device)
        self.bridge = bridge_from(
            self.model, own, start.tokenizer, tokenizer, self.config, ends_of_policy(start, tokenizer)
        )

    # ---- TRL's reward function ----

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[object], completion_ids: Sequence[Sequence[int]], **_
    ) -> list[float | None]:
        """One reward a completion. completions are not read: their tokens say more than their decoded text."""
        judged = self.judge(prompts, completion_ids)
        return self.sequence_scores(judged, self.rewards(judged))

    # ---- token rewards and advantages ----

    def token_rewards(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, ...]:
        """f32 [len(ids)] for each completion: the dense reward of its tokens, the end-of-turn token included."""
        judged = self.judge(prompts, completion_ids)
        return self.rewards(judged).split([len(trace.tokens) for trace in judged.traces])

    def rewards(self, judged: Judged) -> torch.Tensor:
        """f32 [M], on the policy's tokens of all traces end to end, demonstrations last."""
        packed = judged.bridge.pack(judged.traces, judged.examples)
        return judged.bridge.to_policy(self.model.score(packed), judged.traces, judged.examples)

    def sequence_scores(self, judged: Judged, rewards: torch.Tensor) -> list[float | None]:
        """The completions' scores, without the demonstrations. rewards: f32 [M], as `rewards` gives them."""
        sampled = [trace for trace in judged.traces if trace.kind == Kind.POLICY]
        tokens = rewards.split([len(trace.tokens) for trace in judged.traces])[: len(sampled)]
        values = TokenValues.from_traces(
            [part.double().cpu().numpy() for part in tokens],
            [_flags(judged.maker.step_tokens(trace), trace) for trace in sampled],
            [_flags(judged.maker.answer_tokens(trace), trace) for trace in sampled],
        )
        scores = trace_scores(values, self.score, gamma=self.config.advantage.gamma)
        return [float(score) if np.isfinite(score) else None for score in scores]

    def token_advantages(self, judged: Judged, rewards: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """f32 [len(ids)] for each completion: rewards standardised within the prompt's group and summed backwards.

        Under the run's own `advantage` and `reward` settings (arXiv 2510.01857, section 3). A demonstration given
        with the prompt belongs to its group.
        """
        batch = pack(judged.traces, self.device, judged.maker.training_boundaries)
        values = advantages(rewards, batch, self.config.advantage, self.config.reward)
        lengths = [len(trace.tokens) for trace in judged.traces]
        sampled = sum(trace.kind == Kind.POLICY for trace in judged.traces)
        return values.split(lengths)[:sampled]

    def judge(
        self,
        prompts: Sequence[Prompt],
        completion_ids: Sequence[Sequence[int]],
        *,
        groups: Sequence[int] | None = None,
        experts: Sequence[str | None] | None = None,
    ) -> Judged:
        """The completions as traces. groups: which of them answer one prompt, numbered from 0; None: each its own.

        experts: the demonstration of each completion's prompt as text, one to a group counts; None has none.
        """
        groups = list(range(len(prompts))) if groups is None else list(groups)
        system, messages = _messages(prompts)
        maker = self.bridge.maker if system is None else replace(self.bridge.maker, system=system)
        examples: dict[int, Example] = {}
        for i, (group, message) in enumerate(zip(groups, messages, strict=True)):
            expert = None if experts is None else experts[i]
            examples.setdefault(group, Example(id=str(group), prompt=message, answer="", expert=expert))
        ordered = tuple(examples[group] for group in range(len(examples)))
        traces = [
            self._trace(maker, examples[group], group, ids) for group, ids in zip(groups, completion_ids, strict=True)
        ]
        traces += [maker.expert(example, group) for group, example in enumerate(ordered) if example.expert is not None]
        bridge = replace(self.bridge, maker=maker)
        return Judged(traces=tuple(traces), examples=ordered, maker=maker, bridge=bridge)

    def _trace(self, maker: TraceMaker, example: Example, group: int, ids: Sequence[int]) -> Trace:
        if not len(ids):
            raise UserError(
                "completion_ids holds an empty completion; the reward needs at least its end-of-turn token."
            )
        tokens = tuple(ids)
        return Trace(
            group=group,
            kind=Kind.POLICY,
            prompt_tokens=maker.prompt_tokens(example),
            tokens=tokens,
            text=maker.chat.decode(tokens),
            finished=tokens[-1] in maker.chat.ends,
        )


def ends_of_policy(start: LanguageModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """What ends a completion besides the template's end of turn: the token that TRL itself stops at, and, of the run's
    own tokenizer, what its policy lists."""
    if tokenizer is None:
        return set()  # the bridge's own format knows them
    same = tokenizer.backend_tokenizer.to_str() == start.tokenizer.backend_tokenizer.to_str()
    return {*({tokenizer.eos_token_id} - {None}), *(start.ends if same else ())}


def _messages(prompts: Sequence[Prompt]) -> tuple[str | None, list[str]]:
    """(the system message, if the prompts bring one, and every user message)."""
    systems, users = set(), []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        roles = [turn["role"] for turn in turns]
        if roles not in (["user"], ["system", "user"]) or not all(isinstance(t["content"], str) for t in turns):
            raise UserError(
                f"a prompt holds the turns {', '.join(roles)}; the reward reads one user message of text, "
                "after a system message or none."
            )
        systems.add(turns[0]["content"] if len(turns) == 2 else None)
        users.append(turns[-1]["content"])
    if len(systems) > 1:
        raise UserError("the prompts of one batch have different system messages; give all of them the same.")
    return next(iter(systems), None), users


def _flags(tokens: Sequence[int], trace: Trace) -> np.ndarray:
    flags = np.zeros(len(trace.tokens), dtype=bool)
    flags[list(tokens)] = True
    return flags
