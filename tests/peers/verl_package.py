"""Our verl adapter against verl's own functions. Needs build/peers/site: `make peer-tests` installs it and runs this.

verl's Triton cross entropy needs a GPU; its torch implementation of the same quantities, FusedLinearForPPO, is what
log-probabilities and entropies are compared with.
"""

import numpy as np
import pytest
import torch
import verl.models.transformers.dense_common as dense
from airl_kernels.integrations import verl as ours
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional as fused
from verl.utils.kernel import linear_cross_entropy as kernel

MASKS = {
    "all": torch.ones(3, 7),
    "padding": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5]),
    "tool output": torch.tensor([[1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 1]]).bool(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0)])
def test_gae_equals_verl_where_the_mask_is_set(mask, gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 7), torch.randn(3, 7)
    numeric = mask.to(torch.int64)  # verl computes 1 - mask
    expected = core_algos.compute_gae_advantage_return(rewards, values, numeric, gamma, lam)
    result = ours.compute_gae_advantage_return(rewards, values, numeric, gamma, lam)
    for mine, theirs in zip(result, expected, strict=True):
        assert torch.allclose(mine[mask.bool()], theirs[mask.bool()], rtol=1e-5, atol=1e-6)
        assert (mine[~mask.bool()] == 0).all()


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("index", [["a", "b", "a", "c", "b", "a"], [3, 1, 3, 7, 1, 3]])
def test_grpo_equals_verl(index, by_std):
    torch.manual_seed(1)
    rewards, mask = torch.zeros(6, 5), (torch.rand(6, 5) > 0.3).long()
    rewards[:, -1] = torch.randn(6)
    labels = np.array(index, dtype=object)
    expected, _ = core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask, labels, 1e-6, by_std)
    result, again = ours.compute_grpo_outcome_advantage(rewards, mask, labels, 1e-6, by_std)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-6) and torch.equal(result, again)


@pytest.mark.parametrize("shape", [(11,), (3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear_equals_verl_with_gradients(shape, temperature):
    torch.manual_seed(2)
    ids = torch.randint(0, 37, shape)
    up = torch.randn(shape), torch.randn(shape)
    results = []
    for module in (fused.FusedLinearForPPO(), ours.FusedLinearForPPO()):
        torch.manual_seed(3)
        hidden = torch.randn(*shape, 16, requires_grad=True)
        weight = torch.randn(37, 16, requires_grad=True)
        logprobs, entropy = module(hidden * 1.0, weight, ids, temperature)
        (logprobs * up[0] + entropy * up[1]).sum().backward()
        results.append((logprobs, entropy, hidden.grad, weight.grad))
    for theirs, mine in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_patch_reaches_every_name_and_unpatch_returns_it():
    holders = [
        (fused, "FusedLinearForPPO"),
        (kernel, "linear_cross_entropy"),
        (core_algos, "compute_gae_advantage_return"),
        (core_algos, "compute_grpo_outcome_advantage"),
    ]
    before = [getattr(module, name) for module, name in holders]
    registry = dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    with ours.patched():
        assert [getattr(module, name) for module, name in holders] == [getattr(ours, name) for _, name in holders]
        assert core_algos.get_adv_estimator_fn("gae") is ours.compute_gae_advantage_return
        assert core_algos.get_adv_estimator_fn("grpo") is ours.compute_grpo_outcome_advantage
        with pytest.raises(RuntimeError, match="patched already"):
            ours.patch()
    assert [getattr(module, name) for module, name in holders] == before
    assert registry == core_algos.ADV_ESTIMATOR_REGISTRY
    with pytest.raises(RuntimeError, match="not patched"):
        ours.unpatch()


def test_a_model_patched_by_verl_gives_the_same_log_probabilities_through_ours():
    """verl's own forward with fused kernels, on a small Qwen2, before and after patch()."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model, ids = Qwen2ForCausalLM(config), torch.randint(0, 64, (2, 9))

    def run(forward) -> tuple[torch.Tensor, ...]:
        model.zero_grad()
        output = forward(model, input_ids=ids, temperature=0.9, return_dict=True)
        (output.log_probs.mean() + 0.1 * output.entropy.mean()).backward()
        return output.log_probs.detach(), output.entropy.detach(), model.lm_head.weight.grad.clone()

    expected = run(dense.forward_with_torch_backend)
    with ours.patched():
        for forward in (dense.forward_with_torch_backend, dense.forward_with_triton_backend):
            for mine, theirs in zip(run(forward), expected, strict=True):
                assert torch.allclose(mine.view_as(theirs), theirs, rtol=1e-4, atol=1e-6)


def test_an_unsupported_version_is_refused(monkeypatch):
    monkeypatch.setattr(ours._PATCH, "supported", ("0.1",))
    with pytest.raises(RuntimeError, match="verl 0.9.1 is not supported, only 0.1"):
        ours.patch()
