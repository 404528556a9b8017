"""A model that lists several ends: each ends a sample, and whichever it was, the trace has ended."""

import dataclasses
import functools
import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from airl_fast.advantage import advantages
from airl_fast.artifacts import load_policy, save_policy
from airl_fast.batches import pack_for_policy, sample_traces
from airl_fast.bridge import Bridge
from airl_fast.config import RewardConfig
from airl_fast.data.chat import ChatFormat
from airl_fast.errors import UserError
from airl_fast.evaluate.policies import Samples
from airl_fast.evaluate.record import read_record, record_evaluation
from airl_fast.evaluate.reward import evaluate_reward
from airl_fast.export import export
from airl_fast.guided.records import Problem
from airl_fast.guided.session import Session
from airl_fast.guided.tokens import Reweighing
from airl_fast.integrations.reward import ends_of_policy
from airl_fast.judge.describe import token_texts
from airl_fast.judge.judge import open_judge
from airl_fast.lab import sampling_params
from airl_fast.models.ends import listed_ends
from airl_fast.pack import pack
from airl_fast.report.runs import RunData
from airl_fast.report.tokens import token_views
from airl_fast.rollout.builtin import sample
from airl_fast.rollout.engine import Sample, SamplingParams
from airl_fast.rollout.stepwise import Start, Streams, extend
from airl_fast.traces import TraceMaker
from airl_fast.types import Kind
from tests.airl_fast.adapter_cases import laboratory, model_directory
from tests.airl_fast.data.test_chat import BYTE_LEVEL, FORMATS, LLAMA_LIKE
from tests.airl_fast.model_cases import CPU, language_model
from tests.airl_fast.run_cases import small_run, train
from tests.airl_fast.test_rollout import PROMPTS
from tests.airl_fast.test_traces import EXAMPLE, TASK, TEXT

ENDS = (3, 8, 21)  # 8 also stands in a prompt
PARAMS = SamplingParams(
    temperature=1.0, top_p=1.0, max_new_tokens=32, end_token=3, other_ends=(8, 21), seed=1, batch_size=100
)
OTHER = BYTE_LEVEL.convert_tokens_to_ids("<|endoftext|>")
SEVERAL = ChatFormat.from_tokenizer(BYTE_LEVEL, [OTHER])


# ---- which ids are ends ----


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        (5, None, (5,)),
        ([9, 5, 9], 7, (5, 7, 9)),
        ([39, 40, 10**9, -1], 3, (3, 39)),  # the model has 40 ids
        ([True, None, "</s>", 6.0], [4], (4,)),
    ],
)
def test_ends_are_what_either_file_lists_and_a_sample_can_hold(generation, config, expected):
    lm = language_model()
    lm.model.generation_config = GenerationConfig()
    lm.model.generation_config.eos_token_id, lm.model.config.eos_token_id = generation, config
    assert lm.ends == expected
    lm.model.generation_config = None  # a backbone has none
    given = config if isinstance(config, list) else [config]
    assert listed_ends(lm.model, 40) == tuple(token for token in given if token is not None)


# ---- samplers ----


@pytest.fixture(scope="module", params=["qwen2", "llama", "gpt2"])
def lm(request):
    return language_model(request.param, seed=4, spread=0.25)


def generated(lm, prompt, ends, limit=PARAMS.max_new_tokens, pad=0):
    found = lm.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=limit, generation_config=GenerationConfig(eos_token_id=list(ends), pad_token_id=pad),
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pad", [0, 8])  # padding with a token that is itself an end changes nothing
def test_greedy_is_what_generate_does_with_several_ends(lm, pad):
    """Which token ends each answer is chosen from what the model writes, so that every end is met."""
    free = {tuple(prompt): generated(lm, prompt, [99]) for prompt in PROMPTS}
    ends = tuple(tokens[min(place, 9)] for place, tokens in enumerate(free.values(), 2))
    params = dataclasses.replace(PARAMS, temperature=0.0, end_token=ends[0], other_ends=ends[1:])
    drawn = sample(lm, PROMPTS, 2, params)
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        theirs = generated(lm, prompt, ends, pad=pad)
        for one in group:
            assert list(one.tokens) == theirs and one.finished and len(one.tokens) < 15
    only = sample(lm, PROMPTS, 1, dataclasses.replace(params, other_ends=()))
    assert max(len(one.tokens) for (one,) in only) == 32  # what ran on before


