"""Our Liger-compatible surfaces against the installed Liger-Kernel. Its own test files: `make peer-tests`."""

import inspect

import pytest
import torch
from airl_kernels.integrations import liger as ours
from airl_kernels.testing import product_count

chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger-Kernel is not installed; `make peers`.")
theirs = pytest.importorskip("liger_kernel.transformers.grpo_loss", reason="Liger-Kernel is not installed.")

BATCH, LENGTH, WIDTH, VOCAB = 3, 11, 8, 29


class Case:
    """Inputs of one call, alike for both sides."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.hidden = torch.randn(BATCH, LENGTH, WIDTH).to(dtype)
        self.weight, self.bias = torch.randn(VOCAB, WIDTH).to(dtype), torch.randn(VOCAB).to(dtype)
        self.ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
        self.mask = torch.ones(BATCH, LENGTH)
        self.mask[0, 7:] = self.mask[1, ::3] = 0
        self.advantages = torch.tensor([-1.2, 0.7, 0.0])
        logits = self.hidden.float() @ self.weight.float().T + self.bias.float()
        current = torch.log_softmax(logits, -1).gather(-1, self.ids[..., None])[..., 0]
        self.old, self.ref = (current + 0.3 * torch.randn_like(current) for _ in range(2))

    def run(self, module: torch.nn.Module, old: bool = True, **more) -> list[torch.Tensor]:
        """[loss, metrics..., gradients of hidden, weight and bias]"""
        leaves = [t.clone().requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        reference = {"ref_per_token_logps": self.ref} if module.use_ref_model else {}
        loss, metrics = module(
            leaves[0], leaves[1], self.ids, self.mask, self.advantages, leaves[2],
            old_per_token_logps=self.old if old else None, **reference, **more,
        )  # fmt: skip
        return [loss.detach(), *metrics, *torch.autograd.grad(loss, leaves)]


def assert_equal(mine: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    assert len(mine) == len(reference)
    for ours_, theirs_ in zip(mine, reference, strict=True):
        assert torch.allclose(ours_, theirs_, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "setting",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo", "beta": 0.0, "use_ref_model": False},
        {"loss_type": "dr_grpo", "max_completion_length": 20, "temperature": 0.7},
        {"loss_type": "dapo", "delta": 1.5, "epsilon_high": 0.28},
        {"loss_type": "dapo", "delta": 1.1},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 2.0},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
    ],
    ids=str,
)
def test_loss_metrics_and_gradients_equal_liger(setting, old):
    case = Case()
    reference = case.run(chunked.LigerFusedLinearGRPOLoss(compiled=False, **setting), old)
    assert_equal(case.run(ours.LigerFusedLinearGRPOLoss(compiled=False, **setting), old), reference)


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, LENGTH)], ids=["sequence", "token"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_without_an_old_policy_the_levels_meet(loss_type, shape):
    """A ratio of 1 has the same gradient at both levels, unless the correction differs within a sequence."""
    case, ratio = Case(), torch.rand(shape) + 0.3
    setting = {"loss_type": loss_type, "importance_sampling_level": "sequence", "compiled": False}
    reference = case.run(chunked.LigerFusedLinearGRPOLoss(**setting), False, vllm_is_ratio=ratio)
    assert_equal(case.run(ours.LigerFusedLinearGRPOLoss(**setting), False, vllm_is_ratio=ratio), reference)


@pytest.mark.parametrize(
    ("level", "old", "shape", "count"),
    [("token", True, None, 3), ("token", False, None, 3), ("sequence", False, None, 3), ("sequence", True, None, 4),
     ("sequence", False, (BATCH, 1), 3), ("sequence", False, (BATCH, LENGTH), 4)],
)  # fmt: skip
def test_products(level, old, shape, count):
    case = Case()
    module = ours.LigerFusedLinearGRPOLoss(importance_sampling_level=level)
    ratio = None if shape is None else torch.ones(shape)
    run = lambda: case.run(module, old, vllm_is_ratio=ratio)  # noqa: E731
    assert product_count(run, int(case.mask.sum()), WIDTH, VOCAB) == count


@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_autocast_casts_the_head_and_keeps_its_gradient(loss_type):
    """bfloat16 hidden states and a float32 head: the values of a head cast before, the gradient in float32."""
    case = Case()
    module = ours.LigerFusedLinearGRPOLoss(loss_type=loss_type)
    case.hidden = case.hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_, d_hidden, d_weight, d_bias = case.run(module)
    narrow = Case()
    narrow.hidden, narrow.weight, narrow.bias = (t.bfloat16() for t in (case.hidden, case.weight, case.bias))
    expected, *_, wanted_hidden, wanted_weight, wanted_bias = narrow.run(module)
    assert torch.equal(loss, expected) and torch.equal(d_hidden, wanted_hidden)
    assert d_weight.dtype == d_bias.dtype == torch.float32
    assert torch.equal(d_weight.bfloat16(), wanted_weight) and torch.equal(d_bias.bfloat16(), wanted_bias)
    assert not torch.equal(d_weight, wanted_weight.float())


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1), (BATCH, LENGTH)])
@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "vespo"])
def test_the_sampler_correction_and_the_global_count_equal_liger(loss_type, shape):
    case, ratio = Case(), torch.rand(shape) + 0.3
    more = {"vllm_is_ratio": ratio, "num_items_in_batch": 77.0}
    reference = case.run(chunked.LigerFusedLinearGRPOLoss(compiled=False, loss_type=loss_type), **more)
    assert_equal(case.run(ours.LigerFusedLinearGRPOLoss(loss_type=loss_type), **more), reference)


def test_what_a_masked_token_holds_never_matters():
    """Not even NaN, which Liger's sums carry on: its zeros multiply."""
    case = Case()
    expected = case.run(ours.LigerFusedLinearGRPOLoss(loss_type="grpo"))
    case.hidden[case.mask == 0] = torch.nan
    case.old[case.mask == 0] = torch.inf
    result = case.run(ours.LigerFusedLinearGRPOLoss(loss_type="grpo"))
    assert_equal(result, expected)
    assert (result[3][case.mask == 0] == 0).all()


