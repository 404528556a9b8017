"""Models: packed states and log-probabilities against the model itself, built models, and directories at fault."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from airl_fast.artifacts import load_policy, save_policy
from airl_fast.config import BuildConfig, ModelConfig
from airl_fast.data.chat import ChatFormat
from airl_fast.errors import UserError
from airl_fast.models.build import build_model, build_tokenizer
from airl_fast.models.forward import hidden_states, token_logprobs
from airl_fast.models.load import load_language_model, wrap
from airl_fast.pack import pack
from tests.airl_fast.model_cases import CPU, language_model, random_traces, whole_sequences

# Every way between the last hidden state and the logits: plain, bias, cap, multiplied, divided.
ARCHITECTURES = {
    "qwen2": {},
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 7, "head_dim": 8},
    "phi": {},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": 7},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}
TEXTS = ["start 12; gain 3?", "<think>\n12 + 3 = 15\n</think>\n<answer>15</answer>"] * 5


def model_of(name: str, **changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model(name, **(shape | ARCHITECTURES.get(name, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for module in model.modules():  # biases start at zero, where leaving them out would not show
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("share", [True, False])
def test_states_of_packed_sequences_are_those_of_each_alone(name, share):
    lm = wrap(model_of(name), None)
    batch = pack(random_traces(0), CPU, share=share)
    assert len(set(batch.loss_lengths)) > 5
    packed = hidden_states(lm.backbone, batch)
    before, after = (
        packed[batch.loss_rows].split(batch.loss_lengths),
        packed[batch.label_rows].split(batch.loss_lengths),
    )
    for sequence, predicting, reading in zip(whole_sequences(batch), before, after, strict=True):
        alone = lm.backbone(input_ids=sequence[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(predicting, alone[-len(predicting) - 1 : -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reading, alone[-len(reading) :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_models_own_logits(name, temperature):
    lm = wrap(model_of(name), None)
    batch = pack(random_traces(1, groups=2), CPU)
    ours, entropy = token_logprobs(lm, batch, temperature=temperature, entropy=True)
    expected, spread = [], []
    lm.model.double()
    for sequence, completion in zip(whole_sequences(batch), batch.loss_lengths, strict=True):
        logits = lm.model(input_ids=sequence[None]).logits[0, -completion - 1 : -1]
        logp = (logits.double() / temperature).log_softmax(-1)
        expected.append(logp.gather(1, sequence[-completion:, None])[:, 0])
        spread.append(-(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(ours.double(), torch.cat(expected), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), torch.cat(spread), atol=2e-5, rtol=1e-5)
    assert torch.cat(expected).std() > 0.3  # far from uniform: a wrong scale or cap would show


def test_log_probabilities_have_the_gradient_of_the_model():
    lm = language_model()
    batch = pack(random_traces(2, groups=1), CPU)
    weights = torch.randn(batch.num_loss_tokens)
    (token_logprobs(lm, batch) * weights).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in lm.model.named_parameters()}
    lm.model.zero_grad()
    offset = 0
    for sequence, completion in zip(whole_sequences(batch), batch.loss_lengths, strict=True):
        logp = lm.model(input_ids=sequence[None]).logits[0, -completion - 1 : -1].log_softmax(-1)
        taken = logp.gather(1, sequence[-completion:, None])[:, 0]
        (taken * weights[offset : offset + completion]).sum().backward()
        offset += completion
    for name, parameter in lm.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)
        assert ours[name].abs().sum() > 0, name


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_built_model_reads_what_its_reloaded_tokenizer_writes(tmp_path, architecture):
    config = BuildConfig(architecture=architecture, hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16)
    tokenizer = build_tokenizer(TEXTS, config)
    model = build_model(config, tokenizer, seed=0)
    same = build_model(config, tokenizer, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, build_model(config, tokenizer, seed=1).lm_head.weight)
    save_policy(wrap(model, tokenizer), tmp_path / "m")
    lm = load_policy(tmp_path / "m", ModelConfig(build=config), CPU)
    assert len(lm.tokenizer) == len(tokenizer) == lm.model.get_input_embeddings().num_embeddings
    for text in (*TEXTS[:2], "naïve 12,345 名前", "<|endoftext|> <|pad|> <s> <unk> [UNK]", "e\u0301"):
        tokens = tokenizer(text)["input_ids"]
        assert lm.tokenizer(text)["input_ids"] == tokens and max(tokens) < len(tokenizer)
    chat = ChatFormat.from_tokenizer(lm.tokenizer)
    assert chat.prompt_tokens("7?") == ChatFormat.from_tokenizer(tokenizer).prompt_tokens("7?")
    digits = tokenizer("12345")["input_ids"]
    assert len(digits) == 5  # one token a digit


# ---- directories at fault ----


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    config = BuildConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16)
    tokenizer = build_tokenizer(TEXTS, config)
    save_policy(wrap(build_model(config, tokenizer, seed=0), tokenizer), folder)
    return folder


def rewrite(folder, name, change):
    settings = json.loads((folder / name).read_text())
    change(settings)
    (folder / name).write_text(json.dumps(settings))


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def an_index_of(shard):
    """Of weights that lie in `shard`, whole and loadable."""

    def write(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        if shard.endswith(".bin"):
            torch.save(tensors, folder / shard)
        else:
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        names = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(names))

    return write


def an_index_by_another_name(folder):
    """transformers reads the one that config.json names."""
    an_index_of("w.bin")(folder)
    (folder / "model.safetensors.index.json").rename(folder / "mine.safetensors.index.json")
    rewrite(folder, "config.json", lambda c: c.update(transformers_weights="mine.safetensors.index.json"))


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_the_template(folder):
    (folder / "chat_template.jinja").unlink()


DAMAGE = {
    "missing": (shutil.rmtree, "no model directory at"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config not json": (lambda folder: (folder / "config.json").write_text("{"), "does not load"),
    "unknown architecture": (
        lambda folder: rewrite(folder, "config.json", lambda c: c.update(model_type="nonesuch")),
        "does not load",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors weights;"),
    "an adapter beside": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds a PEFT adapter, beside its model; give its base model",
    ),
    "an index that names pickles": (an_index_of("w.bin"), "names 'w.bin', which is no *.safetensors file beside it"),
    "another index that names pickles": (an_index_by_another_name, "names 'w.bin', which is no *.safetensors file"),
    "an index that leads out": (an_index_of("../x.safetensors"), "names '../x.safetensors', which is no"),
    "only pickled weights": (only_pickled, "pickled *.bin weights are not read; convert them"),
    "weights cut short": (cut_weights, "the model in"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "the model in"),
    "a tensor missing": (lose_a_tensor, "lack model.layers.0.mlp.up_proj.weight"),
    "other width": (
        lambda folder: rewrite(folder, "config.json", lambda c: c.update(hidden_size=32)),
        "the model in",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer not json": (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer in"),
    "no template": (lose_the_template, "has no chat template; set model.chat_template"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("key", ["model.path", "discriminator.path"])
def test_a_directory_at_fault_is_named_in_one_sentence(good, tmp_path, damage, key):
    folder = tmp_path / "mine"
    shutil.copytree(good, folder)
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(UserError) as caught:
        load_language_model(ModelConfig(path=str(folder)), CPU, key=key)
    sentence = str(caught.value)
    assert message in sentence
    assert sentence.startswith(f"{key}: ") and str(folder) in sentence
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 500


def test_an_architecture_with_logits_of_its_own_is_refused(good, tmp_path):
    model = model_of("hyperclovax", vocab_size=300, logits_scaling=0.125, attention_multiplier=0.1)
    lm = load_language_model(ModelConfig(path=str(good)), CPU)
    save_policy(wrap(model, lm.tokenizer), tmp_path / "mine")
    with pytest.raises(UserError, match=r"model\.path: .*mine holds a HyperCLOVAX.* not its output layer's alone"):
        load_language_model(ModelConfig(path=str(tmp_path / "mine")), CPU)


def test_a_good_directory_loads_and_a_given_template_replaces_a_missing_one(good, tmp_path):
    lm = load_language_model(ModelConfig(path=str(good)), CPU)
    assert lm.max_length == 256 and not lm.model.training
    folder = tmp_path / "mine"
    shutil.copytree(good, folder)
    lose_the_template(folder)
    template = lm.tokenizer.chat_template
    again = load_language_model(ModelConfig(path=str(folder), chat_template=template), CPU)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(lm.model(ids).logits, again.model(ids).logits)
    rounded = load_language_model(ModelConfig(path=str(good), dtype="bfloat16"), CPU)
    torch.testing.assert_close(rounded.model(ids).logits.float(), lm.model(ids).logits, atol=0.1, rtol=0.05)
    assert ChatFormat.from_tokenizer(again.tokenizer).prompt_tokens("7?")
