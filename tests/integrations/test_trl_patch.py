"""What `patch` replaces and restores, what it refuses, and the values of the functions it puts in."""

import contextlib
import importlib
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from airl_kernels.integrations import trl as ours
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from tests.integrations.trl_cases import relative, small_model

trl = pytest.importorskip("trl", reason="TRL is not installed; `make peers` installs it.")
utils = importlib.import_module("trl.trainer.utils")
kernels = importlib.import_module("trl.kernels.chunked_logprob")

# As published. Not as names of this module: `patch` rebinds those, as it does any module's.
TRL = SimpleNamespace(
    head=utils._ChunkedLogProbFunction, selective=utils.selective_log_softmax, compacts=utils._use_triton
)


@pytest.fixture(autouse=True)
def as_published():
    """Every test starts and must end with TRL's own functions."""
    published = held()
    assert published == ((TRL.head, TRL.selective, TRL.compacts), (TRL.head, TRL.compacts))
    yield
    ours.unpatch()
    assert all(
        a is b for mine, theirs in zip(held(), published, strict=True) for a, b in zip(mine, theirs, strict=True)
    )


def held() -> tuple[tuple, tuple]:
    seams = utils._ChunkedLogProbFunction, utils.selective_log_softmax, utils._use_triton
    return seams, (kernels.ChunkedLogProbFunction, kernels._use_triton)


# ---- replacing and restoring ----


def test_every_module_that_holds_a_function_gets_ours_and_the_original_back():
    early = importlib.import_module("trl.experimental.cpo.cpo_trainer")  # imported the function before the patch
    late = "trl.experimental.sdpo.loss_utils"  # imports it after the patch
    sys.modules.pop(late, None)
    assert early.selective_log_softmax is TRL.selective
    ours.patch()
    after = importlib.import_module(late)
    mine = utils.selective_log_softmax
    assert mine is not TRL.selective and early.selective_log_softmax is mine and after.selective_log_softmax is mine
    assert utils._ChunkedLogProbFunction is not TRL.head
    assert kernels.ChunkedLogProbFunction is sys.modules["trl.kernels"].ChunkedLogProbFunction
    assert kernels.ChunkedLogProbFunction is utils._ChunkedLogProbFunction
    assert utils._use_triton is not TRL.compacts
    assert kernels._use_triton is TRL.compacts  # TRL's own kernels go on asking their own question
    ours.unpatch()
    assert early.selective_log_softmax is TRL.selective and after.selective_log_softmax is TRL.selective
    assert sys.modules["trl.kernels"].ChunkedLogProbFunction is TRL.head


def test_patching_twice_and_nesting_are_safe():
    ours.unpatch()  # nothing to undo
    ours.patch()
    first = held()
    ours.patch()
    assert held() == first
    with ours.patched() as calls:
        utils.selective_log_softmax(torch.zeros(1, 3), torch.tensor([1]))
        assert held() == first and calls().selective_log_softmax == 1
    assert held() == first  # the outer patch stays
    ours.unpatch()
    assert held()[0] == (TRL.head, TRL.selective, TRL.compacts)
    with pytest.raises(ZeroDivisionError), ours.patched() as calls:
        assert calls() == ours.Calls()  # counts begin anew
        raise ZeroDivisionError
    assert held()[0] == (TRL.head, TRL.selective, TRL.compacts)


def refuse(match: str) -> None:
    before = held()
    for use in (ours.patch, lambda: ours.patched().__enter__()):
        with pytest.raises(RuntimeError, match=match) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert held() == before


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0.dev0", "1.160.0"])
def test_another_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    refuse(rf"supports TRL 1\.16, not {re.escape(version)}; install trl==1\.16\.0\.")


def test_no_trl_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RuntimeError, match=r"TRL is not installed; install trl==1\.16\.0\."):
        ours.patch()


@pytest.mark.parametrize(
    "name", ["_ChunkedLogProbFunction", "selective_log_softmax", "_use_triton", "add_fused_lm_head"]
)
def test_a_missing_function_is_refused(monkeypatch, name):
    with monkeypatch.context() as change:
        change.delattr(utils, name)
        with pytest.raises(RuntimeError, match=rf"trl\.trainer\.utils of TRL 1\.16\.0 has no {name} to replace"):
            ours.patch()


def test_other_arguments_are_refused(monkeypatch):
    class Head:
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            """Its arguments alone are looked at."""

    with monkeypatch.context() as change:
        change.setattr(utils, "_ChunkedLogProbFunction", Head)
        refuse(r"ChunkedLogProbFunction.forward of TRL 1.16.0 takes \(ctx, hidden, weight, targets\), not \(ctx, hid")
    with monkeypatch.context() as change:
        change.setattr(utils, "selective_log_softmax", lambda logits, index: None)
        refuse(r"selective_log_softmax of TRL 1.16.0 takes \(logits, index\), not \(logits, index, temperature, row_m")
    with monkeypatch.context() as change:
        change.setattr(utils, "add_fused_lm_head", lambda model: None)
        refuse("does not call _ChunkedLogProbFunction or _use_triton, so patching would have no effect")


