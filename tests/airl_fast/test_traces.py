"""Traces of real tokenizers: which token each reward belongs to, and where steps and blocks end."""

import random

import pytest
import torch
from tokenizers import normalizers

from airl_fast.config import DiscriminatorConfig, RewardConfig
from airl_fast.data.chat import ChatFormat
from airl_fast.data.task import make_task
from airl_fast.discriminator import Discriminator
from airl_fast.models.heads import make_head
from airl_fast.pack import pack
from airl_fast.rollout.builtin import Sample
from airl_fast.traces import TraceMaker
from airl_fast.types import Example, Kind, Trace
from tests.airl_fast.data.test_chat import CHATML, QWEN, TOKENIZERS, byte_level
from tests.airl_fast.model_cases import CPU, language_model, trace

TASK = make_task("arithmetic", train_size=12)
NAMES = ["chatml", "llama3", "plain", "byte fallback with blank"]
TEXT = "<think>\n7 + 1 = 8\n8 - 3 = 5\n</think>\n<answer>5</answer>"
EXAMPLE = Example(id="x", prompt="start 7; gain 1; lose 3?", answer="5", expert=TEXT)


def maker_of(name: str, **reward) -> TraceMaker:
    chat = ChatFormat.from_tokenizer(TOKENIZERS[name][0])
    return TraceMaker(task=TASK, chat=chat, reward=RewardConfig(**reward))


def sampled(maker: TraceMaker, tokens, finished=True) -> Trace:
    sample = Sample(tokens=tuple(tokens), logprobs=tuple(-0.1 * i for i in range(len(tokens))), finished=finished)
    return maker.sampled(EXAMPLE, 0, sample)


def spelt(maker: TraceMaker, found: Trace, indices) -> list[str]:
    """The characters of the given tokens."""
    spans = maker.chat.token_char_spans(found.text, found.tokens)
    return [found.text[slice(*spans[i])] for i in indices]


# ---- alignment: the rendered conversation as the tokenizer and the model see it ----


def whole_conversation(name: str, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of the conversation rendered by the template in one piece, and the positions of the completion's.

    The positions come from the tokenizer's own character offsets in the rendered text; the end-of-turn token is the
    first after the assistant's text.
    """
    tokenizer, closing = TOKENIZERS[name]
    messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.expert}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    begin = rendered.rindex(example.expert)
    end = begin + len(example.expert)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a >= begin and b <= end and b > a]
    closed = inside[-1] + 1
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][closed]) == closing
    return encoded["input_ids"], [*inside, closed]


def models_of(name: str, architecture: str, head: str) -> tuple[Discriminator, torch.nn.Module]:
    vocab_size = len(TOKENIZERS[name][0])
    backbone = language_model(architecture, vocab_size, seed=3).model.base_model
    torch.manual_seed(2)
    made = make_head(head, backbone, 0)
    return Discriminator(backbone, made, DiscriminatorConfig(head=head), RewardConfig()), backbone


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_the_linear_head_reads_the_state_after_each_token_and_the_action_head_before(name, architecture):
    maker = maker_of(name)
    traces = [maker.expert(example, g) for g, example in enumerate(TASK.load("train", 4))]
    batch = pack(traces, CPU)
    for head in ("linear", "action"):
        model, backbone = models_of(name, architecture, head)
        ours = model.logits(batch).split(batch.loss_lengths)
        for example, found, z in zip(TASK.load("train", 4), traces, ours, strict=True):
            tokens, positions = whole_conversation(name, example)
            assert tuple(tokens[p] for p in positions) == found.tokens  # the end of turn counts
            states = backbone(input_ids=torch.tensor([tokens])).last_hidden_state[0].detach()
            if head == "linear":
                expected = torch.stack([states[p] @ model.head.weight for p in positions])
            else:
                expected = torch.stack([states[p - 1] @ model.head.weight[tokens[p]] for p in positions])
            torch.testing.assert_close(z, expected.detach(), atol=1e-4, rtol=1e-4)
            # The known mistake: the last rewards of the conversation, cut from the right.
            every = states @ model.head.weight if head == "linear" else None
            if every is not None:
                from_the_right = every[-len(positions) :].detach()
                shifted = (from_the_right - z).abs().max() > 0.1
                assert shifted == (name != "llama3")  # the other templates write a newline after the end of turn


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_lands_on_the_characters_of_its_token(name):
    """A head that returns the token's own id says which token each reward was read at."""
    maker = maker_of(name)
    found = maker.expert(EXAMPLE, 0)
    batch = pack([found], CPU)
    model, _ = models_of(name, "qwen2", "action")
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(len(model.head.bias)))
    z = model.logits(batch).long().tolist()
    tokenizer, closing = TOKENIZERS[name]
    assert tokenizer.convert_ids_to_tokens(z[-1]) == closing
    assert maker.chat.decode(z) == TEXT
    answer = maker.answer_tokens(found)
    assert maker.chat.decode(z[answer.start : answer.stop]) == "5"


