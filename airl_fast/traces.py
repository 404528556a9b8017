"""Make traces: demonstrations, decoded samples and perturbed copies, all as tokens of one tokenizer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from airl_fast.config import RewardConfig
from airl_fast.data.chat import ChatFormat
from airl_fast.data.tags import answer_span
from airl_fast.data.task import Task
from airl_fast.errors import UserError
from airl_fast.pack import Boundaries
from airl_fast.rollout.engine import Sample
from airl_fast.types import Example, Kind, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMaker:
    task: Task
    chat: ChatFormat
    reward: RewardConfig
    system: str | None = None

    def prompt_tokens(self, example: Example) -> tuple[int, ...]:
        return tuple(self.chat.prompt_tokens(example.prompt, self.system))

    def expert(self, example: Example, group: int) -> Trace:
        """The demonstration of a prompt that has one.

        Its text is what its tokens spell: a tokenizer that normalises (Qwen2's composes accents) reads another text
        than was written.
        """
        tokens = tuple(self.chat.completion_tokens(example.expert, True))
        return Trace(
            group=group,
            kind=Kind.EXPERT,
            prompt_tokens=self.prompt_tokens(example),
            tokens=tokens,
            text=self.chat.decode(tokens),
            correct=True,
        )

    def sampled(self, example: Example, group: int, sample: Sample) -> Trace:
        """A sample under its own token ids: text is decoded for the verifier, never tokenised again."""
        text = self.chat.decode(sample.tokens)
        return Trace(
            group=group,
            kind=Kind.POLICY,
            prompt_tokens=self.prompt_tokens(example),
            tokens=sample.tokens,
            text=text,
            finished=sample.finished,
            logprobs=sample.logprobs,
            correct=sample.finished and self.task.verify(example, text),
        )

    def perturbed(
        self, example: Example, source: Trace, pair: int, rng: random.Random, propagate: float
    ) -> Trace | None:
        """A broken copy of `source`, which stands at `pair` in the list both travel in; None when nothing applies.

        propagate: probability that the error is carried through the steps after it. A sample whose text the tokenizer
        would normalise, or whose pieces spell a token that ends traces, has no broken copy: its tokens would differ
        where nothing was broken.
        """
        change = self.task.perturb(example, source.text, rng, propagate_rate=propagate)
        if change is None:
            return None
        try:
            tokens = tuple(self.chat.completion_tokens(change.text, source.finished))
        except UserError:
            return None
        if self.chat.decode(tokens) != change.text:
            return None
        return replace(
            source,
            kind=Kind.PERTURBED,
            tokens=tokens,
            text=change.text,
            logprobs=None,
            pair=pair,
            first_changed=change.first_changed,
            correct=False,
        )

    @property
    def training_boundaries(self) -> Callable[[Trace], Boundaries] | None:
        """`boundaries` when the rewards ask for them; dense ones do not, and finding them costs time."""
        return None if self.reward.granularity == "dense" else self.boundaries

    def boundaries(self, trace: Trace) -> Boundaries:
        """Where the steps (or every n tokens, `reward.interval`) and the think and answer blocks of a trace end."""
        if self.reward.interval:
            steps = tuple(range(self.reward.interval - 1, len(trace.tokens), self.reward.interval))
        else:
            steps = self.step_tokens(trace)
        closing = sorted(trace.text.find(tag) + len(tag) for tag in ("</think>", "</answer>") if tag in trace.text)
        return Boundaries(steps=steps, blocks=self._tokens_at(trace, closing))

    def step_tokens(self, trace: Trace, ends: Sequence[int] | None = None) -> tuple[int, ...]:
        """The index of the token that holds each step's last character; the end-of-turn token joins the last step.

        ends: character offsets one past the end of each step; None for the task's.
        """
        steps = self._tokens_at(trace, self.task.step_ends(trace.text) if ends is None else ends)
        return (*steps[:-1], len(trace.tokens) - 1)

    def token_at(self, trace: Trace, end: int) -> int:
        """The token that holds the character before offset `end`: the last one when the text is shorter."""
        spans = self.chat.token_char_spans(trace.text, trace.tokens)
        return next((i for i, (_, stop) in enumerate(spans) if stop >= end), len(spans) - 1)

    def answer_tokens(self, trace: Trace) -> range:
        """The tokens that overlap the answer's content; empty when the trace names no answer."""
        span = answer_span(trace.text)
        if span is None:
            return range(0)
        spans = self.chat.token_char_spans(trace.text, trace.tokens)
        inside = [i for i, (start, end) in enumerate(spans) if start < span[1] and end > span[0]]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def _tokens_at(self, trace: Trace, ends: Sequence[int]) -> tuple[int, ...]:
        """Indices of the tokens that hold the characters just before each offset, ascending and distinct."""
        spans = self.chat.token_char_spans(trace.text, trace.tokens)
        found, token = [], 0
        for end in ends:
            while token < len(spans) - 1 and spans[token][1] < end:
                token += 1
            if not found or found[-1] != token:
                found.append(token)
        return tuple(found)