# ---- the fused head ----


def scored(model, labels: Tensor, patched: bool, *, weights: tuple[float, float] = (1.0, 0.3), **forward: object):
    """(log-probabilities, entropies, gradients) of a model's fused head, under a loss that uses both."""
    model.zero_grad(set_to_none=True)
    ids = labels.clamp_min(0)
    if patched:
        ours.patch()
    try:
        outputs = model(input_ids=ids, labels=labels, fused_lm_head=True, **forward)
    finally:
        ours.unpatch()
    slope = torch.linspace(-1, 1, outputs.log_probs.numel()).view_as(outputs.log_probs)
    loss = (outputs.log_probs * slope).sum() * weights[0]
    if outputs.entropy is not None:
        loss = loss + outputs.entropy.sum() * weights[1]
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return outputs.log_probs.detach(), None if outputs.entropy is None else outputs.entropy.detach(), grads


def head_of(architecture: str):
    """qwen2: tied. llama: with a bias. gemma2: with a softcap, and tied."""
    if architecture != "gemma2":
        model = small_model(architecture)
        if architecture == "llama":
            torch.manual_seed(1)
            model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
        return model
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=90, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")], ids=["plain", "entropy"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma2"])
def test_the_fused_head_gives_trls_values_and_gradients(architecture, outputs, frozen):
    model = head_of(architecture)
    if architecture == "llama":
        model.config.logit_scale = 0.7
    if frozen:
        for parameter in model.get_output_embeddings().parameters():
            parameter.requires_grad_(False)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    torch.manual_seed(2)
    labels = torch.randint(model.config.vocab_size, (3, 9))
    labels[0, :6] = -100
    labels[2] = -100
    expected, mine = scored(model, labels, patched=False), scored(model, labels, patched=True)
    assert ours.calls() == ours.Calls(linear_logprob=1)
    torch.testing.assert_close(mine[0], expected[0], rtol=1e-5, atol=1e-5)
    assert (mine[0] != 0).sum() == (labels[:, 1:] != -100).sum() == 11
    assert (mine[1] is None) == ("entropy" not in outputs)
    if mine[1] is not None:
        torch.testing.assert_close(mine[1], expected[1], rtol=1e-5, atol=1e-5)
    assert mine[2].keys() == expected[2].keys()
    for name in expected[2]:
        assert relative(mine[2][name], expected[2][name]) < 2e-5, name


def test_ignored_rows_reach_no_product(monkeypatch):
    """The hidden states that the operation is given are those of the scored positions, on the CPU as on GPUs."""
    seen = []
    real = ours.linear_logprob
    monkeypatch.setattr(ours, "linear_logprob", lambda hidden, *a, **k: seen.append(hidden) or real(hidden, *a, **k))
    model = small_model()
    utils.add_fused_lm_head(model)
    labels = torch.randint(50, (2, 8))
    labels[:, :5] = -100
    scored(model, labels, patched=True)
    assert [tuple(hidden.shape) for hidden in seen] == [(6, 32)]


def test_a_batch_without_a_scored_token_has_a_gradient_of_zero():
    model = small_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    logprobs, entropy, gradients = scored(model, torch.full((2, 5), -100), patched=True)
    assert not logprobs.any() and not entropy.any()
    assert gradients and all(not gradient.any() for gradient in gradients.values())


def test_autocast_and_mixed_dtypes_follow_trl():
    """Hidden states in bfloat16 over a float32 head take the head in bfloat16; autocast decides over both."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 32), torch.randn(300, 32)
    targets = torch.randint(300, (40,))
    exact = TRL.head.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ("entropy",))
    ours.patch()
    mixed = utils._ChunkedLogProbFunction.apply(hidden.bfloat16(), weight, None, targets, 1.0, 64, None, 1.0, ())
    with torch.autocast("cpu", torch.bfloat16):
        cast = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ("entropy",))
    ours.unpatch()
    published = TRL.head.apply(hidden.bfloat16(), weight, None, targets, 1.0, 64, None, 1.0, ())
    assert mixed[0].dtype == cast[0].dtype == torch.float32
    torch.testing.assert_close(mixed[0], published[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(cast[0], mixed[0])
    assert 1e-4 < relative(cast[0], exact[0]) < 1e-2 and relative(cast[1], exact[1]) < 1e-2


def test_the_heads_gradient_under_autocast_is_that_of_trl():
    """From bfloat16 hidden states and a float32 head: float32, not rounded on the way, as TRL's own function has it."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(40, 32).bfloat16(), torch.randn(300, 32), torch.randn(300)
    targets, found = torch.randint(300, (40,)), []
    for patched in (False, True):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        with ours.patched() if patched else contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16):
            head = utils._ChunkedLogProbFunction
            result = head.apply(leaves[0], leaves[1], leaves[2], targets, 1.0, 64, None, 1.0, ("entropy",))
            found.append(torch.autograd.grad(result[0].sum(), leaves))
    seen = [t.bfloat16().double().requires_grad_() for t in (hidden, weight, bias)]  # what the products see
    logp = (seen[0] @ seen[1].T + seen[2]).log_softmax(-1)
    exact = torch.autograd.grad(logp.gather(1, targets[:, None]).sum(), seen)
    for published, mine, truth, leaf in zip(*found, exact, (hidden, weight, bias), strict=True):
        assert mine.dtype == published.dtype == leaf.dtype
        assert relative(mine, truth) < 1.5 * relative(published, truth) < 0.02
    assert not torch.equal(found[1][1], found[1][1].bfloat16().float())


