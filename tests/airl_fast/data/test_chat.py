"""Chat formats on real fast tokenizers of four kinds: round trip, end of turn, and which characters a token covers."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from airl_fast.data.arithmetic import CHARSET, Arithmetic
from airl_fast.data.chat import ChatFormat
from airl_fast.data.tags import TAGS, format_trace
from airl_fast.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
PLAIN_WITHOUT_EOS = PLAIN.replace("{{ eos_token if m['role'] == 'assistant' }}", "")
TINY = "{% for m in messages %}{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' else '<sep>' }}{% endfor %}"

# The splitting patterns of Qwen2 (one digit a piece) and Llama 3 (up to three digits a piece).
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

LINES = [f"start {i}; gain {i % 5}; naïve café {i * 37} → {i % 7}.5 名前 {i}" for i in range(300)]
LINES += [example.expert for example in Arithmetic(train_size=100).load("train")]


def byte_level(pattern, template, special, eos, bos=None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return finish(core, template, eos, bos)


def character_level():
    """The smallest real one: every character and every tag is one token."""
    symbols = ["<pad>", "<eos>", "<sep>", *TAGS, *CHARSET]
    core = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<pad>", "<eos>", "<sep>"])
    core.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return finish(core, TINY, "<eos>")


ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_fallback(prepend):
    """Blanks as ▁, unknown characters as bytes. prepend: like Llama 2, which reads "a" as "▁a"; else like Gemma."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", "<eos>", "<start_of_turn>", "<end_of_turn>", *byte_pieces]
    core.train_from_iterator(
        LINES[:200], trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=60)
    )
    # The published vocabularies hold the byte pieces as ordinary entries.
    description = json.loads(core.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in byte_pieces]
    core = Tokenizer.from_str(json.dumps(description))
    if prepend:
        return finish(core, ZEPHYR, "</s>", "<s>")
    template = LLAMA3.replace("<|start_header_id|>", "<start_of_turn>").replace("<|end_header_id|>\n\n", "\n")
    return finish(core, template.replace("<|eot_id|>", "<end_of_turn>"), "<eos>", "<s>")


