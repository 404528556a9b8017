"""Adapters and 4-bit weights as layers of a model: what they compute, share, refuse and save."""

import json

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from airl_fast.config import LoraConfig
from airl_fast.errors import UserError
from airl_fast.models import adapters
from airl_fast.models.adapters import adapter_base, load_adapter, merge, save_adapter, share, trainable
from airl_fast.models.load import load_model, load_tokenizer, wrap
from airl_fast.rollout import builtin
from airl_fast.rollout.engine import SamplingParams
from tests.airl_fast.adapter_cases import frozen_bytes, model_directory, same
from tests.airl_fast.model_cases import CPU

LORA = LoraConfig(rank=4, alpha=12)
IDS = torch.arange(40).reshape(2, 20) + 7


def model_of(architecture="qwen2", quantise=None, dtype=torch.float32):
    return load_model(model_directory(architecture), "model.path", dtype, quantise=quantise, device=CPU).eval()


def adapted(model, lora=LORA, *, moved=0.3, **options):
    """`model` under adapters that have been moved away from their start, at which they compute nothing."""
    made = trainable(model, lora, base=str(model.name_or_path), seed=3, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    return made


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def gradients(model):
    """Of the sum of squared hidden states, by name."""
    model.zero_grad()
    model.base_model(input_ids=IDS, use_cache=False).last_hidden_state.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what an adapted model computes ----


@pytest.mark.parametrize("quantise", [None, "nf4"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_an_adapted_layer_is_the_frozen_one_plus_its_low_rank_product(architecture, quantise):
    base = model_of(architecture, quantise)
    model = adapted(base)
    frozen, layer = base.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.up_proj
    weight = frozen.weight if quantise is None else dequantize_4bit(frozen.weight.data, frozen.weight.quant_state)
    x = torch.randn(5, weight.shape[1])
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (4, weight.shape[1]) and up.shape == (weight.shape[0], 4)
    torch.testing.assert_close(layer(x), x @ weight.T + 12 / 4 * (x @ down.T) @ up.T, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(layer(x), frozen(x))


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_nf4_holds_the_nearest_of_sixteen_levels_and_leaves_the_output_layer(architecture):
    full, base = model_of(architecture), model_of(architecture, "nf4")
    linear = {n: m for n, m in full.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in linear.items():
        found = base.get_submodule(name)
        if name == "lm_head":
            assert type(found) is nn.Linear and torch.equal(found.weight, layer.weight)
            continue
        assert found.weight.dtype == torch.uint8 and found.weight.numel() * 2 == layer.weight.numel()
        values = dequantize_4bit(found.weight.data, found.weight.quant_state)
        blocks, exact = values.reshape(-1, 64), layer.weight.reshape(-1, 64)
        scale = exact.abs().amax(1, keepdim=True)
        assert max(len(block.unique()) for block in blocks) <= 16
        # NF4's widest gap is 0.30 of a block's largest value; the scales themselves are kept in 8 bits.
        assert ((blocks - exact).abs() <= 0.17 * scale).all()
        assert (values - layer.weight).abs().mean() > 1e-3 * layer.weight.abs().mean()
    assert torch.equal(base.model.embed_tokens.weight, full.model.embed_tokens.weight)


def test_fresh_adapters_compute_nothing_and_depend_on_the_seed_alone():
    base = model_of()
    one, again, other = (trainable(base, LORA, base="b", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(one), logits(base))
    first, second, third = (dict(m.named_parameters()) for m in (one, again, other))
    down = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first[down], second[down]) and not torch.equal(first[down], third[down])
    assert not any(p.any() for name, p in first.items() if "lora_B" in name)


def test_models_over_one_base_share_its_memory_and_nothing_else():
    base = model_of(quantise="nf4")
    before = logits(base)
    policy, discriminator = adapted(base), adapted(base.base_model, moved=0.7)
    for mine in (policy.base_model, discriminator):
        for name, parameter in base.base_model.named_parameters():
            name = name if name in dict(mine.named_parameters()) else name.replace("_proj.", "_proj.base_layer.")
            assert mine.get_parameter(name) is parameter
    assert torch.equal(logits(base), before)  # the start policy has no adapter
    assert (logits(policy) - before).abs().max() > 0.1
    states = [m(input_ids=IDS).last_hidden_state for m in (base.base_model, policy.base_model, discriminator)]
    assert all((states[i] - states[j]).abs().max() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not any(p.requires_grad for p in base.parameters())
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


def test_adapters_stay_in_float32_over_bfloat16():
    model = adapted(model_of(quantise="nf4", dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


def test_sampling_first_does_not_cut_gradients_off():
    """bitsandbytes repacks 4-bit weights at the first forward without gradients on CPUs with AVX512-BF16; repacked
    layers have no backward."""
    first, second = adapted(model_of(quantise="nf4")), adapted(model_of(quantise="nf4"))
    before = frozen_bytes(first)
    logits(first)
    assert same(frozen_bytes(first), before)
    after, expected = gradients(first), gradients(second)
    assert after.keys() == expected.keys() and len(after) == 2 * 7 * 3
    for name in after:
        assert torch.equal(after[name], expected[name]), name
        assert after[name].abs().max() > 0


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_gradients_through_four_bits_are_those_of_the_weights_they_stand_for(architecture):
    quantised = adapted(model_of(architecture, "nf4"))
    plain = adapted(model_of(architecture, "nf4").dequantize())
    ours, expected = gradients(quantised), gradients(plain)
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-3, rtol=1e-3, msg=name)


def test_the_sampler_draws_from_the_adapted_model():
    folder = model_directory()
    tokenizer = load_tokenizer(folder, "model.path")
    lm = wrap(adapted(model_of(quantise="nf4")), tokenizer)
    params = SamplingParams(temperature=0, top_p=1.0, max_new_tokens=6, end_token=-1, seed=0, batch_size=8)
    prompt = IDS[0].tolist()
    drawn = builtin.sample(lm, [prompt], 1, params)[0][0].tokens
    for token in drawn:
        with torch.no_grad():
            assert lm.model(torch.tensor([prompt])).logits[0, -1, : lm.num_tokens].argmax() == token
        prompt = [*prompt, token]


# ---- gradient checkpointing and dropout, which belong to gradient passes alone ----


@pytest.mark.parametrize("quantise", [None, "nf4"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_checkpointing_changes_no_gradient_and_does_recompute(architecture, lora, quantise):
    if lora is None and quantise is not None:
        pytest.skip("4-bit weights are not trained")
    base = model_of(architecture, quantise)
    plain, light = adapted(base, lora), adapted(base, lora, checkpointing=True)
    calls = []
    light.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    ours, expected = gradients(light), gradients(plain)
    assert len(calls) == 2  # once forward, once again for the backward
    assert ours.keys() == expected.keys() and len(ours) >= 29
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-5, rtol=1e-5, msg=name)
    logits(light)
    assert len(calls) == 3
    kept = light.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(kept, plain.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_works_in_gradient_passes_alone(checkpointing):
    base = model_of()
    still = adapted(base)
    model = adapted(base, LoraConfig(rank=4, alpha=12, dropout=0.5), checkpointing=checkpointing)
    assert torch.equal(logits(model), logits(still)) and torch.equal(logits(model), logits(model))
    torch.manual_seed(1)
    first, second = gradients(model), gradients(model)
    name = "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert not torch.equal(first[name], second[name])
    torch.manual_seed(1)
    assert torch.equal(gradients(model)[name], first[name])
    assert torch.equal(logits(model), logits(still))


# ---- files ----


@pytest.mark.parametrize("quantise", [None, "nf4"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_saved_adapter_loads_here_in_peft_and_in_transformers(tmp_path, architecture, quantise):
    base = model_of(architecture, quantise)
    model = adapted(base)
    save_adapter(model, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    assert config["base_model_name_or_path"] == str(model_directory(architecture)) and config["inference_mode"]
    assert not any("lm_head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    expected = logits(model)
    again = share(base)
    load_adapter(again, tmp_path, "b", "x")
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    theirs = PeftModel.from_pretrained(model_of(architecture, quantise), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, atol=1e-6, rtol=0)
    if quantise is None:
        alone = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(logits(alone), expected, atol=1e-6, rtol=0)


def test_a_backbones_adapter_is_peft_s_too(tmp_path):
    backbone = adapted(model_of().base_model)
    save_adapter(backbone, tmp_path)
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(model_directory()), tmp_path)
    expected = backbone(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(theirs(input_ids=IDS).last_hidden_state, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_merging_keeps_what_is_computed(tmp_path, architecture, dtype):
    model = adapted(model_of(architecture, dtype=dtype), moved=0.05, own=True)
    expected = logits(model)
    weight = model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    down, up = (getattr(model.model.layers[0].mlp.up_proj, side)["default"].weight for side in ("lora_A", "lora_B"))
    merged = merge(model)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, (weight.float() + (up @ down) * 3).to(dtype))
    tolerance = 2e-5 if dtype == torch.float32 else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(logits(merged), expected, atol=tolerance, rtol=0)
    merged.save_pretrained(tmp_path)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)), logits(merged))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "lm_head"), r"model\.lora\.targets: lm_head is the output layer, .* leave it out"),
        (("nope",), r"model\.lora\.targets: nope is no linear layer of Qwen2ForCausalLM; choose .* down_proj, gate_"),
        (("embed_tokens",), r"embed_tokens is no linear layer"),
        (("mlp",), r"mlp is no linear layer"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(targets, message):
    with pytest.raises(UserError, match=message) as caught:
        trainable(model_of(), LoraConfig(rank=2, targets=targets), base="b", seed=0)
    assert "\n" not in str(caught.value)


def test_chosen_targets_are_the_only_ones():
    model = trainable(model_of(), LoraConfig(rank=2, targets=("q_proj", "v_proj")), base="b", seed=0)
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(adapted(model_of()), tmp_path)
    other = model_of("llama")
    other.model.layers = other.model.layers[:1]
    with pytest.raises(UserError, match=r"adapter in .* does not fit the model in /b \(its layers are not this model"):
        load_adapter(other, tmp_path, "/b", "final/policy")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"adapter in .* does not fit") as caught:
        load_adapter(model_of(), tmp_path, "/b", "final/policy")
    assert "\n" not in str(caught.value)


HOSTILE = {
    "megatron_core": {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "payload.core"},
    "megatron_core alone": {"megatron_core": "payload.core"},
    "peft_type='XLORA'": {"peft_type": "XLORA", "adapters": {"a": "."}},
    "peft_type=None": {"peft_type": None},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "layer_replication": {"layer_replication": [[0, 1], [0, 1]]},
    "of_another_version": {"of_another_version": 1},
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", ["load", "base"])
def test_an_adapter_s_settings_go_no_further_than_a_plain_lora(tmp_path, monkeypatch, name, read):
    """The file may be anyone's, and PEFT would import the module or read the pickle that it names."""
    save_adapter(adapted(model_of()), tmp_path)
    file, ran = tmp_path / "adapter_config.json", tmp_path / "ran"
    (tmp_path / "payload").mkdir()
    (tmp_path / "payload" / "__init__.py").write_text(f"open({str(ran)!r}, 'w')")
    (tmp_path / "payload" / "core.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | HOSTILE[name]))
    with pytest.raises(UserError, match=rf"^final/policy: {file} (sets|says) {name.split()[0][:8]}.*\.$") as caught:
        load_adapter(model_of(), tmp_path, "/b", "final/policy") if read == "load" else adapter_base(
            tmp_path, "final/policy"
        )
    assert not ran.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_adapter_settings_that_are_no_json_object_are_named(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"^x: .*adapter_config\.json does not load \(.*\); save the adapter again\.$"):
        load_adapter(model_of(), tmp_path, "/b", "x")


@pytest.mark.parametrize(
    "wrong",
    [{"r": "4"}, {"r": 0}, {"rank_pattern": [1]}, {"target_modules": "("}, {"target_modules": {"a": 1}},
     {"task_type": "NONE"}, {"target_modules": ["q_proj", "lm_head"]}],
)  # fmt: skip
def test_settings_that_peft_stumbles_over_are_one_sentence(tmp_path, wrong):
    save_adapter(adapted(model_of()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(UserError, match=rf"^x: the adapter in {tmp_path} does not fit the model in /b \(.*\)\.$"):
        load_adapter(model_of(), tmp_path, "/b", "x")


def test_what_peft_itself_writes_of_a_lora_is_honoured(tmp_path):
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 5}, layers_to_transform=[0], init_lora_weights="gaussian", lora_dropout=0.1,
    )  # fmt: skip
    model = peft.get_peft_model(model_of(), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    model.eval()
    ours = model_of()
    load_adapter(ours, tmp_path, "b", "x")
    assert torch.equal(logits(ours), logits(model)) and not torch.equal(logits(ours), logits(model_of()))
    torch.testing.assert_close(logits(merge(ours)), logits(model), atol=1e-4, rtol=1e-4)


def test_a_missing_package_is_named_with_the_setting_that_wants_it(monkeypatch):
    def missing(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(adapters.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"^model\.quantise=nf4 needs the package bitsandbytes .*airl-fast\[lora\]"):
        adapters.require("bitsandbytes", "model.quantise=nf4")