def test_any_end_ends_a_sample_and_none_in_a_prompt_does(lm):
    assert any(set(prompt) & set(ENDS) for prompt in PROMPTS)
    samples = [one for group in sample(lm, PROMPTS, 16, PARAMS) for one in group]
    for one in samples:
        assert one.finished == (one.tokens[-1] in ENDS) and not set(one.tokens[:-1]) & set(ENDS)
        assert one.finished or len(one.tokens) == 32
    assert {one.tokens[-1] for one in samples} >= set(ENDS)
    starts = [Start(tokens=tuple(p), limit=32, stream=(i, k)) for i, p in enumerate(PROMPTS) for k in range(16)]
    stepwise = extend(lm, starts, PARAMS, Streams(1))
    assert {one.tokens[-1] for one in stepwise if one.finished} == set(ENDS)
    assert all(one.finished == (one.tokens[-1] in ENDS) for one in stepwise)


# ---- text, steps and spans ----


def test_text_and_spans_are_those_of_the_template_s_own_end():
    tokens = SEVERAL.completion_tokens(TEXT, finished=False)
    for end in (SEVERAL.end_of_turn, OTHER):
        assert SEVERAL.decode([*tokens, end]) == SEVERAL.decode([*tokens, end, *tokens]) == TEXT
        spans = SEVERAL.token_char_spans(TEXT, [*tokens, end])
        assert spans[-1] == (len(TEXT), len(TEXT)) and spans[-2][1] == len(TEXT)
        assert SEVERAL.with_own_end([*tokens, end]) == (*tokens, SEVERAL.end_of_turn)
    assert SEVERAL.with_own_end(tokens) == tuple(tokens) and SEVERAL.with_own_end(()) == ()
    assert (SEVERAL.name(OTHER), SEVERAL.name(10**6)) == ("<|endoftext|>", "<1000000>")
    assert SEVERAL.completion_tokens(TEXT)[-1] == SEVERAL.end_of_turn  # demonstrations end as the template says
    assert FORMATS["chatml"].decode([*tokens, OTHER]) == TEXT + "<|endoftext|>"  # a format that does not know it


def test_a_text_that_spells_an_end_out_is_not_ended_by_it():
    text = "say <|endoftext|> and <|im_end|>"
    tokens = SEVERAL.completion_tokens(text)
    assert not set(tokens[:-1]) & SEVERAL.ends and SEVERAL.decode(tokens) == text


def test_an_end_that_is_ordinary_text_is_refused_where_it_stands():
    letter = BYTE_LEVEL.convert_tokens_to_ids("z")
    chat = ChatFormat.from_tokenizer(BYTE_LEVEL, [letter])
    assert chat.decode(chat.completion_tokens("x y")) == "x y"
    with pytest.raises(UserError, match=r"^the model lists 'z' as an end .* text 'x z' holds it .* out of the text\.$"):
        chat.completion_tokens("x z")
    maker = maker_of(chat)
    source = dataclasses.replace(maker.expert(EXAMPLE, 0), text="z 1 + 1 = 2")
    assert maker.perturbed(EXAMPLE, source, 0, random.Random(0), 0.0) is None


def maker_of(chat: ChatFormat, **reward) -> TraceMaker:
    return TraceMaker(task=TASK, chat=chat, reward=RewardConfig(**reward))


def ended_by(maker: TraceMaker, end: int):
    tokens = (*maker.chat.completion_tokens(TEXT, finished=False), end)
    return maker.sampled(EXAMPLE, 0, Sample(tokens=tokens, logprobs=(-0.5,) * len(tokens), finished=True))


def test_the_verifier_and_the_steps_see_an_ended_trace():
    maker = maker_of(SEVERAL)
    own, other = ended_by(maker, SEVERAL.end_of_turn), ended_by(maker, OTHER)
    assert other.tokens[-1] == OTHER and other.logprobs == own.logprobs
    assert (other.text, other.finished, other.correct) == (TEXT, True, True) == (own.text, own.finished, own.correct)
    assert maker.boundaries(other) == maker.boundaries(own) and maker.answer_tokens(other) == maker.answer_tokens(own)
    assert maker.step_tokens(other)[-1] == len(other.tokens) - 1
    broken = maker.perturbed(EXAMPLE, other, 0, random.Random(0), 0.0)
    assert broken.finished and broken.tokens[-1] == SEVERAL.end_of_turn


@pytest.mark.parametrize("reads", [None, "llama3"])
def test_the_discriminator_cannot_tell_by_the_end(reads):
    """It reads the end of turn of its own tokenizer either way; the policy's rewards fall on the end as sampled."""
    maker = maker_of(SEVERAL)
    chat = None if reads is None else FORMATS[reads]
    bridge = Bridge(maker=maker, chat=chat, device=CPU)
    own, other = ended_by(maker, SEVERAL.end_of_turn), ended_by(maker, OTHER)
    packed = [bridge.pack([trace], [EXAMPLE]) for trace in (own, other)]
    assert torch.equal(packed[0].tokens, packed[1].tokens) and torch.equal(packed[0].labels, packed[1].labels)
    assert packed[1].labels[-1] == (chat or SEVERAL).end_of_turn
    rewards = torch.arange(packed[1].num_loss_tokens, dtype=torch.float32)
    mapped = bridge.to_policy(rewards, [other], [EXAMPLE])
    assert len(mapped) == len(other.tokens) and mapped[-1] == rewards[-1]
    assert torch.equal(mapped, bridge.to_policy(rewards, [own], [EXAMPLE]))
    assert pack([other], CPU).labels[-1] == OTHER  # what the policy is trained on


