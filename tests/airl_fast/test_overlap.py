"""What runs beside what, and that nothing inside a phase makes the host wait for the device."""

import copy
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from airl_fast import batches
from airl_fast.advantage import advantages
from airl_fast.beside import Beside
from airl_fast.metrics import Metrics
from airl_fast.train import airl_step
from airl_fast.types import Kind
from tests.airl_fast.model_cases import CPU
from tests.airl_fast.test_bridge import folders, lab_of, run, same, weights

__all__ = ["folders"]  # a fixture

WAITING_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero")
WAITING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait, by name: operators whose result the host reads or whose shape depends on
    values. torch.cuda's own check (set_sync_debug_mode) is of no use without a GPU; this one needs none.

    What airl_kernels' operations do inside their body for the CPU does not count: on a GPU they are Triton kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        boolean = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING_OPS or boolean or unsized:
            self.found[name] += 1
        self.inside = func.namespace == "airl_kernels"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False


@contextmanager
def counting(patch: pytest.MonkeyPatch):
    waits = Waits()
    for name in WAITING_METHODS:
        plain = getattr(torch.Tensor, name)

        def counted(self, *args, _plain=plain, _name=name, **kwargs):
            waits.found[_name] += not waits.inside
            return _plain(self, *args, **kwargs)

        patch.setattr(torch.Tensor, name, counted)
    with waits:
        yield waits.found
    patch.undo()


class WatchedPhases:
    """A meter whose phases count; the sampler of the CPU reads every token it draws and is left out."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.found = patch, {}

    @contextmanager
    def phase(self, name: str):
        if name == "sample":
            yield
            return
        with counting(self.patch) as found:
            yield
        self.found[name] = dict(found)


def test_the_count_sees_what_waits():
    with pytest.MonkeyPatch.context() as patch, counting(patch) as found:
        x = torch.arange(4.0)
        x.sum().item()
        x[x > 1]
        bool(x[0] > 3)
        torch.repeat_interleave(x, torch.tensor([1, 2, 1, 1]))
    assert found["item"] == 1 and found["index"] == 1 and found["__bool__"] == 1 and found["repeat_interleave"] == 1


@pytest.mark.parametrize("granularity", ["dense", "interval", "multiscale"])
@pytest.mark.parametrize("head", ["linear", "action", "logprob"])
def test_no_phase_makes_the_host_wait(folders, monkeypatch, granularity, head):
    lab = lab_of(
        folders,
        path="policy",
        reward={"granularity": granularity},
        discriminator={"head": head, "path": "policy", "perturbed_per_prompt": 1},
        policy={"kl_coef": 0.1, "importance_sampling": "sequence", "expert_in_policy": "balanced", "epochs": 2},
    )
    meter = WatchedPhases(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:  # offsets are looked at on the CPU alone (`_common.check_offsets`)
        patch.setattr("airl_kernels.policy_loss.check_offsets", lambda cu_seqlens, num_tokens: None)
        airl_step(lab, 1, meter, batches.Replay(0))
    assert set(meter.found) >= {"perturb", "pack", "discriminator", "score", "policy", "sync"}
    assert not any(count for found in meter.found.values() for count in found.values()), meter.found


def test_an_overlapping_discriminator_judges_with_the_step_before(folders, tmp_path):
    """Step 2's rewards come from the discriminator updated on step 1's traces, and no fresher one."""
    changes = {"path": "policy", "discriminator": {"path": "policy", "overlap": True}}
    lab, by_hand = lab_of(folders, **changes), lab_of(folders, **changes)
    results, _ = run(lab, tmp_path, steps=2)
    assert "discriminator" not in results[0].records and "discriminator" in results[1].records
    model, bridge, config = by_hand.reward.model, by_hand.reward.bridge, by_hand.config
    for step in (1, 2):
        prompts = by_hand.prompts(step)
        known = batches.expert_traces(by_hand, prompts) + batches.sample_traces(by_hand, prompts, 3, step, "rollout")
        judged = known + batches.perturbed_traces(by_hand, prompts, known, Kind.EXPERT, step)
        rewards = model.score(bridge.pack(known, prompts))
        batch = batches.pack_for_policy(by_hand, known)
        by_hand.policy.update(batch, advantages(rewards, batch, config.advantage, config.reward))
        model.update(bridge.pack(judged, prompts), by_hand.reward.optimiser)
    assert same(weights(lab.policy.lm.model), weights(by_hand.policy.lm.model))
    lab.reward.learning.wait()
    assert same(weights(lab.reward.model), weights(by_hand.reward.model))


def test_work_beside_comes_back_or_raises():
    beside = Beside(CPU, "test")
    assert beside.take() is None
    beside.start(lambda x: copy.copy(x), [1, 2])
    with pytest.raises(RuntimeError, match="was not taken"):
        beside.start(len, [1])
    beside.wait()
    assert beside.take() == [1, 2] and beside.take() is None
    beside.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        beside.take()


def test_what_work_was_given_is_kept_until_it_is_taken():
    """On a GPU the kernels may run on when the work's Python has ended."""
    beside, given = Beside(CPU, "test"), torch.ones(3)
    seen = weakref.ref(given)
    beside.start(torch.sum, given)
    beside.wait()
    del given
    assert seen() is not None
    assert beside.take() == 3
    assert seen() is None


def test_metrics_read_a_step_once(folders, tmp_path, monkeypatch):
    """All of a step's statistics come to the host together, after the last phase."""
    lab = lab_of(folders, path="policy")
    with Metrics(tmp_path / "m.jsonl", total_steps=1) as meter:
        result = airl_step(lab, 1, meter, batches.Replay(0))
        with counting(monkeypatch) as found:
            meter.log(1, tokens=result.tokens, **result.records)
    assert found["tolist"] == 1 and found["item"] == 0


def test_no_padded_token_reaches_a_model(folders, tmp_path):
    """In a step's updates and scores each model embeds the rows of the packed batches and nothing else."""
    lab = lab_of(folders, path="policy")
    read: dict[str, list[int]] = {"policy": [], "discriminator": []}
    for name, model in (("policy", lab.policy.lm.model), ("discriminator", lab.reward.model.backbone)):
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output, name=name: read[name].append(inputs[0].numel())
        )
    prompts = lab.prompts(1)
    known = batches.expert_traces(lab, prompts) + batches.sample_traces(lab, prompts, 3, 1, "rollout")
    judged = known + batches.perturbed_traces(lab, prompts, known, Kind.EXPERT, 1)
    read["policy"].clear()
    assert len({len(t.tokens) for t in judged}) > 2

    def rows(traces) -> int:
        return sum(map(len, {t.prompt_tokens for t in traces})) + sum(len(t.tokens) for t in traces)

    lab.reward.model.update(lab.reward.bridge.pack(judged, prompts), lab.reward.optimiser)
    rewards = lab.reward.model.score(lab.reward.bridge.pack(known, prompts))
    lab.policy.update(batches.pack_for_policy(lab, known), rewards)
    assert read == {"policy": [rows(known)], "discriminator": [rows(judged), rows(known)]}
