"""Policy and discriminator with tokenizers of their own, from one trace to whole training steps."""

import copy

import pytest
import torch
from tokenizers import normalizers

from airl_fast import batches
from airl_fast.advantage import advantages
from airl_fast.artifacts import save_policy
from airl_fast.bridge import Bridge
from airl_fast.config import BuildConfig, Config, RewardConfig
from airl_fast.data.chat import ChatFormat
from airl_fast.data.task import make_task
from airl_fast.errors import UserError
from airl_fast.lab import Lab, load_material, make_lab, make_start_model
from airl_fast.metrics import Metrics
from airl_fast.models.build import build_model, build_tokenizer
from airl_fast.models.load import wrap
from airl_fast.pack import pack
from airl_fast.rollout.builtin import Sample
from airl_fast.traces import TraceMaker
from airl_fast.train import airl_step
from airl_fast.types import Kind, Trace
from tests.airl_fast.data.test_chat import CHATML, FORMATS, QWEN, byte_level
from tests.airl_fast.model_cases import CPU, whole_sequences

TASK = make_task("arithmetic", train_size=12)
EXAMPLES = TASK.load("train", 4)
POLICY = FORMATS["chatml"]
OTHERS = ["llama3", "plain", "byte fallback with blank", "characters"]


def bridge_to(name: str | None, **reward) -> Bridge:
    maker = TraceMaker(task=TASK, chat=POLICY, reward=RewardConfig(**reward))
    return Bridge(maker=maker, chat=None if name is None else FORMATS[name], device=CPU)


def traces_of(bridge: Bridge) -> list[Trace]:
    """Demonstrations, and a sample of each prompt that broke off in the middle."""
    experts = [bridge.maker.expert(example, g) for g, example in enumerate(EXAMPLES)]
    cut = [POLICY.completion_tokens(t.text.split("\n</think>")[0], finished=False) for t in experts]
    broken = [
        bridge.maker.sampled(example, g, Sample(tokens=tuple(tokens), logprobs=(-0.5,) * len(tokens), finished=False))
        for g, (example, tokens) in enumerate(zip(EXAMPLES, cut, strict=True))
    ]
    return experts + broken


def test_one_tokenizer_has_nothing_to_map():
    bridge = bridge_to(None)
    traces = traces_of(bridge)
    ours, theirs = bridge.pack(traces, EXAMPLES), pack(traces, CPU)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.loss_rows, theirs.loss_rows)
    rewards = torch.randn(ours.num_loss_tokens)
    assert bridge.to_policy(rewards, traces, EXAMPLES) is rewards


@pytest.mark.parametrize("name", OTHERS)
def test_the_discriminator_reads_the_conversation_in_its_own_format(name):
    bridge = bridge_to(name)
    traces = traces_of(bridge)
    batch, chat = bridge.pack(traces, EXAMPLES), FORMATS[name]
    for s, (tokens, found) in enumerate(zip(whole_sequences(batch), traces, strict=True)):
        completion = batch.labels.split(batch.loss_lengths)[s].tolist()
        prompt = tokens.tolist()[: -len(completion)]
        assert prompt == chat.prompt_tokens(EXAMPLES[found.group].prompt)
        assert chat.decode(completion) == found.text
        assert (completion[-1] == chat.end_of_turn) == found.finished
    assert batch.behaviour_logprobs.isnan().all()
    assert batch.group.tolist() == [t.group for t in traces] and batch.kind.tolist() == [int(t.kind) for t in traces]


@pytest.mark.parametrize("name", OTHERS)
def test_rewards_come_back_by_the_characters_they_were_given_to(name):
    bridge, chat = bridge_to(name), FORMATS[name]
    traces = traces_of(bridge)
    rewards = torch.randn(bridge.pack(traces, EXAMPLES).num_loss_tokens)
    found = bridge.to_policy(rewards, traces, EXAMPLES).split([len(t.tokens) for t in traces])
    given = rewards.split(bridge.pack(traces, EXAMPLES).loss_lengths)
    for one, ours, theirs in zip(traces, found, given, strict=True):
        tokens = chat.completion_tokens(one.text, one.finished)
        by_character = torch.zeros(len(one.text))
        for reward, (start, end) in zip(theirs, chat.token_char_spans(one.text, tokens), strict=True):
            by_character[start:end] = reward
        for reward, (start, end) in zip(ours, POLICY.token_char_spans(one.text, one.tokens), strict=True):
            if end > start:
                assert reward.item() == pytest.approx(by_character[start:end].mean().item(), abs=1e-5)
        if one.finished:  # the end of turn rewards the end of turn
            assert ours[-1] == theirs[-1]


