"""What a run leaves behind loads elsewhere and computes the same: policies in transformers, rewards here."""

import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from airl_fast import manifest
from airl_fast.artifacts import load_policy, load_reward, save_policy, save_reward
from airl_fast.bridge import Bridge
from airl_fast.config import BuildConfig, Config
from airl_fast.data.chat import ChatFormat
from airl_fast.data.task import make_task
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.models.build import build_model, build_tokenizer
from airl_fast.models.heads import make_head
from airl_fast.models.load import LanguageModel, wrap
from airl_fast.pack import pack
from airl_fast.traces import TraceMaker
from airl_fast.types import Kind
from tests.airl_fast.model_cases import CPU, plain_optimiser

TASK = make_task("arithmetic", train_size=12)
EXAMPLES = TASK.load("train", 6)
TEXTS = [text for example in TASK.load("train") for text in (example.prompt, example.expert)]
SAMPLES = [*TEXTS[:2], "naïve café 12,345 名前 🙂", "<think>\n<|end|> <|endoftext|> <|user|>", " a  b\t\n\n c"]


def built(architecture="qwen2", seed=0, vocab_size=380) -> LanguageModel:
    config = BuildConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=16,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate_size=24,
    )
    tokenizer = build_tokenizer(TEXTS, config)
    return wrap(build_model(config, tokenizer, seed), tokenizer)


def maker_of(lm: LanguageModel, config: Config) -> TraceMaker:
    return TraceMaker(task=TASK, chat=ChatFormat.from_tokenizer(lm.tokenizer), reward=config.reward)


def traces_of(maker: TraceMaker):
    experts = [maker.expert(example, g) for g, example in enumerate(EXAMPLES)]
    return experts + [replace(t, kind=Kind.POLICY, tokens=t.tokens[::-1], correct=False) for t in experts]


def reward_of(start: LanguageModel, own: LanguageModel, config: Config, bridge: Bridge) -> Discriminator:
    """A discriminator that has been trained a little."""
    settings = config.discriminator
    torch.manual_seed(3)
    head = make_head(settings.head, own.model.base_model, settings.action_rank)
    model = Discriminator(own.model.base_model, head, settings, config.reward, start)
    optimiser = plain_optimiser(model.parameters(), 1e-2)
    traces = traces_of(bridge.maker)
    for _ in range(3):
        model.update(bridge.pack(traces, EXAMPLES), optimiser)
    return model


# ---- policies ----


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_policy_loads_in_transformers_with_the_same_logits_and_tokens(tmp_path, architecture):
    lm = built(architecture)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder = tmp_path / "policy"
    save_policy(lm, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(len(lm.tokenizer), (3, 20))
    assert torch.equal(model(ids).logits, lm.model(ids).logits)
    assert len(tokenizer) == len(lm.tokenizer)
    for text in SAMPLES:
        assert tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "7?"}, {"role": "assistant", "content": SAMPLES[1]}]
    assert tokenizer.apply_chat_template(chat) == lm.tokenizer.apply_chat_template(chat)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (lm.tokenizer.eos_token, lm.tokenizer.pad_token)
    assert not list(folder.glob("*.bin")) and list(folder.glob("*.safetensors"))
    generated = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 20
    # And once more through our own door: nothing drifts.
    again = load_policy(folder, Config(model={"build": {}}).model, CPU)
    assert torch.equal(again.model(ids).logits, lm.model(ids).logits)
    save_policy(again, tmp_path / "second")
    for name in ("model.safetensors", "chat_template.jinja"):
        assert (tmp_path / "second" / name).read_bytes() == (folder / name).read_bytes()
    twice = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert twice.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saving_replaces_a_whole_directory_and_leaves_nothing_beside_it(tmp_path):
    folder = tmp_path / "deep" / "policy"
    save_policy(built(seed=0), folder)
    (folder / "stray.txt").write_text("old")
    (folder.parent / ".policy.tmp").mkdir()
    (folder.parent / ".policy.tmp" / "half").write_text("of a killed run")
    second = built(seed=1)
    save_policy(second, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]
    assert not (folder / "stray.txt").exists()
    ids = torch.tensor([[5, 6]])
    loaded = load_policy(folder, Config(model={"build": {}}).model, CPU)
    assert torch.equal(loaded.model(ids).logits, second.model(ids).logits)