def test_a_reader_with_other_specials_takes_the_end_for_its_own():
    assert "<|endoftext|>" not in LLAMA_LIKE.get_vocab()
    maker = maker_of(SEVERAL)
    batch = Bridge(maker=maker, chat=FORMATS["llama3"], device=CPU).pack([ended_by(maker, OTHER)], [EXAMPLE])
    assert FORMATS["llama3"].decode(batch.labels.tolist()) == TEXT
    assert LLAMA_LIKE.convert_ids_to_tokens(batch.labels[-1].item()) == "<|eot_id|>"


# ---- a reward that reads, guides and shows ----


@functools.cache
def judge_with_several():
    """The small run's, whose policy may also end with its padding."""
    judge = open_judge(small_run())
    chat = judge.maker.chat
    pad = chat.tokenizer.pad_token_id
    maker = dataclasses.replace(judge.maker, chat=dataclasses.replace(chat, other_ends=frozenset({pad})))
    return dataclasses.replace(judge, bridge=dataclasses.replace(judge.bridge, maker=maker)), pad


def test_guidance_gives_every_end_the_reward_of_the_end_of_turn():
    judge, pad = judge_with_several()
    example = judge.task.load("test", 1)[0]
    params = sampling_params(judge.config, judge.maker.chat, 0, "final-guided")
    assert params.other_ends == (pad,)
    session = Session(judge, params, [Problem(id="0", place="", prompt=example.prompt)])
    guide = Reweighing(session, [session.fresh(0, 0)], beta=1.0, top_k=10**6)
    logits = torch.randn(1, judge.policy.num_tokens, generator=torch.Generator().manual_seed(0))
    shift = guide.shift([0], logits) - logits
    own = shift[0, judge.maker.chat.end_of_turn]
    torch.testing.assert_close(shift[0, pad], own, atol=1e-5, rtol=0)
    assert (shift[0] - own).abs().median() > 0.05  # other tokens have rewards of their own


def test_a_judge_scores_it_as_ended_and_shows_how_it_did(tmp_path):
    judge, pad = judge_with_several()
    examples = judge.task.load("test", 1)
    text = examples[0].expert or TEXT
    tokens = tuple(judge.maker.chat.completion_tokens(text, finished=False))
    own, other = (
        judge.maker.sampled(examples[0], 0, Sample(tokens=(*tokens, end), logprobs=(-1.0,) * (len(tokens) + 1),
                                                   finished=True))
        for end in (judge.maker.chat.end_of_turn, pad)
    )  # fmt: skip
    mine, theirs = judge.score([own], examples), judge.score([other], examples)
    assert mine.reward.values.tolist() == theirs.reward.values.tolist()
    assert mine.logprob.values[:-1].tolist() == pytest.approx(theirs.logprob.values[:-1].tolist(), abs=1e-6)
    assert mine.logprob.values[-1] != theirs.logprob.values[-1]  # the policy's, of the token as sampled
    spans = judge.maker.chat.token_char_spans(other.text, other.tokens)
    assert token_texts(judge, other, spans)[-1] == "<|pad|>" and token_texts(judge, own, spans)[-1] == "<|end|>"
    samples = Samples(examples=tuple(examples), traces=(own, other), per_prompt=2)
    report = evaluate_reward(judge, samples, judge.task.load("train")[:8])
    record_evaluation(tmp_path / "r.jsonl.gz", "test", {"start": samples}, "<|end|>", judge, report)
    record, traces = read_record(tmp_path / "r.jsonl.gz")
    assert [t.end_token for t in traces if t.kind == "sample"] == [None, "<|pad|>"]
    run = RunData(name="r", path=tmp_path, config={}, metrics={}, summary=None, record=record, traces=tuple(traces),
                  missing=())  # fmt: skip
    shown = [t.get("endToken") for t in token_views([run])[0]["traces"] if t["k"] != "perturbed"]
    assert shown == [None, "<|pad|>"]


