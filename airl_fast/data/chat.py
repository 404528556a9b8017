"""Prompts and completions as tokens, through the tokenizer's own chat template.

A conversation is `prompt tokens + completion tokens + end-of-turn`. The prompt is rendered with the generation
prompt; the completion is tokenised on its own, as the sampler would continue it; what the template writes after the
end-of-turn token (ChatML's newline) belongs to neither, because a completion that ended with it would shift every
reward by one token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from airl_fast.data.tags import format_trace
from airl_fast.data.token_bytes import TokenBytes
from airl_fast.errors import UserError

# A conversation to learn the layout from. Its characters are those of the smallest vocabulary, generated arithmetic.
_PROBE_PROMPT = "1 + 1?"
_PROBE_TRACE = format_trace("1 + 1 = 2", "2")


@dataclass(frozen=True)
class ChatFormat:
    """One tokenizer's way to write a conversation. Make it with `from_tokenizer`.

    end_of_turn: the token that closes an assistant message. anchor: text put before a completion while it is
    tokenised, "" except for tokenizers that write a blank before whatever they read first (Llama 2, Mistral).
    other_ends: further tokens that end a sampled completion (`LanguageModel.ends`); nothing is ever written with them.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    end_of_turn: int
    anchor: str
    _bytes: TokenBytes = field(repr=False, compare=False)
    other_ends: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> "ChatFormat":
        """Read the layout off the tokenizer's chat template by rendering a probe conversation.

        ends: the tokens that its model lists as ends, whether the template writes them or not. Raises UserError when
        the tokenizer is slow or has no template, or when the template does not keep the assistant's text as it is:
        then training would see other tokens than the sampler writes.
        """
        name = tokenizer.name_or_path or "given"
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {name!r} is not a fast one; save it with a tokenizer.json and try again.")
        if not tokenizer.chat_template:
            raise UserError(f"tokenizer {name!r} has no chat template; set model.chat_template.")
        token_bytes = TokenBytes.of(tokenizer)
        probe = cls(tokenizer, -1, "", token_bytes)
        prompt = probe._render(_messages(_PROBE_PROMPT, None), generate=True)
        # A bare answer first: a generation prompt that opens the think block would pass for the trace's own tag.
        bare, full = (
            probe._render(_messages(_PROBE_PROMPT, None, text), generate=False) for text in ("2", _PROBE_TRACE)
        )
        _check_verbatim(name, prompt, bare, full)
        suffix = full[len(prompt) + len(_PROBE_TRACE) :]
        anchor = "\n" if probe.decode(probe.completion_tokens("2", finished=False)) == " 2" else ""
        end = _end_of_turn(tokenizer, suffix, name)
        chat = cls(tokenizer, end, anchor, token_bytes, frozenset(ends) - {end})
        closing = tokenizer.convert_ids_to_tokens(chat.end_of_turn)
        chat._check_tokens(name, prompt + _PROBE_TRACE, closing if suffix.startswith(closing) else "")
        return chat

    @cached_property
    def ends(self) -> frozenset[int]:
        """Every token that ends a completion."""
        return self.other_ends | {self.end_of_turn}

    def prompt_tokens(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of the rendered prompt, generation prompt included; no other special tokens are added."""
        return self._encode(self._render(_messages(prompt, system), generate=True))

    def completion_tokens(self, text: str, finished: bool = True) -> list[int]:
        """Token ids of the text alone, then the end-of-turn token when `finished`.

        A text that spells an end out gets ordinary tokens for it: only a real end ends a trace. UserError where there
        are none, because the model lists ordinary text as an end.
        """
        skipped = len(self._encode(self.anchor))
        tokens = self._encode(self.anchor + text)[skipped:]
        if not self.ends.isdisjoint(tokens):
            tokens = self._encode(self.anchor + text, split_special_tokens=True)[skipped:]
            if not self.ends.isdisjoint(tokens):
                raise UserError(self._ordinary_end(text, tokens))
        return [*tokens, self.end_of_turn] if finished else tokens

    def with_own_end(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The same completion, ended by the template's end of turn where it ended by another."""
        tokens = tuple(tokens)
        return (*tokens[:-1], self.end_of_turn) if tokens and tokens[-1] in self.other_ends else tokens

    def name(self, token: int) -> str:
        """How a token is written in the vocabulary; its number where it has no place there."""
        return self.tokenizer.convert_ids_to_tokens(token) or f"<{token}>"

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of completion tokens; the token that ends them and anything after it are left out.

        Bytes that are no UTF-8 become U+FFFD. Other special tokens keep their spelling, so that text and tokens
        stay aligned.
        """
        return self._bytes.decode(self._until_end(tokens))

    def token_char_spans(self, text: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """(start, end) in `text` of every token, in order; the one that ends them has the empty span at the end.

        A token that holds part of a multi-byte character covers that whole character, so such tokens overlap.
        Raises ValueError unless the tokens spell the text.
        """
        inside = self._until_end(tokens)
        spelt, spans = self._bytes.spans(inside)
        if spelt != text:
            raise ValueError(f"the tokens spell {spelt[:60]!r}…, not the text {text[:60]!r}…")
        return spans + [(len(text), len(text))] * (len(tokens) - len(inside))

    def _until_end(self, tokens: Sequence[int]) -> list[int]:
        tokens = list(tokens)
        if self.ends.isdisjoint(tokens):
            return tokens
        return tokens[: next(i for i, token in enumerate(tokens) if token in self.ends)]

    def _ordinary_end(self, text: str, tokens: Sequence[int]) -> str:
        end = next(token for token in tokens if token in self.ends)
        return (
            f"the model lists {self.name(end)!r} as an end (eos_token_id in generation_config.json or config.json), "
            f"and the text {text[:60]!r} holds it as an ordinary token; take it off that list, or out of the text."
        )

    def _encode(self, text: str, split_special_tokens: bool = False) -> list[int]:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            verbose=False,  # lengths are checked against the model's context elsewhere
        )
        return encoded["input_ids"]

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except (TemplateError, TypeError, ValueError) as error:
            roles = " and ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template cannot render a conversation of {roles} ({error}); "
                "drop data.system or set model.chat_template."
            ) from error

    def _check_tokens(self, name: str, conversation: str, closing: str) -> None:
        """The tokens of the parts must be the tokens of the whole, at the seam with the prompt and at the end."""
        parts = self.prompt_tokens(_PROBE_PROMPT) + self.completion_tokens(_PROBE_TRACE, finished=bool(closing))
        if self._encode(conversation + closing) != parts:
            raise UserError(
                f"tokenizer {name!r} reads a completion differently on its own and after the prompt; let its chat "
                "template end the generation prompt with a newline or a special token (model.chat_template)."
            )
        if self.decode(self.completion_tokens(_PROBE_TRACE)) != _PROBE_TRACE:
            raise UserError(f"tokenizer {name!r} does not give a trace back after encoding and decoding; use another.")


def _messages(prompt: str, system: str | None, completion: str | None = None) -> list[dict[str, str]]:
    written = [("system", system), ("user", prompt), ("assistant", completion)]
    return [{"role": role, "content": content} for role, content in written if content is not None]


def _check_verbatim(name: str, prompt: str, bare: str, full: str) -> None:
    if not bare.startswith(prompt):
        raise UserError(
            f"the chat template of tokenizer {name!r} writes a generation prompt that its finished conversations lack; "
            "set model.chat_template to one that renders both alike."
        )
    if not full.startswith(prompt + _PROBE_TRACE):
        raise UserError(
            f"the chat template of tokenizer {name!r} strips or rewrites the assistant's text (tags, blanks); "
            "set model.chat_template to one that keeps it as it is."
        )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, suffix: str, name: str) -> int:
    """The first special token the template writes after an assistant message, else the end-of-sequence token."""
    special = {*tokenizer.all_special_ids, *_special_added_tokens(tokenizer)}
    for token in tokenizer(suffix, add_special_tokens=False)["input_ids"]:
        if token in special:
            if not suffix.startswith(tokenizer.convert_ids_to_tokens(token)):
                break
            return token
    if suffix.strip() or tokenizer.eos_token_id is None:
        raise UserError(
            f"the chat template of tokenizer {name!r} does not end an assistant message with a special token; "
            "set model.chat_template to one that writes the end-of-turn token right after the text."
        )
    return tokenizer.eos_token_id


def _special_added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
