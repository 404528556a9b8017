"""Our OpenRLHF adapter against OpenRLHF's own functions. `make peer-tests` installs what it needs and runs this.

OpenRLHF imports flash-attn, which does not build without a GPU, for packed samples only. Empty functions stand for
it here, so that the package imports; they raise when called. Everything compared is the package's own code.
"""

import importlib.machinery
import itertools
import sys
import types

import peft  # noqa: F401  transformers and peft look for flash-attn themselves: before the stand-in exists
import pytest
import torch
import transformers
from airl_kernels.integrations import openrlhf as ours


def absent(*_args, **_kwargs):
    raise RuntimeError("flash-attn is not installed.")


if "flash_attn" not in sys.modules:
    for name, functions in {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
    }.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(dict.fromkeys(functions, absent))
        sys.modules[name] = module

import openrlhf.models as package  # noqa: E402
from openrlhf.models import actor, loss, utils  # noqa: E402

SETTINGS = [
    {},
    {"token_level_loss": False},
    {"dual_clip": 3.0, "clip_eps_high": 0.28},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.01, "clip_eps_high": 0.02},
    {"policy_loss_type": "gspo", "is_correction_level": "token", "clip_eps_low": 0.01, "clip_eps_high": 0.02},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.9, 1.1]},
    {"is_correction_level": "token", "is_correction_mode": "mask", "is_correction_threshold": [0.9, 1.1]},
    {"is_correction_level": "seq", "is_correction_mode": "mask", "is_correction_threshold": [0.99, 1.01]},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": [0.0, 0.01]},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.03]},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_their_gradient_equal_openrlhf(dtype, temperature):
    torch.manual_seed(0)
    labels, up = torch.randint(0, 50, (3, 8)), torch.randn(3, 8)
    results = []
    for function in (utils.log_probs_from_logits, ours.log_probs_from_logits):
        torch.manual_seed(1)
        leaf = (torch.randn(3, 8, 50) * 3).to(dtype).requires_grad_()
        logprobs = function(leaf * 1, labels, temperature)
        (logprobs.float() * up).sum().backward()
        results.append((logprobs.float(), leaf.grad.float()))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for theirs, mine in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, **tolerance)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("sharded", [False, True])
def test_policy_loss_and_its_gradient_equal_openrlhf(setting, sharded):
    torch.manual_seed(2)
    old = -torch.rand(4, 9) * 3 - 0.01
    rollout, start = old + 0.1 * torch.randn(4, 9), old + 0.3 * torch.randn(4, 9)
    advantages = torch.randn(4, 9)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0, 1, 1, 0, 0, 1, 1, 1, 0], [1] + [0] * 8]).float()
    total = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 8.0} if sharded else {}
    results = []
    for kind in (loss.PolicyLoss, ours.PolicyLoss):
        logprobs = start.clone().requires_grad_()
        values = kind(**setting)(logprobs, old, advantages, mask, rollout, **total)
        values[0].backward()
        results.append([*values, logprobs.grad])
    for theirs, mine in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_actor_and_trainer_names_are_ours_while_patched():
    """OpenRLHF's Actor on a small Llama: same log-probabilities and gradients, and ours is what it called."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = actor.Actor(transformers.LlamaForCausalLM(config), temperature=0.8)
    model.packing_samples = False  # as OpenRLHF sets it when it builds the model from a path
    ids, action_mask = torch.randint(0, 64, (2, 10)), torch.ones(2, 4, dtype=torch.bool)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logprobs = model(ids, action_mask=action_mask, attention_mask=torch.ones_like(ids))
        logprobs.sum().backward()
        return logprobs.detach(), model.model.lm_head.weight.grad.clone()

    expected = run()
    theirs = package.PolicyLoss
    with ours.patched():
        assert actor.log_probs_from_logits is utils.log_probs_from_logits is ours.log_probs_from_logits
        assert package.PolicyLoss is loss.PolicyLoss is ours.PolicyLoss
        for mine, reference in zip(run(), expected, strict=True):
            assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-6)
    assert package.PolicyLoss is loss.PolicyLoss is theirs
    assert actor.log_probs_from_logits is not ours.log_probs_from_logits


def test_bad_settings_are_refused_as_openrlhf_refuses_them():
    """But for dual_clip between 1 and 1 + clip_eps_high, which only ours refuses."""
    for level, mode, gating in itertools.product(("off", "token", "seq"), ("mask", "clip"), ("ratio", "tv")):
        setting = {"is_correction_level": level, "is_correction_mode": mode, "is_correction_gating": gating}
        try:
            loss.PolicyLoss(**setting)
        except ValueError:
            with pytest.raises(ValueError):
                ours.PolicyLoss(**setting)
        else:
            ours.PolicyLoss(**setting)
    with pytest.raises(ValueError, match="dual_clip must be above"):
        ours.PolicyLoss(dual_clip=1.1)