def test_trl_s_completions_end_with_what_trl_stops_at():
    """TRL stops at its tokenizer's end of sequence, which need not be what the template writes."""
    end = FORMATS["chatml"].end_of_turn
    assert ends_of_policy(language_model(tokenizer=LLAMA_LIKE), BYTE_LEVEL) == {BYTE_LEVEL.eos_token_id} == {OTHER}
    lm = language_model(vocab_size=len(BYTE_LEVEL), tokenizer=BYTE_LEVEL)
    lm.model.generation_config.eos_token_id = [end, 5]
    assert ends_of_policy(lm, BYTE_LEVEL) == {OTHER, end, 5}
    assert ends_of_policy(lm, None) == set()  # the run's own format knows them


# ---- a run ----

NAMES = ("<|end|>", "<|pad|>", "<|user|>", "<|system|>")  # the template's own first; every prompt holds the third


@functools.cache
def base():
    """A model whose files list four ends that its tokenizer has, its padding among them, and two that it has not."""
    folder = model_directory().parent / "several"
    shutil.copytree(model_directory(), folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ids[name] for name in NAMES[:3]] + [10**6, -1], "pad_token_id": ids["<|pad|>"]})
    )
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": ids["<|system|>"]}))
    return folder, tuple(ids[name] for name in NAMES)


def test_a_step_of_a_model_with_several_ends():
    folder, ends = base()
    lab = laboratory(folder, "rollout.max_new_tokens=60", "reward.granularity=interval")
    assert set(lab.policy.lm.ends) == set(ends) and lab.maker.chat.end_of_turn == ends[0]
    params = lab.sampling(1)
    assert params.end_token == ends[0] and set(params.other_ends) == set(ends[1:])
    prompts = lab.prompts(1)
    assert all(ends[2] in lab.maker.prompt_tokens(prompt) for prompt in prompts)
    traces = sample_traces(lab, prompts, 32, 1, "rollout")
    found = {trace.tokens[-1] for trace in traces if trace.finished}
    assert found >= {ends[1], ends[2]}  # an untrained model ends with any
    for trace in traces:
        assert trace.finished == (trace.tokens[-1] in ends) and not set(trace.tokens[:-1]) & set(ends)
        assert len(trace.tokens) > 1 or trace.text == ""
    experts = [lab.maker.expert(prompt, group) for group, prompt in enumerate(prompts)]
    assert {trace.tokens[-1] for trace in experts} == {ends[0]}
    known = experts + traces
    judged, batch = lab.reward.bridge.pack(known, prompts), pack_for_policy(lab, known)
    last = batch.loss_cu_seqlens[1:] - 1
    assert {judged.labels[i].item() for i, t in zip(last, known, strict=True) if t.finished} == {ends[0]}
    assert [batch.labels[i].item() for i in last] == [trace.tokens[-1] for trace in known]
    rewards = lab.reward.model.score(judged)
    alike = [dataclasses.replace(t, tokens=lab.maker.chat.with_own_end(t.tokens)) for t in known]
    expected = advantages(rewards, pack_for_policy(lab, alike), lab.config.advantage, lab.config.reward)
    assert torch.equal(advantages(rewards, batch, lab.config.advantage, lab.config.reward), expected)
    assert {t.kind for t in known} == {Kind.EXPERT, Kind.POLICY}


@pytest.mark.parametrize("lora", ["null", "{rank: 4, alpha: 8}"])
def test_a_run_keeps_the_list_of_ends(tmp_path, lora):
    folder, ends = base()
    train("model.build=null", f"model.path={folder}", f"model.lora={lora}", "warm_start.updates=0", "steps=1",
          "data.options={min_ops: 1, max_ops: 2, train_size: 40, dev_size: 16, test_size: 16}", "data.num_experts=8",
          "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=12", "device=cpu",
          "discriminator.warmup_steps=0", "evaluate.final=false", "evaluate.every=0", "evaluate.baselines=[]",
          "tensorboard=false", f"output_dir={tmp_path}", "--run-name", "run")  # fmt: skip
    run = tmp_path / "run"
    listed = json.loads((run / "final/policy/generation_config.json").read_text())["eos_token_id"]
    assert listed[0] == ends[0] and sorted(listed) == sorted(ends)
    if lora != "null":
        export(run, "policy", "merged", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.generation_config.eos_token_id == listed


def test_a_saved_policy_lists_the_template_s_end_besides_the_model_s(tmp_path):
    """A base model lists its end of text alone; what is trained on its samples ends as the template does."""
    lab = laboratory(base()[0])
    lm = lab.start
    end = lm.tokenizer.convert_tokens_to_ids("<|user|>")
    before = lm.model.generation_config.eos_token_id
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = end
    save_policy(lm, tmp_path / "policy")
    assert lm.model.generation_config.eos_token_id == end != before
    listed = json.loads((tmp_path / "policy/generation_config.json").read_text())["eos_token_id"]
    assert listed == [lab.maker.chat.end_of_turn, end]
    again = load_policy(tmp_path / "policy", lab.config.model, CPU)
    assert set(again.ends) == set(listed)
