"""Decoding by steps of fixed shape: the plain loop's tokens, drawn with the plain loop's numbers."""

import dataclasses
import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.models.attention import attend_one_token, keep_own_attention
from airl_fast.models.load import LanguageModel, wrap
from airl_fast.rollout import static as static_module
from airl_fast.rollout.builtin import Builtin, sample
from airl_fast.rollout.prefill import read_prompts
from airl_fast.rollout.static import Decoder, Static, halves, why_not_static
from airl_fast.rollout.static_cache import row_bytes
from airl_fast.rollout.uniform import Uniform
from tests.airl_fast.model_cases import CPU, language_model
from tests.airl_fast.test_ends import ENDS
from tests.airl_fast.test_rollout import PARAMS, PROMPTS

# Ends with several tokens, so that rows end at different steps, and goes on past two looks.
LONG = dataclasses.replace(PARAMS, max_new_tokens=40, other_ends=(17,))


@pytest.fixture(scope="module", params=["qwen2", "llama", "gpt2"])
def lm(request):
    return language_model(request.param, seed=4, spread=0.25)


def both(lm, params=LONG, prompts=PROMPTS, per_prompt=6, static=None):
    plain = sample(lm, prompts, per_prompt, params)
    return plain, sample(lm, prompts, per_prompt, params, static or Static())


def assert_same(plain, static, atol=1e-5):
    for ours, theirs in zip((o for g in static for o in g), (o for g in plain for o in g), strict=True):
        assert ours.tokens == theirs.tokens and ours.finished == theirs.finished
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=atol, rtol=0)


# ---- the plain loop's samples ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"batch_size": 7},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 17},  # one token after a look
        {"end_token": 39, "other_ends": ()},  # an end that is hardly ever drawn: most have their limit
        {"end_token": 0, "other_ends": tuple(range(1, 40))},  # everything ends at its first token
    ],
    ids=str,
)
def test_samples_are_those_of_the_plain_loop(lm, changes):
    assert_same(*both(lm, dataclasses.replace(LONG, **changes)))


def test_rows_end_at_many_steps_and_the_batch_shrinks(lm, monkeypatch):
    """What the comparison above rests on: fewer rows, more places, ends between two looks."""
    seen = []
    advance = Decoder.advance
    monkeypatch.setattr(Decoder, "advance", lambda self, *shape: (seen.append(shape), advance(self, *shape))[1])
    params = dataclasses.replace(LONG, max_new_tokens=120, other_ends=())
    plain, static = both(lm, params, per_prompt=16)
    assert_same(plain, static)
    lengths = {len(one.tokens) for group in plain for one in group}
    assert len(lengths) > 15 and any((n - 1) % static_module.LOOK for n in lengths)
    assert {rows for rows, _ in seen} >= {64, 32} and len({places for _, places in seen}) > 1
    assert [rows for rows, _ in seen] == sorted((rows for rows, _ in seen), reverse=True)
    assert max(lengths) - 1 <= len(seen) < max(lengths) + static_module.LOOK


@pytest.mark.parametrize("prompts", [[PROMPTS[0]], [PROMPTS[1]] * 3, [[7] * 60, [1]], [[4, 8]] * 9])
def test_prompts_of_any_number_and_length(lm, prompts):
    assert_same(*both(lm, prompts=prompts, per_prompt=1))
    assert_same(*both(lm, prompts=prompts, per_prompt=5))


def test_bfloat16_is_the_plain_loop_s_to_rounding():
    """Greedy tokens, but where two logits tie; and log-probabilities of tokens drawn from the same state."""
    lm = language_model(seed=4, spread=0.25)
    lm = wrap(lm.model.to(torch.bfloat16), None)
    plain, static = both(lm, dataclasses.replace(LONG, temperature=0.0), per_prompt=2)
    same = [a.tokens == b.tokens for g, h in zip(plain, static, strict=True) for a, b in zip(g, h, strict=True)]
    assert sum(same) >= len(same) - 2
    # Eight bits of mantissa through two layers: a state, and so a logit of size 4, moves by some 4 * 2^-8 a layer.
    drawn, again = both(lm, dataclasses.replace(LONG, max_new_tokens=1), per_prompt=8)
    assert_same(drawn, again, atol=0.05)


def test_vocabulary_rows_without_a_token_are_never_drawn(lm):
    padded = dataclasses.replace(lm, num_tokens=33)
    plain, static = both(padded, per_prompt=12)
    assert_same(plain, static)
    assert max(t for group in static for one in group for t in one.tokens) < 33


