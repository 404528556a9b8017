"""Packed attention against a dense masked product in float64; models with it against padded, unshared forwards."""

import copy
import dataclasses
import random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from airl_fast.errors import UserError
from airl_fast.integrations.reward import AIRLRewardFunction
from airl_fast.judge.judge import open_judge
from airl_fast.models.attention import (
    PREFIX,
    SharedPrefixAttention,
    attend_dense,
    dense_mask,
    packed_kernel,
    why_not_shared,
)
from airl_fast.models.check import verify_packing
from airl_fast.models.flash import CpuFlash, Segmentwise, choose_kernel, pieces
from airl_fast.models.forward import hidden_states, token_logprobs
from airl_fast.models.load import wrap
from airl_fast.pack import pack
from airl_fast.types import Segments
from tests.airl_fast.model_cases import CPU, trace
from tests.airl_fast.run_cases import small_run

KERNELS = [CpuFlash(), Segmentwise()]
# prompts, completions, completions of each prompt
SEGMENTS = {
    "odd lengths": ((3, 9, 1), (30, 1, 17, 5, 2, 11, 29, 29, 3), (3, 1, 5)),
    "groups of one": ((4, 7), (1, 13), (1, 1)),
    "one token each": ((1,), (1,), (1,)),
    "long and short": ((40,), (1, 200, 1, 1), (4,)),
}


def random_case(name: str, heads: int, kv_heads: int, dtype: torch.dtype):
    prompts, completions, counts = SEGMENTS[name]
    segments = Segments(prompts=prompts, completions=completions, counts=counts)
    generator = torch.Generator().manual_seed(len(name))
    shapes = [(segments.num_rows, h, 8) for h in (heads, kv_heads, kv_heads, heads)]
    return segments, [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def test_the_mask_by_hand():
    segments = Segments(prompts=(2, 1), completions=(2, 1, 1), counts=(2, 1))
    assert dense_mask(segments, CPU).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_values_and_gradients_are_those_of_the_dense_product(kernel, heads, name, dtype, tolerance):
    segments, (q, k, v, grad) = random_case(name, *heads, dtype)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    expected = attend_dense(*inputs, dense_mask(segments, CPU), 0.3)
    wanted = torch.autograd.grad(expected, inputs, grad.double())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ours = SharedPrefixAttention.apply(*inputs, 0.3, pieces(segments, CPU, kernel), kernel)
    found = torch.autograd.grad(ours, inputs, grad)
    for mine, theirs in zip((ours, *found), (expected, *wanted), strict=True):
        assert mine.dtype == dtype
        scale = max(theirs.abs().max().item(), 1.0)
        assert (mine.double() - theirs).abs().max().item() <= tolerance * scale


def test_scores_of_any_size_do_not_overflow():
    segments, (q, k, v, _) = random_case("odd lengths", 4, 2, torch.float32)
    for kernel in KERNELS:
        ours = SharedPrefixAttention.apply(1e4 * q, k, v, 0.3, pieces(segments, CPU, kernel), kernel)
        expected = attend_dense(1e4 * q.double(), k.double(), v.double(), dense_mask(segments, CPU), 0.3)
        torch.testing.assert_close(ours.double(), expected, atol=1e-3, rtol=1e-3)


# ---- whole models ----


def model_of(architecture: str, kv_heads: int):
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        architecture, vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, intermediate_size=48, max_position_embeddings=512, initializer_range=0.2,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def groups_of(sizes: list[list[int]]):
    rng = random.Random(1)
    made = []
    for g, lengths in enumerate(sizes):
        prompt = tuple(rng.randrange(50) for _ in range(3 + 4 * g))
        made += [trace([rng.randrange(50) for _ in range(n)], prompt=prompt, group=g) for n in lengths]
    return made


def padded_logprobs(model, traces) -> list[torch.Tensor]:
    """The plain way: every sequence whole, padded on the right, with transformers' own attention and mask."""
    rows = [torch.tensor(t.prompt_tokens + t.tokens) for t in traces]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=pad_sequence(rows, batch_first=True), attention_mask=mask).logits.log_softmax(-1)
    return [
        logits[i, len(t.prompt_tokens) - 1 : len(row) - 1].gather(1, row[len(t.prompt_tokens) :, None])[:, 0]
        for i, (t, row) in enumerate(zip(traces, rows, strict=True))
    ]


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("sizes", [[[5, 17, 1, 8], [3, 3]], [[9], [1], [23]], [[1, 1, 1]]], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_give_the_padded_unshared_values_and_gradients(architecture, kv_heads, sizes, checkpointing):
    plain = model_of(architecture, kv_heads)
    lm = wrap(copy.deepcopy(plain), None)
    assert packed_kernel(lm.backbone) == "auto" and plain.config._attn_implementation == "sdpa"
    if checkpointing:  # the recomputation must see the packing too
        lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.model.train()
    traces = groups_of(sizes)
    batch = pack(traces, CPU)
    assert batch.segments.num_rows < sum(len(t.prompt_tokens) + len(t.tokens) for t in traces) or len(sizes) == 3
    ours, expected = token_logprobs(lm, batch), torch.cat(padded_logprobs(plain, traces))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in lm.model.named_parameters():
        scale = wanted[name].grad.abs().max().clamp_min(1.0)
        torch.testing.assert_close(parameter.grad / scale, wanted[name].grad / scale, atol=1e-5, rtol=1e-5, msg=name)


def test_sampling_with_the_packed_models_cache_is_unchanged():
    plain = model_of("qwen2", 2)
    ours = wrap(copy.deepcopy(plain), None).model
    tokens = torch.randint(50, (3, 7))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    found = [m.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
             for m in (plain.eval(), ours)]  # fmt: skip
    assert torch.equal(*found)


def test_an_architecture_that_keeps_its_own_attention_gets_the_mask():
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    lm = wrap(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), None)
    lm.backbone.config._attn_implementation = "sdpa"
    batch = pack(groups_of([[5, 9], [4]]), CPU, share=False)
    packed = hidden_states(lm.backbone, batch)[batch.label_rows].split(batch.loss_lengths)
    for t, found in zip(groups_of([[5, 9], [4]]), packed, strict=True):
        alone = lm.backbone(input_ids=torch.tensor([t.prompt_tokens + t.tokens])).last_hidden_state[0]
        torch.testing.assert_close(found, alone[-len(t.tokens) :], atol=1e-5, rtol=1e-5)