# ---- demonstrations, samples, broken copies ----


@pytest.mark.parametrize("name", NAMES)
def test_a_demonstration(name):
    maker = maker_of(name)
    found = maker.expert(EXAMPLE, 3)
    assert (found.group, found.kind, found.text, found.correct, found.finished) == (3, Kind.EXPERT, TEXT, True, True)
    assert found.prompt_tokens == tuple(maker.chat.prompt_tokens(EXAMPLE.prompt))
    assert found.tokens[-1] == maker.chat.end_of_turn and found.logprobs is None


def test_a_sample_keeps_its_own_tokens():
    """Another segmentation of the same text than the tokenizer's: it was sampled, so it stays."""
    maker = maker_of("chatml")
    tokenizer = TOKENIZERS["chatml"][0]
    single = {piece: i for i, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))}
    pieces = tokenizer.convert_ids_to_tokens(maker.chat.completion_tokens(TEXT, finished=False))
    letters = [single[character] for piece in pieces for character in piece]
    assert len(letters) > len(pieces)
    found = sampled(maker, [*letters, maker.chat.end_of_turn])
    assert found.tokens == (*letters, maker.chat.end_of_turn) and found.text == TEXT
    assert found.correct and found.kind == Kind.POLICY and len(found.logprobs) == len(found.tokens)
    assert spelt(maker, found, maker.answer_tokens(found)) == ["5"]
    assert not sampled(maker, [*maker.chat.completion_tokens(TEXT.replace(">5<", ">6<"))]).correct
    cut = sampled(maker, letters, finished=False)  # right so far, but it never ended its turn
    assert cut.text == TEXT and not cut.correct


def test_a_broken_copy_keeps_its_prompt_and_remembers_where_it_broke():
    maker, rng = maker_of("chatml"), random.Random(0)
    for g, example in enumerate(TASK.load("train")):
        source = maker.expert(example, g)
        copy = maker.perturbed(example, source, 7, rng, 0.5)
        assert (copy.group, copy.kind, copy.pair, copy.correct, copy.logprobs) == (g, Kind.PERTURBED, 7, False, None)
        assert copy.prompt_tokens == source.prompt_tokens
        assert copy.text != source.text and maker.chat.decode(copy.tokens) == copy.text
        assert not TASK.verify(example, copy.text) or TASK.first_wrong_step(example, copy.text) is not None
        first = copy.first_changed
        assert copy.text[:first] == source.text[:first] and copy.text[first] != source.text[first]
        assert copy.tokens[-1] == maker.chat.end_of_turn
    nothing = Trace(group=0, kind=Kind.POLICY, prompt_tokens=(1,), tokens=(2,), text="?")
    assert maker.perturbed(EXAMPLE, nothing, 0, rng, 0.5) is None


def test_an_unfinished_source_has_an_unfinished_copy():
    maker = maker_of("chatml")
    source = sampled(maker, maker.chat.completion_tokens(TEXT, finished=False), finished=False)
    copy = maker.perturbed(EXAMPLE, source, 0, random.Random(1), 0.0)
    assert copy.tokens[-1] != maker.chat.end_of_turn and not copy.finished


# ---- steps and blocks ----


