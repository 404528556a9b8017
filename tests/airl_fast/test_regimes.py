"""Models that read long sequences with other rotary factors: a trace's numbers are its own, whatever is beside it."""

import copy
import random

import pytest
import torch
from transformers import AutoConfig

from airl_fast.config import DiscriminatorConfig, OptimConfig, RewardConfig
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.microbatch import TokenBudget, micro_batches, over_tokens
from airl_fast.models import check, forward
from airl_fast.models.adapters import trainable
from airl_fast.models.check import verify_packing
from airl_fast.models.forward import hidden_states, token_logprobs
from airl_fast.models.heads import make_head
from airl_fast.models.load import wrap
from airl_fast.models.regimes import ONE, Regimes, regimes_of
from airl_fast.pack import pack
from airl_fast.types import Kind
from tests.airl_fast.model_cases import CPU, EVERYTHING, language_model, plain_optimiser, trace
from tests.airl_fast.regime_cases import END, LENGTHS, MODELS, alone, crossing_traces, fresh, model_of, plain_model

# ---- what a configuration says ----


def test_lengths_that_may_share_a_pass():
    regimes = Regimes(switches=(10, 20))
    assert [regimes.of(n)[0] for n in (1, 10, 11, 20, 21, 10**6)] == [0, 0, 1, 1, 2, 2]
    assert [regimes.room(n) for n in (1, 10, 11, 20, 21)] == [10, 1, 10, 1, None]
    growing = Regimes(growing=10)
    assert growing.of(3) == growing.of(10) and len({growing.of(n) for n in range(10, 15)}) == 5
    assert [growing.room(n) for n in (1, 10, 11, 99)] == [10, 1, 1, 1]
    both = regimes | Regimes(switches=(15,), growing=30)
    assert both == Regimes(switches=(10, 15, 20), growing=30)
    assert [both.room(n) for n in (12, 21, 30, 31)] == [4, 10, 1, 1]
    assert bool(both) and bool(growing) and not ONE and ONE.of(1) == ONE.of(10**9) and ONE.room(5) is None


@pytest.mark.parametrize("name", MODELS)
def test_of_every_model_here(name):
    expected = Regimes(growing=END) if "dynamic" in name else Regimes(switches=(END,))
    assert regimes_of(plain_model(name)) == expected
    assert regimes_of(model_of(name).backbone) == expected


@pytest.mark.parametrize(
    ("rope", "more"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 2.0}, {}),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}, {}),
        ({"rope_type": "proportional", "factor": 2.0}, {}),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            {"original_max_position_embeddings": 8},
        ),
    ],
    ids=lambda value: value.get("rope_type", ""),
)
def test_other_kinds_read_all_lengths_alike(rope, more):
    torch.manual_seed(0)
    lm = language_model("llama")
    config = copy.deepcopy(lm.model.config)
    config.rope_parameters = {"rope_theta": 100.0, **rope, **more}
    plain = type(lm.model)._from_config(config, attn_implementation="sdpa")
    lm = wrap(copy.deepcopy(plain), None)
    assert not lm.regimes
    traces = crossing_traces(LENGTHS)
    expected = torch.cat([alone(plain, t.prompt_tokens, t.tokens) for t in traces])
    torch.testing.assert_close(token_logprobs(lm, pack(traces, CPU)), expected, atol=1e-5, rtol=1e-5)


# ---- packed is alone ----


def orders() -> list[list[int]]:
    shuffled = list(range(len(LENGTHS)))
    random.Random(3).shuffle(shuffled)
    return [list(range(len(LENGTHS))), list(range(len(LENGTHS)))[::-1], shuffled]