def test_what_cannot_be_written_is_one_sentence_and_spares_the_old(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/policy could not be written \(Not a directory\)"):
        save_policy(built(), tmp_path / "file" / "policy")
    folder = tmp_path / "policy"
    save_policy(built(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # as a full disk would cut the weights off
    try:
        with pytest.raises(UserError, match=r"policy could not be written \(.*\); check the directory") as caught:
            save_policy(built(seed=1), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"file", "policy"}


# ---- reward models ----

REWARDS = {
    "linear": {"head": "linear"},
    "action": {"head": "action"},
    "low-rank action": {"head": "action", "action_rank": 3},
    "logprob": {"head": "logprob"},
    "linear spectral norm": {"head": "linear", "loss": "wgan", "lipschitz": "spectral_norm"},
    "action spectral norm": {"head": "action", "loss": "wgan", "lipschitz": "spectral_norm"},
}


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_reward_model_gives_the_same_rewards_after_loading(tmp_path, name, architecture):
    save_policy(built(architecture), tmp_path / "start")  # a run's models all come from directories
    config = Config(model={"build": {}}, discriminator=REWARDS[name], reward={"temperature": 2.0})
    start = load_policy(tmp_path / "start", config.model, CPU)
    own = load_policy(tmp_path / "start", config.model, CPU)
    bridge = Bridge(maker=maker_of(start, config), chat=None, device=CPU)
    model = reward_of(start, own, config, bridge)
    batch = bridge.pack(traces_of(bridge.maker), EXAMPLES)
    expected = model.score(batch)
    assert expected.std() > 0.05
    save_reward(model, own.tokenizer, tmp_path / "reward")
    # Another run's configuration: what the head is comes from its own file.
    other = Config(model={"build": {}}, reward={"temperature": 2.0})
    loaded, way = load_reward(tmp_path / "reward", other, bridge.maker, start, CPU)
    assert way.chat is None
    assert torch.equal(loaded.score(way.pack(traces_of(bridge.maker), EXAMPLES)), expected)
    assert torch.equal(loaded.score(batch), expected)  # scoring does not wear it out
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    backbone = AutoModel.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


def test_a_reward_model_with_its_own_tokenizer_keeps_it(tmp_path):
    config = Config(model={"build": {}}, discriminator={"head": "action"})
    save_policy(built(), tmp_path / "start")
    save_policy(built("llama", seed=5, vocab_size=320), tmp_path / "reader")
    start, own = (load_policy(tmp_path / name, config.model, CPU) for name in ("start", "reader"))
    maker = maker_of(start, config)
    bridge = Bridge(maker=maker, chat=ChatFormat.from_tokenizer(own.tokenizer), device=CPU)
    model = reward_of(start, own, config, bridge)
    traces = [maker.expert(example, g) for g, example in enumerate(EXAMPLES)]
    expected = bridge.to_policy(model.score(bridge.pack(traces, EXAMPLES)), traces, EXAMPLES)
    save_reward(model, own.tokenizer, tmp_path / "reward")
    loaded, way = load_reward(tmp_path / "reward", config, maker, start, CPU)
    assert way.chat is not None
    found = way.to_policy(loaded.score(way.pack(traces, EXAMPLES)), traces, EXAMPLES)
    assert torch.equal(found, expected)
    assert found.shape == (sum(len(t.tokens) for t in traces),)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    config = Config(model={"build": {}}, discriminator={"head": "action"})
    start, own = built(), built()
    bridge = Bridge(maker=maker_of(start, config), chat=None, device=CPU)
    folder = tmp_path_factory.mktemp("rewards") / "good"
    save_reward(reward_of(start, own, config, bridge), own.tokenizer, folder)
    (folder / manifest.MODEL).unlink()  # of a version that wrote none: what is damaged is not noticed at once
    return folder, config, bridge.maker, start


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_tensor(path):
    tensors = load_file(path)
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("head.safetensors", lambda path: path.unlink(), "has no head.safetensors and head.json"),
        ("head.json", lambda path: path.unlink(), "has no head.safetensors and head.json"),
        ("head.json", lambda path: path.write_text("{"), "head.json and head.safetensors in .* are damaged"),
        ("head.json", lambda path: path.write_text("{}"), "head.json and head.safetensors in .* are damaged"),
        (
            "head.json",
            lambda path: path.write_text(json.dumps({"head": "linear", "action_rank": 0, "lipschitz": None})),
            "are damaged or not of this backbone",
        ),
        ("head.safetensors", cut, "are damaged or not of this backbone"),
        ("model.safetensors", cut, "the model in .* does not load"),
        ("model.safetensors", lose_a_tensor, "lack layers.0.mlp.up_proj.weight"),
        ("model.safetensors", lambda path: path.unlink(), "the model in .* does not load"),
        ("tokenizer.json", lambda path: path.unlink(), "has no tokenizer.json"),
    ],
)
def test_a_reward_model_at_fault_is_named_in_one_sentence(good, tmp_path, file, damage, message):
    folder = tmp_path / "mine"
    shutil.copytree(good[0], folder)
    damage(folder / file)
    with pytest.raises(UserError, match=message) as caught:
        load_reward(folder, *good[1:], CPU)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_policy_directory_is_no_reward_model(good, tmp_path):
    save_policy(built(), tmp_path / "policy")
    with pytest.raises(UserError, match=r"give the final/discriminator of an AIRL run"):
        load_reward(tmp_path / "policy", *good[1:], CPU)
    model, bridge = load_reward(good[0], *good[1:], CPU)
    traces = traces_of(bridge.maker)
    assert model.score(pack(traces, CPU)).isfinite().all()