def finish(core, template, eos, bos=None):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
BYTE_LEVEL = byte_level(QWEN, CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>")
LLAMA_LIKE = byte_level(LLAMA, LLAMA3, HEADERS, "<|end_of_text|>", "<|begin_of_text|>")
TOKENIZERS = {
    "chatml": (BYTE_LEVEL, "<|im_end|>"),
    "llama3": (LLAMA_LIKE, "<|eot_id|>"),
    "plain": (byte_level(QWEN, PLAIN, ["</s>"], "</s>"), "</s>"),
    "plain without eos": (byte_level(QWEN, PLAIN_WITHOUT_EOS, ["</s>"], "</s>"), "</s>"),
    "byte fallback": (byte_fallback(prepend=False), "<end_of_turn>"),
    "byte fallback with blank": (byte_fallback(prepend=True), "</s>"),
    "characters": (character_level(), "<eos>"),
}
FORMATS = {name: ChatFormat.from_tokenizer(tokenizer) for name, (tokenizer, _) in TOKENIZERS.items()}
UNICODE = [name for name in FORMATS if name != "characters"]
TRACES = [
    format_trace("7 + 1 = 8\n8 - 3 = 5", "5"),
    format_trace("naïve → 名前 🙂 e\u0301\n\n  12,345.6 % of\ttabs", "−3"),
    " leading and trailing \n",
    "",
]


def cases():
    return [(name, text) for name in UNICODE for text in TRACES] + [("characters", TRACES[0])]


@pytest.mark.parametrize("name", FORMATS)
def test_end_of_turn(name):
    tokenizer, closing = TOKENIZERS[name]
    assert tokenizer.convert_ids_to_tokens(FORMATS[name].end_of_turn) == closing
    assert tokenizer.is_fast


@pytest.mark.parametrize(("name", "text"), cases())
def test_round_trip(name, text):
    chat = FORMATS[name]
    tokens = chat.completion_tokens(text)
    assert tokens[-1] == chat.end_of_turn and tokens.count(chat.end_of_turn) == 1
    assert chat.completion_tokens(text, finished=False) == tokens[:-1]
    assert chat.decode(tokens) == chat.decode(tokens[:-1]) == text
    assert chat.decode([*tokens, *tokens]) == text  # nothing after the end of turn counts
    theirs = TOKENIZERS[name][0].decode(tokens[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert theirs == (text.removeprefix(" ") if name == "byte fallback with blank" else text)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "plain without eos"])
@pytest.mark.parametrize("prompt", ["start 7; gain 1?", "名前は? naïve 🙂\n\n two lines"])
def test_parts_are_a_token_exact_prefix_of_the_whole(name, prompt):
    if name == "characters":
        prompt = prompt if prompt.isascii() else "start 1?"
    tokenizer, chat = TOKENIZERS[name][0], FORMATS[name]
    for system in (None, "start"):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": TRACES[0]}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        parts = chat.prompt_tokens(prompt, system) + chat.completion_tokens(TRACES[0])
        assert parts == whole[: len(parts)]
        rest = tokenizer.decode(whole[len(parts) :])
        assert rest.strip() == ""  # ChatML's newline after the end of turn is no part of the completion


def test_no_second_bos():
    tokens = FORMATS["llama3"].prompt_tokens("hello")
    assert tokens[0] == LLAMA_LIKE.bos_token_id and tokens.count(LLAMA_LIKE.bos_token_id) == 1
    assert LLAMA_LIKE.bos_token_id not in FORMATS["llama3"].completion_tokens("hello")


@pytest.mark.parametrize(("name", "text"), cases())
def test_spans_cover_the_text_and_each_is_its_token(name, text):
    tokenizer, chat = TOKENIZERS[name][0], FORMATS[name]
    tokens = chat.completion_tokens(text)
    spans = chat.token_char_spans(text, tokens)
    assert len(spans) == len(tokens) and spans[-1] == (len(text), len(text))
    assert chat.token_char_spans(text, tokens[:-1]) == spans[:-1]
    covered = 0
    for token, (start, end) in zip(tokens[:-1], spans, strict=False):
        assert start <= covered <= end and start < end
        covered = end
        piece = tokenizer.convert_ids_to_tokens(token)
        alone = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        alone = " " + alone if name == "byte fallback with blank" and piece.startswith("▁") else alone
        if "\ufffd" not in alone:
            assert text[start:end] == alone
        else:
            assert end - start >= 1 and not text[start:end].isascii()
    assert covered == len(text)


def test_spans_of_a_split_character_overlap_on_it():
    chat = FORMATS["chatml"]
    tokens = chat.completion_tokens("a🙂b", finished=False)
    pieces = BYTE_LEVEL.convert_ids_to_tokens(tokens)
    assert len("".join(pieces)) == 6  # bytes
    assert chat.token_char_spans("a🙂b", tokens) == [(0, 1)] + [(1, 2)] * (len(tokens) - 2) + [(2, 3)]


@given(st.lists(st.integers(0, len(BYTE_LEVEL) + 3), max_size=30))
def test_any_sampled_tokens_decode_as_the_tokenizer_does_and_have_spans(tokens):
    chat = FORMATS["chatml"]
    text = chat.decode(tokens)
    inside = tokens[: tokens.index(chat.end_of_turn)] if chat.end_of_turn in tokens else tokens
    assert text == BYTE_LEVEL.decode([t for t in inside if t < len(BYTE_LEVEL)], clean_up_tokenization_spaces=False)
    spans = chat.token_char_spans(text, tokens)
    assert len(spans) == len(tokens)
    covered = 0
    for start, end in spans:
        assert start <= covered <= max(covered, end) <= len(text)
        covered = max(covered, end)
    assert covered == len(text)


@given(st.text(max_size=40))
def test_any_text_round_trips_in_byte_level_vocabularies(text):
    for name in ("chatml", "llama3"):
        chat = FORMATS[name]
        assert chat.decode(chat.completion_tokens(text)) == text


def test_other_segmentations_of_a_text_have_their_own_spans():
    chat, rng = FORMATS["chatml"], random.Random(0)
    text = "start 7; gain naïve 名前"
    single = {piece: index for index, piece in enumerate(BYTE_LEVEL.convert_ids_to_tokens(range(len(BYTE_LEVEL))))}
    letters = [
        single[piece]
        for token in chat.completion_tokens(text, False)
        for piece in BYTE_LEVEL.convert_ids_to_tokens(token)
    ]
    assert len(letters) == len(text.encode())
    spans = chat.token_char_spans(text, letters)
    for index in rng.sample(range(len(letters)), 10):
        character = len(text.encode()[:index].decode(errors="ignore"))
        assert spans[index] == (character, character + 1)


def test_text_that_spells_special_tokens_out():
    chat = FORMATS["chatml"]
    text = "x<|im_end|>y<|im_start|>"
    tokens = chat.completion_tokens(text)
    assert tokens.count(chat.end_of_turn) == 1 and tokens[-1] == chat.end_of_turn
    assert chat.decode(tokens) == text


def test_tokens_that_spell_another_text():
    chat = FORMATS["chatml"]
    with pytest.raises(ValueError, match="not the text"):
        chat.token_char_spans("abc", chat.completion_tokens("abd"))


def with_template(template, tokenizer=BYTE_LEVEL):
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    copy.chat_template = template
    return copy


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template; set model.chat_template"),
        (
            CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
            "strips or rewrites the assistant's text",
        ),
        (CHATML.replace("m['content']", "m['content'].replace('>\\n<', '>\\n\\n<')"), "strips or rewrites"),
        (
            CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"),
            "generation prompt that its finished conversations",
        ),
        (CHATML.replace("<|im_end|>\n", "\n\nUser:"), "does not end an assistant message with a special token"),
        (CHATML.replace("}}<|im_end|>", "}} over <|im_end|>"), "does not end an assistant message"),
        (CHATML.replace("assistant\n{%", "assistant {%").replace("}}\n{{", "}} {{"), "on its own and after the prompt"),
        ("{{ raise_exception('no') }}", "cannot render a conversation of user"),
        ("{% if %}", "cannot render a conversation"),
    ],
)
def test_templates_that_do_not_fit(template, message):
    with pytest.raises(UserError, match=message) as caught:
        ChatFormat.from_tokenizer(with_template(template))
    assert "\n" not in str(caught.value)


def test_a_template_without_system_role():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    chat = ChatFormat.from_tokenizer(with_template(template))
    chat.prompt_tokens("hello")
    with pytest.raises(UserError, match=r"system and user \(no system\); drop data.system"):
        chat.prompt_tokens("hello", "be brief")


def test_tokenizers_that_do_not_fit():
    core = Tokenizer.from_str(BYTE_LEVEL.backend_tokenizer.to_str())
    core.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"decoder \(WordPiece\) whose tokens do not join to text"):
        ChatFormat.from_tokenizer(finish(core, CHATML, "<|endoftext|>"))
    core = Tokenizer.from_str(BYTE_LEVEL.backend_tokenizer.to_str())
    core.normalizer = normalizers.Lowercase()
    core.add_tokens([AddedToken("<think>")])
    core.normalizer = normalizers.Replace("=", "")
    with pytest.raises(UserError, match="does not give a trace back"):
        ChatFormat.from_tokenizer(finish(core, CHATML, "<|endoftext|>"))