def test_outputs_we_do_not_compute_stay_with_trl(caplog):
    torch.manual_seed(0)
    inputs = torch.randn(6, 8), torch.randn(20, 8), None, torch.randint(20, (6,)), 1.0, 16, None, 1.0
    ours._warned.clear()
    with ours.patched() as calls, caplog.at_level("WARNING"):
        for _ in range(2):
            found = utils._ChunkedLogProbFunction.apply(*inputs, ("log_probs", "is_top1"))
        assert calls() == ours.Calls(left_to_trl=2)
    expected = TRL.head.apply(*inputs, ("log_probs", "is_top1"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[4], expected[4])
    said = [record.message for record in caplog.records if record.name == ours.__name__]
    assert said == [
        "TRL asks for the outputs is_top1 of the fused head, which airl_kernels does not compute: "
        "TRL's own function runs."
    ]


def test_weights_that_are_no_plain_matrix_are_refused():
    hidden, targets = torch.randn(2, 8), torch.tensor([0, 1])

    def use(weight: object) -> None:
        utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16, None, 1.0, ())

    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; `make setup` installs it.")
    four = bnb.nn.Linear4bit(8, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu").weight
    wide = bnb.nn.Linear4bit(8, 32, bias=False, quant_type="nf4", quant_storage=torch.float32).to("cpu").weight
    assert four.dtype == torch.uint8 and wide.dtype == torch.float32
    partitioned = torch.nn.Parameter(torch.randn(4, 8))
    partitioned.ds_id = 0
    with ours.patched():
        with pytest.raises(TypeError, match="dtype torch.uint8; quantised weights are not supported"):
            use(four)
        with pytest.raises(TypeError, match=r"is quantised \(Params4bit, torch.float32\); leave lm_head out"):
            use(wide)
        with pytest.raises(TypeError, match=r"is quantised \(Tensor, torch.float8_e4m3fn\)"):
            use(torch.zeros(4, 8).to(torch.float8_e4m3fn))
        with pytest.raises(TypeError, match="must be a torch.Tensor, got Linear; pass the layer's `.weight`"):
            use(torch.nn.Linear(8, 4))
        with pytest.raises(RuntimeError, match="partitioned by DeepSpeed ZeRO-3"):
            use(partitioned)
    assert ours.calls().left_to_trl == 0


# ---- selective_log_softmax ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits_give_trls_values_and_gradients(dtype, masked):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 5, 33)).to(dtype)
    index = torch.randint(33, (2, 5))
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 1, 1]]) if masked else None
    slope = torch.randn(2, 5)
    found = []
    for patched in (False, True):
        leaf = logits.clone().requires_grad_()
        if patched:
            ours.patch()
        result = utils.selective_log_softmax(leaf, index, 0.6, mask)
        ours.unpatch()
        (result.float() * slope).sum().backward()
        found.append((result.detach(), leaf.grad))
    (published, expected), (mine, gradient) = found
    assert mine.dtype == torch.float32
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    torch.testing.assert_close(mine, published.float(), **close)
    torch.testing.assert_close(gradient, expected, **close)
    if masked:
        assert not mine[mask == 0].any() and not gradient[mask == 0].any()


def test_several_targets_a_row_stay_with_trl():
    torch.manual_seed(0)
    logits, index = torch.randn(2, 4, 9), torch.randint(9, (2, 4, 3))
    with ours.patched() as calls:
        found = utils.selective_log_softmax(logits, index)
        assert calls() == ours.Calls(left_to_trl=1)
        one = utils.selective_log_softmax(logits, index[..., 0].int())
    assert torch.equal(found, TRL.selective(logits, index))
    torch.testing.assert_close(one, found[..., 0], rtol=1e-6, atol=1e-6)


# ---- vLLM ----


def test_trl_does_not_support_the_vllm_release_that_we_sample_with(monkeypatch):
    """docs/integrations/trl.md says so; when TRL's range moves, this fails and the run can be compared under vLLM."""
    import trl.import_utils as imports

    pins = (Path(__file__).parents[2] / "constraints-vllm.txt").read_text()
    installed = re.search(r"^vllm(?:-cpu)?==(\S+)$", pins, re.MULTILINE).group(1)

    def said(version: str) -> list[str]:
        monkeypatch.setattr(imports, "_is_package_available", lambda name, return_version: (True, version))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            imports.is_vllm_available()
        return [str(warning.message) for warning in caught]

    assert installed == "0.32.0"
    assert said(installed)[0].startswith(
        "TRL currently supports vLLM versions from 0.22.0 to 0.31.0. You have version 0.32.0 installed."
    )
    assert said("0.31.0") == []