def test_greedy_with_several_ends_is_what_generate_does(lm):
    params = dataclasses.replace(LONG, temperature=0.0, end_token=ENDS[0], other_ends=ENDS[1:])
    for prompt, (one,) in zip(PROMPTS, sample(lm, PROMPTS, 1, params, Static()), strict=True):
        theirs = lm.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=params.max_new_tokens, eos_token_id=list(ENDS), pad_token_id=0,
        )  # fmt: skip
        assert list(one.tokens) == theirs[0, len(prompt) :].tolist()


# ---- a decoder that is kept ----


def test_a_kept_decoder_follows_weights_that_change_in_place(lm):
    other = language_model(lm.model.config.model_type, seed=4, spread=0.25)
    kept = Static()
    assert_same(*both(other, static=kept))
    first = kept._decoder
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    plain, static = both(other, dataclasses.replace(LONG, seed=9), static=kept)
    assert_same(plain, static)
    assert kept._decoder is first
    assert_same(*both(other, prompts=PROMPTS[:2], per_prompt=2, static=kept))  # fewer rows than it has
    assert kept._decoder is first


@pytest.mark.parametrize("change", ["weights", "model", "temperature", "ends", "rows", "places"])
def test_it_is_made_anew_for_what_its_steps_have_not_seen(lm, change):
    own, kept = language_model(seed=4, spread=0.25), Static()
    assert_same(*both(own, static=kept))
    first, params, prompts, per_prompt = weakref.ref(kept._decoder), LONG, PROMPTS, 6
    if change == "weights":  # a loader that replaces tensors
        for parameter in own.model.parameters():
            parameter.data = parameter.data.clone() * 0.9
    if change == "model":
        own = language_model(seed=5, spread=0.25)
    if change == "temperature":
        params = dataclasses.replace(LONG, temperature=0.5)
    if change == "ends":
        params = dataclasses.replace(LONG, other_ends=(5,))
    if change == "rows":
        per_prompt = 7
    if change == "places":
        prompts = [*PROMPTS, [3] * 300]
    gc.disable()
    try:
        assert_same(*both(own, params, prompts, per_prompt, kept))
        assert first() is None  # and what it held is free at once, without a collector
    finally:
        gc.enable()


def test_a_large_cache_does_not_outlive_the_call(lm, monkeypatch):
    kept = Static()
    assert_same(*both(lm, static=kept))
    size = kept._decoder.nbytes
    layers, heads = len(kept._decoder._cache.keys), kept._decoder._cache.keys[0].shape[1]
    cache = 2 * layers * 24 * heads * 256 * 4 * 4  # 24 rows of 256 places, heads of 4, float32
    assert size == cache + 24 * 6 * 40 * 4  # and six copies of the logits
    monkeypatch.setattr(static_module, "_share", lambda device, share: int(share * 10 * (size - 1)))
    assert_same(*both(lm, static=kept))
    assert kept._decoder is None
    monkeypatch.setattr(static_module, "_share", lambda device, share: round(share * 10 * size))
    assert_same(*both(lm, static=kept))
    assert kept._decoder is not None


def test_a_cache_that_memory_bounds_takes_the_rows_in_turns(lm, monkeypatch):
    places, cache = 256, read_prompts(lm, [PROMPTS[0]]).cache
    decoder = Decoder(lm, read_prompts(lm, [PROMPTS[0]]), 3, places, LONG)
    assert decoder.nbytes == 3 * (row_bytes(cache, places) + 6 * 40 * 4)
    turns, run = [], Decoder.run
    monkeypatch.setattr(static_module, "_share", lambda device, share: int(share * 4 * 5.5 * row_bytes(cache, places)))
    monkeypatch.setattr(
        Decoder,
        "run",
        lambda self, read, source, numbers: (turns.append(len(source)), run(self, read, source, numbers))[1],
    )
    assert_same(*both(lm, dataclasses.replace(LONG, temperature=0.0)))
    assert turns == [5, 5, 5, 5, 4]