@pytest.mark.parametrize("name", NAMES)
def test_steps_end_at_newlines_and_blocks_at_their_tags(name):
    maker = maker_of(name, granularity="interval")
    found = maker.expert(EXAMPLE, 0)
    ends = maker.boundaries(found)
    last = len(found.tokens) - 1
    assert ends.steps[-1] == last and len(ends.steps) == 3
    # The opening tag joins the first step, the closing tag and the answer are the last, with the end of turn.
    covered = [spelt(maker, found, range(end + 1)) for end in ends.steps[:-1]]
    assert "".join(covered[0]).startswith("<think>\n7 + 1 = 8\n")
    assert "".join(covered[1]).startswith("<think>\n7 + 1 = 8\n8 - 3 = 5\n")
    holders = spelt(maker, found, ends.steps[:-1])
    assert all("\n" in piece for piece in holders)
    closing = spelt(maker, found, ends.blocks)
    assert len(closing) == 2 and all(">" in piece for piece in closing)
    spans = maker.chat.token_char_spans(TEXT, found.tokens)
    for index, tag in zip(ends.blocks, ("</think>", "</answer>"), strict=True):
        start, end = spans[index]
        assert start < TEXT.index(tag) + len(tag) <= end
    batch = pack([found], CPU, maker.boundaries)
    assert batch.step_ends.nonzero()[:, 0].tolist() == list(ends.steps)
    assert batch.block_ends.nonzero()[:, 0].tolist() == sorted({*ends.blocks, last})


def test_blocks_in_the_wrong_order_end_where_they_end():
    maker = maker_of("chatml", granularity="multiscale")
    text = "<answer>5</answer> then <think>\n7 + 1 = 8\n</think> so"
    found = sampled(maker, maker.chat.completion_tokens(text))
    spans = maker.chat.token_char_spans(text, found.tokens)
    ends = [text.index(tag) + len(tag) for tag in ("</answer>", "</think>")]
    assert [spans[i][0] < end <= spans[i][1] for i, end in zip(maker.boundaries(found).blocks, ends, strict=True)]
    assert len(maker.boundaries(found).blocks) == 2
    assert maker.boundaries(sampled(maker, maker.chat.completion_tokens("no tags"))).blocks == ()


def test_every_n_tokens():
    maker = maker_of("chatml", granularity="interval", interval=3)
    found = trace(maker.chat.completion_tokens("a b c d", finished=True))
    count = len(found.tokens)
    assert maker.boundaries(sampled(maker, found.tokens)).steps == tuple(range(2, count, 3))
    assert maker_of("chatml").training_boundaries is None  # dense rewards need none
    assert maker.training_boundaries == maker.boundaries


@pytest.mark.parametrize("text", ["", "\n", "7", "one. Two. Three", "a\nb\n\nc"])
def test_odd_texts_have_their_last_step_at_the_end_of_turn(text):
    maker = maker_of("chatml", granularity="multiscale")
    found = sampled(maker, maker.chat.completion_tokens(text))
    steps = maker.step_tokens(found)
    assert steps[-1] == len(found.tokens) - 1
    assert list(steps) == sorted(set(steps))
    assert maker.answer_tokens(found) == range(0)
    pack([found], CPU, maker.boundaries)


def test_answers_are_found_by_their_characters():
    maker = maker_of("chatml")
    text = "<think>\n5 5\n</think>\n<answer>12,345 km</answer>"
    found = sampled(maker, maker.chat.completion_tokens(text))
    inside = maker.answer_tokens(found)
    assert "".join(spelt(maker, found, inside)) == "12,345 km"
    assert inside.stop < len(found.tokens) - 1


# ---- a tokenizer that normalises, as Qwen2's does ----


def composing() -> TraceMaker:
    tokenizer = byte_level(QWEN, CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return TraceMaker(
        task=TASK, chat=ChatFormat.from_tokenizer(tokenizer), reward=RewardConfig(granularity="multiscale")
    )


def test_text_and_tokens_agree_where_the_tokenizer_composes_accents():
    maker = composing()
    written = TEXT.replace("8\n8", "8 cafe\u0301\n8")
    found = maker.expert(Example(id="x", prompt="?", answer="5", expert=written), 0)
    assert found.text == written.replace("e\u0301", "\u00e9")
    assert len(maker.boundaries(found).steps) == 3
    assert spelt(maker, found, maker.answer_tokens(found)) == ["5"]


def test_a_sample_that_the_tokenizer_would_rewrite_is_scored_but_not_broken():
    maker = composing()
    plain = TOKENIZERS["chatml"][0]  # the same vocabulary without the normaliser
    accent = plain("e\u0301", add_special_tokens=False)["input_ids"]
    first, second = (
        maker.chat.completion_tokens(part, finished=False) for part in ("<think>\n7 + 1 = 8 caf", TEXT[17:])
    )
    found = sampled(maker, [*first, *accent, *second, maker.chat.end_of_turn])
    assert "e\u0301" in found.text and found.correct
    assert maker.boundaries(found).steps[-1] == len(found.tokens) - 1
    assert maker.perturbed(EXAMPLE, found, 0, random.Random(0), 0.0) is None