def test_the_triton_form_by_value_and_with_leaf_and_intermediate_logits():
    """From logits: reduced as the linear form, per token summing to it; the gradient also when made in place."""
    case = Case()
    logits = case.hidden @ case.weight.T + case.bias
    logits = torch.cat((logits, torch.randn(BATCH, 1, VOCAB)), 1)
    arguments = (case.old, case.ref, case.ids, case.advantages, case.mask, 1.0, 0.04, 0.2, 0.2)
    expected = case.run(chunked.LigerFusedLinearGRPOLoss(compiled=False, loss_type="bnpo"))
    gradients = []
    for intermediate in (False, True):
        leaf = logits.clone().requires_grad_()
        given = leaf * 1 if intermediate else leaf
        loss, metrics = ours.triton_grpo_loss(given, *arguments, loss_type="bnpo", reduce=True)
        assert_equal([loss, *metrics], expected[:3])
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients) and (gradients[0][:, -1] == 0).all()
    assert torch.allclose((gradients[0][:, :-1].reshape(-1, VOCAB)).sum(0), expected[5], atol=1e-6)
    tokens, kl, clipped = ours.triton_grpo_loss(logits, *arguments, loss_type="bnpo")
    count = case.mask.sum()
    assert_equal([tokens.sum() / count, kl.sum() / count, clipped.sum() / count], expected[:3])


@pytest.mark.parametrize("name", ["LigerFusedLinearGRPOLoss", "triton_grpo_loss"])
def test_signatures_are_those_of_liger(name):
    """Names, order and defaults, so that positional and keyword calls mean the same."""
    source = chunked if hasattr(chunked, name) else theirs
    for mine, reference in [(getattr(ours, name), getattr(source, name))] + (
        [(getattr(ours, name).forward, getattr(source, name).forward)] if name[0] == "L" else []
    ):
        mine, reference = (inspect.signature(f).parameters.values() for f in (mine, reference))
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in reference]


def test_bfloat16_luspo_is_as_near_to_float64_as_liger():
    """The failures that `make peer-tests` explains: near a loss of 0 the noise of either exceeds Liger's tolerance."""
    setting = {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.1, "compiled": False}
    errors = {"ours": 0.0, "liger": 0.0}
    for seed in range(20):
        case = Case(torch.bfloat16, seed)
        wide = Case(torch.bfloat16, seed)
        wide.hidden, wide.weight, wide.bias = wide.hidden.double(), wide.weight.double(), wide.bias.double()
        exact = wide.run(ours.LigerFusedLinearGRPOLoss(**setting))[0]
        for name, kind in (("ours", ours), ("liger", chunked)):
            errors[name] += (case.run(kind.LigerFusedLinearGRPOLoss(**setting))[0] - exact).abs().item()
    assert 0 < errors["ours"] < 2 * errors["liger"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss_type": "ppo"}, "Unknown loss_type 'ppo'"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level must be token or sequence"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta .* is not supported for loss_type='cispo'"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "must be positive"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"delta": -1.0}, "delta must be positive"),
    ],
)
def test_options_without_meaning_raise(setting, message):
    with pytest.raises(ValueError, match=message):
        Case().run(ours.LigerFusedLinearGRPOLoss(**setting))


def test_missing_or_misshapen_inputs_raise():
    case = Case()
    module = ours.LigerFusedLinearGRPOLoss()
    inputs = case.hidden, case.weight, case.ids, case.mask, case.advantages
    with pytest.raises(ValueError, match="use_ref_model needs ref_per_token_logps, or ref_input"):
        module(*inputs)
    with pytest.raises(ValueError, match=r"vllm_is_ratio must have shape \[3\], \[3, 1\] or \[3, 11\], got \[2\]"):
        module(*inputs, ref_per_token_logps=case.ref, vllm_is_ratio=torch.ones(2))
    with pytest.raises(ValueError, match=r"logits must have shape \[B, T\+1, V\]"):
        ours.triton_grpo_loss(torch.randn(3, 11, 5), None, None, case.ids, case.advantages, beta=0.0)
    with pytest.raises(ValueError, match=r"beta=0.04 needs ref_logp"):
        ours.triton_grpo_loss(torch.randn(3, 12, 29), None, None, case.ids, case.advantages)


def test_only_the_listed_failures_of_the_peer_tests_are_explained():
    from tests.peers.liger import FileResult

    test = "test/chunked_loss/test_grpo_loss.py::test_correctness[None-sequence-luspo-False-False-True-0.1-0.2-0.2-1.0-"
    known, wide = f"{test}True-1.0-dtype0-0.1-0.5-3-47-31-123]", f"{test}True-1.0-dtype1-2e-05-0.001-3-47-31-123]"
    outcomes = [{"test": name, "outcome": "failed", "reason": ""} for name in (known, wide)]
    outcomes.append({"test": "passing", "outcome": "passed", "reason": ""})
    assert FileResult(path="a", outcomes=outcomes, calls=1, left_out="0").unexplained() == [wide]
