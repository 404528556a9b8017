"""Whole runs that sample with the real vLLM: they learn as with the built-in sampler, resume, and stop when stale."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import json

import numpy as np

from airl_fast.cli import main
from airl_fast.engines import SCRATCH
from airl_fast.rollout.vllm import VllmEngine
from tests.airl_fast.run_cases import EASY, metrics, train, weights

# vLLM's CPU attention begins at heads of 32: two of them, where the preset has four of 16.
HEADS = ("model.build.heads=2", "model.build.kv_heads=1")
SHORT = (
    *EASY, *HEADS, "steps=4", "checkpoint_every=2", "evaluate.baselines=[]", "evaluate.final=false",
    "tensorboard=false", "warm_start={updates: 60, batch_size: 32, examples: 2000}",
)  # fmt: skip
VLLM = "rollout.engine=vllm"


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    """Also that an engine starts from a checkpoint's weights, and that nothing is left of it."""
    train(*SHORT, VLLM, f"output_dir={tmp_path}", "--run-name", "whole")
    train(*SHORT, VLLM, f"output_dir={tmp_path}", "--run-name", "parts")
    parts = tmp_path / "parts"
    for gone in (parts / "checkpoints" / "step_4", parts / "final"):
        assert gone.is_dir()
        gone.rename(tmp_path / gone.name)
    train(*SHORT, VLLM, f"output_dir={tmp_path}", "--run-name", "parts", "--resume", "auto")
    whole, again = weights(tmp_path / "whole/final/policy"), weights(parts / "final/policy")
    assert whole.keys() == again.keys() and all(whole[name].equal(again[name]) for name in whole)
    lines = metrics(parts)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert 0 <= line["sync/difference"] < 1e-4 < line["sync/moved"] and line["seconds/sync"] > 0
        assert line["policy/mismatch_kl"] < 1e-6 and line["policy/mismatch_max_ratio"] < 1.01
    assert not (parts / SCRATCH).exists()


def test_a_stale_sampler_stops_the_run_with_one_sentence(tmp_path, monkeypatch, capsys):
    push = VllmEngine.push
    monkeypatch.setattr(VllmEngine, "push", lambda self, lm, v: None if v == "step 3" else push(self, lm, v))
    train(*SHORT, VLLM, f"output_dir={tmp_path}", "--run-name", "stale", code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("airl-fast: the sampler is stale at step 3: the policy's log-probabilities moved by ")
    checkpoints = sorted(path.name for path in (tmp_path / "stale/checkpoints").iterdir())
    assert checkpoints == ["step_0", "step_2"] or checkpoints == ["step_2"]
    monkeypatch.undo()
    train(*SHORT, VLLM, f"output_dir={tmp_path}", "--run-name", "stale", "--resume", "auto")


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_adapters_are_swapped_every_step(tmp_path, quantise):
    """Under nf4 vLLM holds the weights before quantisation: the two differ, but they move together."""
    words = ["model.lora={rank: 8, alpha: 16}", "discriminator.lora={rank: 8, alpha: 16}", "steps=3"]
    words += [f"{section}.quantise={quantise or 'null'}" for section in ("model", "discriminator")]
    train(*SHORT, *words, VLLM, f"output_dir={tmp_path}", "--run-name", "lora")
    lines = metrics(tmp_path / "lora")
    assert len(lines) == 3
    for line in lines:
        assert line["sync/moved"] > 0
        assert (line["sync/difference"] < 1e-4) == (quantise is None)
    # The start policy has no adapter, the trained one has: both are sampled by the same engine.
    assert main(["eval", str(tmp_path / "lora"), "--k", "1", "--prompts", "8", "--samples", "2"]) == 0
    assert not (tmp_path / "lora" / SCRATCH).exists()


def test_reranking_and_transfer_sample_by_the_engine_of_the_run(tmp_path, capsys):
    """Also that one command opens an engine after another, for the start policy and for the trained one."""
    train(*SHORT, VLLM, f"output_dir={tmp_path}", "--run-name", "run")
    run, few = str(tmp_path / "run"), ("--prompts", "8", "--n", "4")
    capsys.readouterr()
    assert main(["rerank", run, *few]) == 0
    assert main(["transfer", run, *few, "--policy", "start", "--policy", "airl"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample ")]
    policies = ["start", "start", "airl"]
    assert [line.split(", by ")[0] for line in said] == [f"sample 4 of {p} on each of 8 prompts" for p in policies]
    assert all(", by vLLM " in line for line in said)
    cells = json.loads((tmp_path / "run/eval/transfer-test-start+airl-arithmetic.json").read_text())["cells"]
    assert [cell["policy"] for cell in cells] == ["start", "airl"]
    assert not (tmp_path / "run" / SCRATCH).exists()


def test_it_learns_what_the_builtin_sampler_learns(tmp_path):
    """GRPO on few easy prompts, which shows within a minute what a sampler that missed updates would spoil: pass@1 of
    the last ten steps' samples agrees between the two within their intervals, and is above the first steps'."""
    words = (
        *EASY, *HEADS, "algorithm=grpo", "steps=30", "evaluate.baselines=[]", "tensorboard=false", "checkpoint_every=0",
        "evaluate.final=false", "warm_start={updates: 200, batch_size: 32, examples: 3000}",
        "rollout.prompts_per_step=8", "rollout.samples_per_prompt=8", "policy.optim.learning_rate=5e-4",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    found = {}
    for engine in ("builtin", "vllm"):
        train(*words, f"rollout.engine={engine}", "--run-name", engine)
        steps = np.array([line["rollout/sample_pass_at_1"] for line in metrics(tmp_path / engine)])
        last = steps[-10:]
        found[engine] = (steps[:3].mean(), last.mean(), 1.96 * last.std(ddof=1) / 10**0.5)
    print(found)
    (_, ours, our_width), (_, theirs, their_width) = found.values()
    assert abs(ours - theirs) <= our_width + their_width < 0.4
    assert all(now > before + 0.05 for before, now, _ in found.values())
    assert main(["eval", str(tmp_path / "vllm"), "--k", "1", "--prompts", "8", "--samples", "2"]) == 0