def test_steps_are_those_of_the_readers_own_tokens():
    bridge = bridge_to("characters", granularity="interval")
    found = bridge.maker.expert(EXAMPLES[0], 0)
    batch, text = bridge.pack([found], EXAMPLES), found.text
    spans = FORMATS["characters"].token_char_spans(text, batch.labels.tolist())
    ends = [spans[i][1] for i in batch.step_ends.nonzero()[:, 0].tolist()]
    assert ends == TASK.step_ends(text)


def test_a_tokenizer_that_composes_accents_still_gives_every_token_its_reward():
    reader = byte_level(QWEN, CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>")
    reader.backend_tokenizer.normalizer = normalizers.NFC()
    chat = ChatFormat.from_tokenizer(reader)
    bridge = Bridge(maker=bridge_to(None, granularity="interval").maker, chat=chat, device=CPU)
    text = "cafe\u0301 7\ncafe\u0301 8"
    tokens = POLICY.completion_tokens(text)
    found = bridge.maker.sampled(
        EXAMPLES[0], 0, Sample(tokens=tuple(tokens), logprobs=(0.0,) * len(tokens), finished=True)
    )
    assert found.text == text
    batch = bridge.pack([found], EXAMPLES)
    composed = "caf\u00e9 7\ncaf\u00e9 8"
    assert chat.decode(batch.labels.tolist()) == composed
    # A reward for the two digits and the end of turn alone comes back to the tokens of those digits and that end.
    spans = chat.token_char_spans(composed, batch.labels.tolist())
    rewards = torch.tensor([{"7": 1.0, "8": 2.0, "": 4.0}.get(composed[a:b], 0.0) for a, b in spans])
    back = bridge.to_policy(rewards, [found], EXAMPLES).tolist()
    pieces = [text[a:b] for a, b in POLICY.token_char_spans(text, tokens)]
    assert [(piece, reward) for piece, reward in zip(pieces, back, strict=True) if reward] == [
        ("7", 1.0), ("8", 2.0), ("", 4.0)
    ]  # fmt: skip


# ---- whole steps: a Qwen2 policy judged by a Llama discriminator with another tokenizer ----

TEXTS = [text for example in TASK.load("train") for text in (example.prompt, example.expert)]


def build(folder, architecture, texts, vocab_size, seed):
    config = BuildConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=16,
        layers=1,
        heads=2,
        kv_heads=1,
        intermediate_size=24,
    )
    tokenizer = build_tokenizer(texts, config)
    save_policy(wrap(build_model(config, tokenizer, seed), tokenizer), folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "model": {"path": build(folder / "policy", "qwen2", TEXTS, 380, 0)},
        "discriminator": {"path": build(folder / "reader", "llama", ["start gain lose"] * 9, 300, 1)},
    }