def blind(module, query, key, value, attention_mask, packing=None, **unused):
    """Attention that ignores the packing."""
    masked = attention_mask if packing is None else None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, masked, **unused)


def test_a_model_that_computes_something_else_over_packed_rows_is_found_out(monkeypatch):
    """Its attention ignores the packing: it goes back to its own, which gets the mask, and the log says why."""
    lm = wrap(model_of("qwen2", 2), None)
    verify_packing(lm)
    assert packed_kernel(lm.backbone) == "auto" and why_not_shared(lm.model) is None
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PREFIX + "auto", blind)
    verify_packing(lm)
    assert packed_kernel(lm.backbone) is None
    assert "Qwen2ForCausalLM computes something else over packed rows" in why_not_shared(lm.model)
    traces = groups_of([[5, 9], [4]])
    found = token_logprobs(lm, pack(traces, CPU))
    torch.testing.assert_close(found, torch.cat(padded_logprobs(lm.model, traces)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("open_it", [open_judge, AIRLRewardFunction])
def test_so_is_a_saved_discriminator(open_it, monkeypatch):
    """Where it is scored by, as where it was trained: rewards are those of its own attention."""

    def rewards(opened):
        maker = opened.bridge.maker
        examples = maker.task.load("train", 3)
        traces = [maker.expert(example, group) for group, example in enumerate(examples)]
        return opened.model.logits(opened.bridge.pack(traces * 2, examples))

    expected = rewards(open_it(small_run()))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PREFIX + "auto", blind)
    opened = open_it(small_run())
    assert packed_kernel(opened.model.backbone) is None and packed_kernel(opened.model.reference[0].backbone) is None
    assert not opened.bridge.share
    torch.testing.assert_close(rewards(opened), expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_be_packed_at_all_is_refused():
    config = AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    lm = wrap(model_of("llama", 2), None)
    broken = dataclasses.replace(lm, model=AutoModelForCausalLM.from_config(config))
    with pytest.raises(
        UserError, match=r"discriminator.path: a MambaForCausalLM .* \(layers of linear_attention take no"
    ):
        verify_packing(broken, "discriminator.path")


def test_kernels_that_cannot_run_say_so():
    assert choose_kernel("auto", CPU, torch.float32).name == "torch SDPA flash for the CPU"
    for name in ("flash_attn", "torch_flash"):
        with pytest.raises(UserError, match=f"model.attention={name} needs a CUDA GPU"):
            choose_kernel(name, CPU, torch.bfloat16)
    assert wrap(model_of("llama", 4), None).model.config._attn_implementation == PREFIX + "auto"
