"""Problems being worked on: every token that a method samples or has scored goes through here, and is counted."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from airl_fast.errors import UserError
from airl_fast.guided.records import Draft, Outcome, Problem
from airl_fast.judge.judge import Judge
from airl_fast.measures.localise import TokenValues
from airl_fast.measures.passk import Floats
from airl_fast.measures.rerank import Scorer, trace_scores
from airl_fast.models.regimes import Regimes
from airl_fast.rollout.engine import SamplingParams
from airl_fast.rollout.stepwise import Guide, Start, Streams, extend
from airl_fast.types import Example, Kind, Trace

_PROBES = ("a", "1")  # a sentence does not end before a small letter, "No." not before a number
_TRACES_AT_ONCE = 1024


class Session:
    """P problems, and the judge whose policy writes and whose discriminator reads.

    first: the place of the first problem among all, when they are worked on in parts; draws depend on the place.
    repeat: another set of draws for the same seed. generated, scored: int64 [P], see Outcome.
    """

    def __init__(
        self,
        judge: Judge,
        params: SamplingParams,
        problems: Sequence[Problem],
        *,
        first: int = 0,
        repeat: int = 0,
    ) -> None:
        self.judge, self.lm, self.params, self.problems = judge, judge.policy, params, tuple(problems)
        self.generated, self.scored = (np.zeros(len(problems), dtype=np.int64) for _ in range(2))
        # Without an answer: what scores and cuts traces cannot look at it.
        self._examples = tuple(Example(id=p.id, prompt=p.prompt, answer="") for p in problems)
        self._prompts = tuple(judge.maker.prompt_tokens(example) for example in self._examples)
        self._streams, self._first, self._repeat = Streams(params.seed), first, repeat
        self._certain: dict[str, tuple[int, ...]] = {}
        self._check_contexts()

    # ---- write ----

    def fresh(self, problem: int, slot: int) -> Draft:
        """An empty draft. Equal problems, slots and repeats draw equal tokens."""
        return Draft(problem=problem, slot=slot)

    def prompt(self, draft: Draft) -> tuple[int, ...]:
        return self._prompts[draft.problem]

    def to_end(self, drafts: Sequence[Draft], guide: Callable[[Sequence[Draft]], Guide] | None = None) -> list[Draft]:
        """Each draft until its turn is over or it has its limit. guide: what shifts the logits of these drafts."""
        if guide is not None:
            self._check_regimes()
        return self._extend(drafts, None, guide)

    def to_step(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Each draft until one more step has ended (the task's `step_ends`), or as `to_end`."""
        seen = [list(draft.tokens) for draft in drafts]
        before = [len(self._ends(self._text(tokens))) for tokens in seen]

        def stop(row: int, token: int) -> bool:
            seen[row].append(token)
            return len(self._ends(self._text(seen[row]))) > before[row]

        return self._extend(drafts, stop, None)

    # ---- read ----

    def read(self, drafts: Sequence[Draft]) -> TokenValues:
        """The discriminator's logit of every token in the closed part of each draft, on the policy's tokens."""
        traces = [self._trace(draft) for draft in drafts]
        judge = self.judge
        if judge.bridge.chat is not None and (why := judge.excess(traces, self._examples)):
            raise UserError(f"a trace of prompt {why}; lower --max-new-tokens.")
        for draft, trace in zip(drafts, traces, strict=True):
            self.scored[draft.problem] += len(trace.tokens)
        return judge.rewards(traces, self._examples)

    def score(self, drafts: Sequence[Draft], scorer: Scorer | None = None) -> Floats:
        """One number a draft, f64 [D], by the run's own scorer or another. Equal drafts are read once."""
        distinct: dict[tuple, int] = {}
        index = [distinct.setdefault((d.problem, d.tokens[: d.closed], d.finished), len(distinct)) for d in drafts]
        first = dict(zip(reversed(index), reversed(drafts), strict=True))
        ordered = [first[place] for place in range(len(distinct))]
        parts = [
            self.rate(self.read(ordered[i : i + _TRACES_AT_ONCE]), scorer)
            for i in range(0, len(ordered), _TRACES_AT_ONCE)
        ]
        return np.concatenate(parts)[index] if parts else np.zeros(0)

    def rate(self, values: TokenValues, scorer: Scorer | None = None) -> Floats:
        """One number a trace, f64 [S], from values that were read: by the run's own scorer or another."""
        config = self.judge.config
        return trace_scores(values, scorer or config.evaluate.scorer, gamma=config.advantage.gamma)

    @property
    def prefix_scorer(self) -> Scorer:
        """What compares unfinished drafts: the run's own scorer where it has a meaning on a prefix, else the mean."""
        own = self.judge.config.evaluate.scorer
        return own if own in ("min_step", "mean") else "mean"

    # ---- conclude ----

    def text(self, draft: Draft) -> str:
        return self._text(draft.tokens)

    def outcome(self, draft: Draft, score: float, details: Mapping[str, object]) -> Outcome:
        return Outcome(
            problem=self.problems[draft.problem],
            tokens=draft.tokens,
            text=self._text(draft.tokens),
            finished=draft.finished,
            score=float(score),
            generated=int(self.generated[draft.problem]),
            scored=int(self.scored[draft.problem]),
            details=details,
        )

    def best(self, drafts: Sequence[Draft], scores: Floats) -> list[int]:
        """For each problem the index of its highest-scored draft, the first of equals; each must have one."""
        found: list[int | None] = [None] * len(self.problems)
        for i, draft in enumerate(drafts):
            held = found[draft.problem]
            if held is None or scores[i] > scores[held]:
                found[draft.problem] = i
        return found

    # ---- within ----

    def _extend(self, drafts, stop, guide) -> list[Draft]:
        opened = [i for i, draft in enumerate(drafts) if not draft.done]
        starts = [
            Start(
                tokens=self._prompts[drafts[i].problem] + drafts[i].tokens,
                limit=self.params.max_new_tokens - len(drafts[i].tokens),
                stream=(self._first + drafts[i].problem, self._repeat, drafts[i].slot),
            )
            for i in opened
        ]
        samples = extend(
            self.lm,
            starts,
            self.params,
            self._streams,
            stop=None if stop is None else lambda start, token: stop(opened[start], token),
            guide=None if guide is None else lambda chosen: guide([drafts[opened[start]] for start in chosen]),
            regimes=self._regimes,
        )
        result = list(drafts)
        for i, sample in zip(opened, samples, strict=True):
            self.generated[drafts[i].problem] += len(sample.tokens)
            result[i] = self._continued(drafts[i], sample.tokens, sample.finished)
        return result

    def _continued(self, draft: Draft, more: tuple[int, ...], finished: bool) -> Draft:
        tokens = draft.tokens + more
        done = finished or len(tokens) >= self.params.max_new_tokens
        closed = len(tokens)
        if not done:
            text = self._text(tokens)
            whole = Trace(group=draft.problem, kind=Kind.POLICY, prompt_tokens=(0,), tokens=tokens, text=text)
            closed = self.judge.maker.token_at(whole, self._ends(text)[-1]) + 1
        return Draft(problem=draft.problem, slot=draft.slot, tokens=tokens, finished=finished, done=done, closed=closed)

    def _trace(self, draft: Draft) -> Trace:
        tokens = draft.tokens[: draft.closed]
        return Trace(
            group=draft.problem,
            kind=Kind.POLICY,
            prompt_tokens=self._prompts[draft.problem],
            tokens=tokens,
            text=self._text(tokens),
            finished=draft.finished,
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self.judge.maker.chat.decode(tokens)

    def _ends(self, text: str) -> tuple[int, ...]:
        """The step ends that no continuation can move."""
        if text not in self._certain:
            ends = (set(self.judge.task.step_ends(text + probe)) for probe in _PROBES)
            self._certain[text] = tuple(sorted(end for end in set.intersection(*ends) if end <= len(text)))
        return self._certain[text]

    @property
    def _regimes(self) -> Regimes:
        return self.lm.regimes | self.judge.model.regimes

    def _check_regimes(self) -> None:
        """UserError for a problem that a guide cannot follow: what it has read of a trace has the rotary factors of
        the length that the trace had."""
        for problem, prompt in zip(self.problems, self._prompts, strict=True):
            longest = len(prompt) + self.params.max_new_tokens
            if self._regimes.of(len(prompt)) != self._regimes.of(longest):
                raise UserError(
                    f"{problem.place}: --guided tokens reads a trace while it is written, but the models have other "
                    f"rotary factors {self._regimes}, between the prompt's {len(prompt)} tokens and {longest} with "
                    "--max-new-tokens; lower that, or use --guided steps."
                )

    def _check_contexts(self) -> None:
        """UserError for a problem whose prompt and completion do not fit the models' contexts."""
        readers = [("policy", self.lm.max_length)]
        if self.judge.bridge.chat is None:
            backbone = self.judge.model.backbone
            readers.append(("discriminator", backbone.config.get_text_config().max_position_embeddings))
        for name, context in readers:
            for problem, prompt in zip(self.problems, self._prompts, strict=True):
                if len(prompt) + self.params.max_new_tokens > context:
                    raise UserError(
                        f"{problem.place}: the prompt's {len(prompt)} tokens and {self.params.max_new_tokens} new ones "
                        f"exceed the {name}'s context of {context}; lower --max-new-tokens or leave the prompt out."
                    )