def lab_of(folders, *, path=None, **changes) -> Lab:
    tree = {
        "steps": 4,
        "data": {"task": "arithmetic", "options": {"train_size": 12, "dev_size": 3}},
        "model": folders["model"],
        "discriminator": {
            "path": path or folders["discriminator"]["path"],
            "head": "action",
            "perturbed_per_expert": 1,
            "optim": {"learning_rate": 1e-2, "warmup_fraction": 0.0},
        },
        "policy": {"optim": {"learning_rate": 1e-3, "warmup_fraction": 0.0}},
        "rollout": {"prompts_per_step": 3, "samples_per_prompt": 3, "max_new_tokens": 24},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    config = Config.model_validate(tree)
    material = load_material(config)
    return make_lab(config, material, make_start_model(config, material.task, CPU), CPU)


def run(lab: Lab, tmp_path, steps=1):
    replay = batches.Replay(lab.config.discriminator.replay_size)
    with Metrics(tmp_path / "metrics.jsonl", total_steps=steps) as meter:
        results = []
        for step in range(1, steps + 1):
            results.append(airl_step(lab, step, meter, replay))
            values = meter.log(step, tokens=results[-1].tokens, **results[-1].records)
    return results, values


def weights(module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(ours, theirs) -> bool:
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("granularity", ["dense", "interval", "sparse", "multiscale"])
def test_a_llama_judges_a_qwen(folders, tmp_path, granularity):
    lab = lab_of(folders, reward={"granularity": granularity})
    assert type(lab.policy.lm.model).__name__ == "Qwen2ForCausalLM"
    assert type(lab.reward.model.backbone).__name__ == "LlamaModel"
    assert lab.reward.bridge.chat is not None
    assert len(lab.reward.bridge.chat.tokenizer) != len(lab.policy.lm.tokenizer)
    before = weights(lab.policy.lm.model), weights(lab.reward.model), weights(lab.start.model)
    results, values = run(lab, tmp_path, 2)
    assert not same(before[0], weights(lab.policy.lm.model)) and not same(before[1], weights(lab.reward.model))
    assert same(before[2], weights(lab.start.model))
    assert len(results[0].traces) == 9
    for name in ("policy/loss", "policy/grad_norm", "discriminator/loss", "discriminator/grad_norm"):
        assert values[name] == values[name] and abs(values[name]) < 100, name
    assert abs(values["policy/mismatch_kl"]) < 1e-8


@pytest.mark.parametrize("path", ["policy", None])
@pytest.mark.parametrize("before_update", [False, True])
def test_a_step_is_its_stages_one_after_the_other(folders, tmp_path, path, before_update):
    """Also that rewards come from the updated discriminator, or from the one before, as configured."""
    changes = {"reward": {"score_before_update": before_update}, "path": path}
    lab, by_hand = lab_of(folders, **changes), lab_of(folders, **changes)
    run(lab, tmp_path)
    prompts = by_hand.prompts(1)
    samples = batches.sample_traces(by_hand, prompts, 3, 1, "rollout")
    known = batches.expert_traces(by_hand, prompts) + samples
    judged = known + batches.perturbed_traces(by_hand, prompts, known, Kind.EXPERT, 1)
    assert len(judged) == 3 + 9 + 3
    model, bridge = by_hand.reward.model, by_hand.reward.bridge
    first = copy.deepcopy(model)
    model.update(bridge.pack(judged, prompts), by_hand.reward.optimiser)
    scored = bridge.pack(known, prompts)
    early, late = first.score(scored), model.score(scored)
    assert (early - late).abs().max() > 1e-3
    rewards = bridge.to_policy(early if before_update else late, known, prompts)
    batch = pack(known, CPU)
    config = by_hand.config
    by_hand.policy.update(batch, advantages(rewards, batch, config.advantage, config.reward))
    assert same(weights(lab.reward.model), weights(by_hand.reward.model))
    assert same(weights(lab.policy.lm.model), weights(by_hand.policy.lm.model))


def test_the_same_tokenizer_in_another_directory_needs_no_mapping(folders, tmp_path):
    lab = lab_of(folders, path=folders["model"]["path"])
    assert lab.reward.bridge.chat is None
    own = lab_of(folders, path="policy")
    run(lab, tmp_path), run(own, tmp_path)
    assert same(weights(lab.policy.lm.model), weights(own.policy.lm.model))


def test_replayed_samples_are_judged_with_their_own_prompts(folders, tmp_path):
    lab = lab_of(folders, discriminator={"replay_size": 4})
    results, _ = run(lab, tmp_path, 2)
    replay = batches.Replay(4)
    for step in (1, 2):
        prompts = lab.prompts(step)
        replay.add(lab, step, prompts, results[step - 1].traces, 1)
    assert len(replay.kept) == 4  # three of each step, the oldest gone
    for example, old in replay.kept:
        assert tuple(lab.maker.chat.prompt_tokens(example.prompt)) == old.prompt_tokens
    examples, drawn = replay.draw(lab, 3, 3, 10)
    assert [t.group for t in drawn] == [10, 11, 12]
    assert all(lab.maker.prompt_tokens(e) == t.prompt_tokens for e, t in zip(examples, drawn, strict=True))


def test_the_logprob_head_needs_the_policys_tokenizer(folders):
    with pytest.raises(UserError, match=r"discriminator\.head=logprob .* discriminator\.path must share") as caught:
        lab_of(folders, discriminator={"path": folders["discriminator"]["path"], "head": "logprob"})
    assert "\n" not in str(caught.value)