@pytest.mark.parametrize("order", orders(), ids=["as listed", "backwards", "shuffled"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("name", MODELS)
def test_the_policys_values_and_gradients_are_those_of_each_trace_alone(name, share, order):
    plain, lm = plain_model(name), model_of(name)
    traces = [crossing_traces(LENGTHS)[i] for i in order]
    batch = pack(traces, CPU, share=share, regimes=lm.regimes)
    weights = torch.randn(batch.num_loss_tokens, generator=torch.Generator().manual_seed(1)).split(batch.loss_lengths)
    for _ in range(2):  # the second time, the model has read long ones
        lm.model.zero_grad()
        ours = token_logprobs(lm, batch)
        (ours * torch.cat(weights)).sum().backward()
    expected = [alone(plain, t.prompt_tokens, t.tokens) for t in traces]
    torch.testing.assert_close(ours, torch.cat(expected), atol=2e-5, rtol=1e-5)
    for values, weight in zip(expected, weights, strict=True):
        (values * weight).sum().backward()
    wanted = dict(plain.named_parameters())
    for parameter_name, parameter in lm.model.named_parameters():
        scale = wanted[parameter_name].grad.abs().max().clamp_min(1.0)
        torch.testing.assert_close(
            parameter.grad / scale, wanted[parameter_name].grad / scale, atol=2e-5, rtol=1e-5, msg=parameter_name
        )


@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_checkpointing_are_the_same(name):
    """Layers are computed again in the backward pass, when the last pass was of another regime."""
    found = []
    for checkpointing in (False, True):
        lm = model_of(name)
        lm = wrap(trainable(lm.model, None, base="", seed=0, checkpointing=checkpointing, own=True), None)
        batch = pack(crossing_traces(LENGTHS), CPU, regimes=lm.regimes)
        token_logprobs(lm, batch).sum().backward()
        found.append([p.grad for p in lm.model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_without_the_cut_neighbours_would_be_felt(name, monkeypatch):
    """The comparisons of this file can fail."""
    plain, lm = plain_model(name), model_of(name)
    traces = crossing_traces(LENGTHS)
    expected = torch.cat([alone(plain, t.prompt_tokens, t.tokens) for t in traces])
    monkeypatch.setattr(forward, "regimes_of", lambda model: ONE)
    assert (token_logprobs(lm, pack(traces, CPU)) - expected).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("tokens", [EVERYTHING, 70, 1])
@pytest.mark.parametrize("name", MODELS)
def test_under_any_budget_and_budgets_are_kept(name, tokens):
    plain, lm = plain_model(name), model_of(name)
    traces = crossing_traces(LENGTHS)
    batch = pack(traces, CPU, regimes=lm.regimes)
    found = over_tokens(batch, TokenBudget(tokens, "x"), lambda part: token_logprobs(lm, part))
    expected = torch.cat([alone(plain, t.prompt_tokens, t.tokens) for t in traces])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "action", "logprob"])
@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_the_discriminators_logits_are_those_of_each_trace_alone(name, head):
    """Its reference changes at lengths of its own."""
    model = _discriminator(name, head)
    traces = crossing_traces(LENGTHS)
    found = model.logits(pack(traces, CPU, regimes=model.regimes))
    expected = []
    for t in traces:
        one = _discriminator(name, head)  # fresh: it has read nothing
        expected.append(one.logits(pack([t], CPU)))
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
    # `pack` of one trace is one plain sequence; said again without it
    states = fresh(plain_model(name).base_model)(
        input_ids=torch.tensor([traces[4].prompt_tokens + traces[4].tokens]), use_cache=False
    ).last_hidden_state[0]
    if head == "linear":
        z = states[5:] @ model.head.weight + model.head.bias
        torch.testing.assert_close(expected[4], z, atol=2e-5, rtol=1e-5)


def _discriminator(name: str, head: str, **config) -> Discriminator:
    backbone = model_of(name).backbone
    torch.manual_seed(1)
    made = make_head(head, backbone, 0)
    if head == "logprob":
        torch.nn.init.constant_(made.alpha, 0.3)
    settings = DiscriminatorConfig(head=head, action_rank=0, optim=OptimConfig(tokens_per_micro_batch=EVERYTHING))
    reference = model_of("dynamic" if name == "longrope" else "longrope", seed=5)
    return Discriminator(backbone, made, settings.model_copy(update=config), RewardConfig(), reference)


def test_pairs_across_the_change_are_compared_all_the_same():
    """A broken copy one token longer than its demonstration is of another regime: the pairwise loss needs both."""
    expert = crossing_traces([(5, END)])[0]
    broken = trace((*expert.tokens[:-1], 1, 2), Kind.PERTURBED, prompt=expert.prompt_tokens, group=5, pair=0)
    demonstration = trace(expert.tokens, Kind.EXPERT, prompt=expert.prompt_tokens, group=5)
    model = _discriminator("longrope", "linear", loss="pairwise", margin=5.0)
    batch = pack([demonstration, broken], CPU, regimes=model.regimes)
    assert batch.prompt_of == (0, 1)  # each has the prompt under its own factors
    stats = model.update(batch, plain_optimiser(model.parameters(), 0.0))
    z = [_discriminator("longrope", "linear").logits(pack([t], CPU)).mean() for t in (demonstration, broken)]
    torch.testing.assert_close(stats.loss, torch.nn.functional.softplus(5.0 - (z[0] - z[1])), atol=1e-3, rtol=1e-2)


def test_a_family_with_prompts_of_its_own_keeps_to_the_budget():
    """Unshared, or of another regime, a broken copy brings its own copy of the prompt."""
    traces = []
    for i in range(6):
        prompt = tuple(range(20))
        traces.append(trace([i] * 4, Kind.EXPERT, prompt=prompt, group=i))
        traces.append(trace([i] * 3, Kind.PERTURBED, prompt=prompt, group=i, pair=2 * i))
    batch = pack(traces, CPU, share=False)
    for part in micro_batches(batch, 100):
        assert part.batch.segments.num_rows <= 100


def test_a_prompt_shared_across_the_change_is_an_error():
    lm = model_of("longrope")
    with pytest.raises(RuntimeError, match="different regimes share a prompt"):
        hidden_states(lm.backbone, pack(crossing_traces([(5, 20), (5, 40)]), CPU))


# ---- nothing is remembered ----


@torch.no_grad()
@pytest.mark.parametrize("length", [10, END - 1, END, END + 1, END + 9])
@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_after_a_longer_one_is_as_before(name, length):
    """transformers' `dynamic` keeps the factors of the longest so far, and at exactly its limit goes on with them."""
    ids = torch.randint(40, (1, 90), generator=torch.Generator().manual_seed(2))
    first = fresh(plain_model(name))(input_ids=ids[:, :length], use_cache=False).logits
    model = model_of(name).model
    for long in (90, END + 5, 70):
        model(input_ids=ids[:, :long], use_cache=False)
    torch.testing.assert_close(model(input_ids=ids[:, :length], use_cache=False).logits, first, atol=1e-5, rtol=1e-5)
    copied = copy.deepcopy(model)
    copied(input_ids=ids, use_cache=False)
    torch.testing.assert_close(copied(input_ids=ids[:, :length], use_cache=False).logits, first, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_transformers_itself_remembers():
    """The comparison above can fail."""
    ids = torch.randint(40, (1, 90), generator=torch.Generator().manual_seed(2))
    model = plain_model("dynamic")
    first = model(input_ids=ids[:, :END], use_cache=False).logits
    model(input_ids=ids, use_cache=False)
    assert (model(input_ids=ids[:, :END], use_cache=False).logits - first).abs().max() > 0.05


# ---- the check at load ----


@pytest.mark.parametrize("name", MODELS)
def test_every_model_here_passes_the_check_at_load(name):
    lm = model_of(name)
    verify_packing(lm)
    assert lm.backbone.config._attn_implementation == "airl_auto"


@pytest.mark.parametrize("name", [name for name in MODELS if "longrope" in name])
def test_a_change_that_is_not_known_of_is_found_at_load(name, monkeypatch):
    """As for code of a model's own that looks at the longest position: nothing in its configuration says so."""
    lm = model_of(name)
    for module in (check, forward):
        monkeypatch.setattr(module, "regimes_of", lambda model: ONE)
    with pytest.raises(UserError, match=r"^model.path: a \w+ reads a sequence otherwise .*9 tokens beside 192: its"):
        verify_packing(lm)


def test_a_change_that_a_trained_model_hardly_feels_is_found_at_load(monkeypatch):
    """Over a few tokens the published factors differ by little, and states by less than bfloat16 rounds."""
    config = plain_model("longrope").config
    config.rope_parameters["long_factor"] = [1.02, 1.02, 1.1, 1.2]
    plain = type(plain_model("longrope"))._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.qkv_proj.weight.mul_(0.01)
    lm = wrap(plain, None)
    for module in (check, forward):
        monkeypatch.setattr(module, "regimes_of", lambda model: ONE)
    with pytest.raises(UserError, match=r"its rotations differ"):
        verify_packing(lm)


def test_a_window_that_a_model_does_not_keep_is_found_at_load():
    """Moshi's configuration has one that transformers' code ignores: past it, packed rows would be masked otherwise."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "moshi", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, ffn_dim=48,
        max_position_embeddings=64, sliding_window=12, initializer_range=0.3,
    )  # fmt: skip
    from transformers import MoshiForCausalLM

    lm = wrap(MoshiForCausalLM(config), None)
    with pytest.raises(UserError, match="past its sliding window its states differ"):
        verify_packing(lm)


def test_the_check_leaves_the_window_as_it_was():
    config = AutoConfig.for_model(
        "mistral", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        num_key_value_heads=2, sliding_window=12, initializer_range=0.3,
    )  # fmt: skip
    from transformers import MistralForCausalLM

    lm = wrap(MistralForCausalLM(config), None)
    verify_packing(lm)
    assert lm.model.config.sliding_window == lm.backbone.config.sliding_window == 12