def test_memory_that_does_not_hold_the_cache_is_one_sentence(lm, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(static_module, "StaticKeys", full)
    with pytest.raises(
        UserError, match=r"^rollout\.engine=builtin: the cache of 24 sequences of 256 tokens \(0\.0 GiB\)"
    ):
        both(lm)


# ---- the step itself ----


def test_a_step_asks_nothing_of_the_device_and_makes_no_shape_of_what_it_finds(lm):
    """On the meta device a question has no answer: `.item()`, `nonzero`, a mask as an index would all raise."""
    meta = dataclasses.replace(lm, model=_meta(lm))
    read = read_prompts(lm, [PROMPTS[0]])
    decoder = Decoder(lm, read, 4, 256, LONG)
    for name, value in vars(decoder).items():
        if isinstance(value, torch.Tensor):
            setattr(decoder, name, value.to("meta"))
    cache = decoder._cache
    cache.column, cache.keys, cache.values = (
        cache.column.to("meta"), [k.to("meta") for k in cache.keys], [v.to("meta") for v in cache.values]
    )  # fmt: skip
    decoder.lm, decoder.device = meta, torch.device("meta")
    decoder.advance(4, 64)
    with pytest.raises(RuntimeError, match="meta"):
        bool(decoder._alive.any())  # what the test rests on


def _meta(lm):
    config = lm.model.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return wrap(model, None).model


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_attention_of_one_token_is_the_product_over_all_it_may_see(heads):
    hq, hkv = heads
    g = torch.Generator().manual_seed(hq)
    q, k, v = (torch.randn(3, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((hq, 1), (hkv, 11), (hkv, 11)))
    seen = torch.rand(3, 1, 1, 11, generator=g) < 0.6
    seen[..., 4] = True
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    repeated = [x.repeat_interleave(hq // hkv, 1) for x in (k, v)]
    scores = (q @ repeated[0].transpose(-1, -2)) * 0.3 + mask
    torch.testing.assert_close(attend_one_token(q, k, v, mask, 0.3), scores.softmax(-1) @ repeated[1])


def test_sizes_are_halves_down_to_a_few():
    assert [halves(n) for n in (1, 8, 9, 256, 100)] == [
        [1], [8], [5, 9], [8, 16, 32, 64, 128, 256], [7, 13, 25, 50, 100],
    ]  # fmt: skip


@pytest.mark.parametrize("pieces", [[1] * 40, [3, 300, 17, 1, 2], [70000, 5, 66000]])
def test_one_stream_of_numbers_however_it_is_read(pieces):
    stream = Uniform(5, CPU)
    whole = Uniform(5, CPU).next(sum(pieces))
    found = []
    for count in pieces:
        looked = stream.ahead(count + 3)
        found.append(stream.next(count))
        assert torch.equal(looked[:count], found[-1])
    assert torch.equal(torch.cat(found), whole)
    assert whole.min() >= 0 and whole.max() < 1 and len(whole.unique()) > 0.9 * len(whole)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(whole[:40], torch.rand(40, generator=generator))  # as drawn one by one, on the CPU


# ---- who is decoded how ----


def test_models_that_fixed_shapes_cannot_serve_say_why():
    assert all(why_not_static(language_model(name)) is None for name in ("qwen2", "llama", "gpt2"))

    def of(architecture, **changes):
        config = AutoConfig.for_model(
            architecture, vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64, **changes,
        )  # fmt: skip
        return wrap(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), None)

    assert why_not_static(of("mistral", sliding_window=8)) == "MistralForCausalLM has sliding windows"
    dynamic = of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert why_not_static(dynamic) == "LlamaForCausalLM has other rotary factors with every length above 64"
    capped = of("gemma2", head_dim=4, attn_logit_softcapping=50.0)
    assert why_not_static(capped) == "Gemma2ForCausalLM caps its attention scores"
    mixture = of("mixtral", num_local_experts=2)
    assert why_not_static(mixture) == "MixtralForCausalLM routes tokens to experts"
    own = language_model()
    keep_own_attention(own.model, "it was seen to differ")
    assert why_not_static(own) == "it was seen to differ"


def test_the_log_says_what_runs(lm, monkeypatch):
    assert Builtin(lm).name == "builtin, step by step: on the cpu"
    monkeypatch.setattr(LanguageModel, "device", property(lambda self: torch.device("cuda")))
    assert Builtin(lm).name == "builtin, its steps as CUDA graphs"
    assert Builtin(lm, plain="rollout.cuda_graphs=false").name == "builtin, step by step: rollout.cuda_graphs=false"
    drawing = {"overlap": True, "lora": {"dropout": 0.1}}  # dropout's draws would end a capture on another thread
    for discriminator, rollout, why in (
        ({}, {}, None),
        ({}, {"cuda_graphs": False}, "rollout.cuda_graphs=false"),
        (drawing, {}, "discriminator.lora.dropout=0.1 draws beside it (discriminator.overlap)"),
        (drawing | {"overlap": False}, {}, None),
        (drawing | {"lora": {}}, {}, None),
    ):
        given = {"model": {"path": "x"}, "discriminator": discriminator, "rollout": rollout}
        config = Config.model_validate(given)
        assert config.why_no_graphs == why
        assert config.rollout.why_no_graphs == (why if rollout else None)  # an evaluation has no update beside it
        assert config.model_copy(update={"algorithm": "grpo"}).why_no_graphs == config.rollout.why_no_graphs
    monkeypatch.setattr(lm.model, "keeps_own_attention", "it was seen to differ", raising=False)
    monkeypatch.setattr(lm.model.config, "_attn_implementation_internal", "sdpa")
    assert Builtin(lm).name == "builtin, step by step: it was seen to differ"
