"""Between the policy's tokens and the discriminator's. With one tokenizer there is nothing to do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import torch

from airl_fast.data.chat import ChatFormat
from airl_fast.data.spans import concat_span_maps, map_rewards, span_map
from airl_fast.models.regimes import ONE, Regimes
from airl_fast.pack import pack
from airl_fast.traces import TraceMaker
from airl_fast.types import Example, Trace, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """maker: of the policy's traces. chat: the discriminator's format, None when both share a tokenizer.

    Rewards come back to a policy token as the mean over the characters it shares with discriminator tokens, so they
    keep the scale of log-odds. Whichever of its ends a sample has, the discriminator reads the end of turn that its
    demonstrations have: which one it was would otherwise tell the two apart, and nothing else would be learned.
    """

    maker: TraceMaker
    chat: ChatFormat | None
    device: torch.device
    share: bool = True  # compute a prompt once for all traces that continue it
    regimes: Regimes = ONE  # of what reads the discriminator's batch

    def pack(self, traces: Sequence[Trace], examples: Sequence[Example]) -> TraceBatch:
        """The traces as the discriminator reads them. examples: the batch's prompts, indexed by a trace's group."""
        if self.chat is None:
            own = [self._with_own_end(trace) for trace in traces]
            return pack(own, self.device, self.maker.training_boundaries, share=self.share, regimes=self.regimes)
        maker = replace(self.maker, chat=self.chat)
        own = [self._own(trace, examples) for trace in traces]
        return pack(own, self.device, maker.training_boundaries, share=self.share, regimes=self.regimes)

    def to_policy(self, rewards: torch.Tensor, traces: Sequence[Trace], examples: Sequence[Example]) -> torch.Tensor:
        """Rewards of the packed traces, f32 [M'] on the discriminator's tokens -> f32 [M] on the policy's."""
        if self.chat is None:
            return rewards
        own = [self._own(trace, examples) for trace in traces]
        maps = [
            span_map(self._spans(mine, trace.text), self.maker.chat.token_char_spans(trace.text, trace.tokens))
            for mine, trace in zip(own, traces, strict=True)
        ]
        lengths = [len(trace.tokens) for trace in traces]
        joined = concat_span_maps(maps, [len(mine.tokens) for mine in own], lengths)
        return map_rewards(rewards, joined.to(rewards.device), sum(lengths))

    def _with_own_end(self, trace: Trace) -> Trace:
        tokens = self.maker.chat.with_own_end(trace.tokens)
        return trace if tokens == trace.tokens else replace(trace, tokens=tokens)

    def _own(self, trace: Trace, examples: Sequence[Example]) -> Trace:
        """The trace in the discriminator's tokens, with the text they spell, which a normalising tokenizer changes.

        The sampler's log-probabilities do not carry over.
        """
        prompt = self.chat.prompt_tokens(examples[trace.group].prompt, self.maker.system)
        tokens = self.chat.completion_tokens(trace.text, trace.finished)
        text = self.chat.decode(tokens)
        return replace(trace, prompt_tokens=tuple(prompt), tokens=tuple(tokens), text=text, logprobs=None)

    def _spans(self, mine: Trace, text: str) -> list[tuple[int, int]]:
        """The characters of `text`, the policy's, that each of the discriminator's tokens covers."""
        spans = self.chat.token_char_spans(mine.text, mine.tokens)
        if mine.text == text:
            return spans
        place: list[int] = []  # of every character of the discriminator's text in the policy's
        for _, i, i_end, j, j_end in SequenceMatcher(None, mine.text, text, autojunk=False).get_opcodes():
            place += [j + (k - i) * (j_end - j) // (i_end - i) for k in range(i, i_end)]
        place.append(len(text))
        return [(place[start], place[end]) for start, end in spans]
