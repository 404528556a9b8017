"""Runs that train adapters over 4-bit weights, end to end: they learn, touch nothing else, resume, evaluate, export."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from airl_fast.artifacts import POLICY, REWARD, START, load_policy, load_reward, save_reward
from airl_fast.batches import expert_traces
from airl_fast.cli import main
from airl_fast.evaluate.command import open_run
from airl_fast.manifest import MODEL
from airl_fast.models.adapters import is_quantised
from airl_fast.models.load import load_model
from tests.airl_fast.adapter_cases import (
    LORA,
    NF4,
    frozen_bytes,
    laboratory,
    model_directory,
    over,
    same,
    trained,
)
from tests.airl_fast.model_cases import CPU
from tests.airl_fast.run_cases import metrics, train, weights

RATES = ("policy.optim.learning_rate=5e-3", "discriminator.optim.learning_rate=5e-3")
IDS = torch.arange(40).reshape(2, 20) + 7


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


# ---- learning ----


@pytest.mark.parametrize("algorithm", ["airl", "sft"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_steps_lower_the_loss_and_leave_the_base_as_it_was(tmp_path, architecture, algorithm):
    words = (*NF4, *LORA, *RATES, f"algorithm={algorithm}", "steps=8", "policy.optim.name=paged_adamw_8bit",
             "discriminator.optim.name=adamw_8bit", "model.gradient_checkpointing=true")  # fmt: skip
    lab = laboratory(model_directory(architecture), *words)
    models = [lab.start.model, lab.policy.lm.model]
    models += [lab.reward.model.backbone] if algorithm == "airl" else []
    before = [frozen_bytes(model) for model in models]
    adapters = [[p.detach().clone() for p in model.parameters() if p.requires_grad] for model in models[1:]]
    assert all(sum(key.endswith(".absmax") for key in kept) == 2 * 7 + 7 for kept in before)  # of every linear layer
    losses = [
        step["discriminator/loss" if algorithm == "airl" else "policy/loss"] for step in trained(lab, tmp_path / "m")
    ]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert all(same(frozen_bytes(model), kept) for model, kept in zip(models, before, strict=True))
    for model, old in zip(models[1:], adapters, strict=True):
        new = [p for p in model.parameters() if p.requires_grad]
        assert all(not torch.equal(a, b) for a, b in zip(new, old, strict=True))


def test_ratios_are_exact_over_four_bits(tmp_path):
    """Sampler and trainer see one distribution, also with gradient checkpointing and a discriminator's dropout."""
    words = (
        *NF4,
        LORA[0],
        "discriminator.lora={rank: 4, dropout: 0.3}",
        "steps=2",
        "model.gradient_checkpointing=true",
    )
    for step in trained(laboratory(model_directory(), *words, *RATES), tmp_path / "m"):
        assert abs(step["policy/mismatch_kl"]) < 1e-6
        assert step["policy/mismatch_max_ratio"] == pytest.approx(1, abs=1e-3)


def test_the_whole_model_learns_in_bfloat16_as_in_float32(tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        words = ("algorithm=sft", "steps=12", f"model.dtype={dtype}", "policy.optim.learning_rate=1e-3")
        lab = laboratory(model_directory(), *words)
        assert bool(lab.policy.optimiser.masters) == (dtype == "bfloat16")
        losses[dtype] = [step["policy/loss"] for step in trained(lab, tmp_path / dtype)]
    assert losses["float32"][-1] < losses["float32"][0] - 1.5
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.04)


@pytest.mark.parametrize("source", ["policy", "a llama of its own"])
def test_a_trained_reward_loads_with_the_same_rewards(tmp_path, source):
    other = [] if source == "policy" else [f"discriminator.path={model_directory('llama')}"]
    lab = laboratory(model_directory(), *NF4, *LORA, *RATES, "steps=3", *other)
    trained(lab, tmp_path / "m")
    prompts = lab.prompts(1)
    batch = lab.reward.bridge.pack(expert_traces(lab, prompts), prompts)
    save_reward(lab.reward.model, (lab.reward.bridge.chat or lab.maker.chat).tokenizer, tmp_path / "reward")
    model, bridge = load_reward(tmp_path / "reward", lab.config, lab.maker, lab.start, CPU)
    assert (bridge.chat is None) == (lab.reward.bridge.chat is None)
    expected = lab.reward.model.score(batch)
    assert torch.equal(model.score(batch), expected) and expected.std() > 0.05
    shared = model.backbone.embed_tokens.weight is lab.start.backbone.embed_tokens.weight
    assert shared == (source == "policy") and is_quantised(model.backbone)


# ---- a whole run ----


@functools.cache
def full_run() -> Path:
    """A short run that trained every weight."""
    root = tempfile.mkdtemp(prefix="airl-fast-test-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    train(*over(model_directory(), "steps=1", "evaluate.final=false", f"output_dir={root}"), "--run-name", "full")
    return Path(root) / "full"


def words(root: Path, *more: str) -> tuple[str, ...]:
    return (
        *over(model_directory(), *NF4, LORA[0], *RATES), "discriminator.lora={rank: 4, dropout: 0.2}",
        "discriminator.warmup_steps=2", "discriminator.optim.name=adamw_8bit", "steps=4", "checkpoint_every=2",
        "evaluate.baselines=[sft]", "evaluate.samples=3", "evaluate.prompts=6", f"output_dir={root}", *more,
        "--run-name", "run",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    train(*words(root))
    return root / "run"


def test_a_run_keeps_what_it_trained_and_a_link_to_the_rest(whole):
    assert (whole / START).is_symlink() and (whole / START).resolve() == model_directory()
    for part, extra in ((POLICY, set()), (REWARD, {"head.json", "head.safetensors"})):
        files = {f.name for f in (whole / part).iterdir()}
        assert files >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} | extra
        assert "model.safetensors" not in files
    state = load_file(whole / "checkpoints" / "step_4" / "policy.safetensors")
    assert len(state) == 2 * 7 * 3 and all("lora_" in name for name in state)
    state = load_file(whole / "checkpoints" / "step_4" / "discriminator.safetensors")
    assert {name.split("/")[-1] for name in state if "lora_" not in name} == {"head.weight", "head.bias"}
    summary = json.loads((whole / "summary.json").read_text())
    assert {name for name, value in summary["pass_at_1"].items() if value is not None} == {"start", "airl", "sft"}
    assert (whole / "baselines" / "sft" / POLICY / "adapter_config.json").is_file()


def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    shutil.rmtree(tmp_path / "run" / "final")
    train(*words(tmp_path, "--resume", "auto", "evaluate.final=false"), code=2)  # another configuration is refused
    train(*words(tmp_path, "--resume", "auto"))
    for part in (POLICY, REWARD):
        mine, theirs = weights(tmp_path / "run" / part), weights(whole / part)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_eval_loads_adapters_over_the_base_it_shares(whole, capsys):
    assert main(["eval", str(whole), "--k", "1", "--prompts", "4", "--samples", "2"]) == 0
    said = capsys.readouterr().out
    assert "  airl " in said and "  sft " in said and "learned reward" in said
    lab = open_run(whole)
    model, _ = load_reward(whole / REWARD, lab.config, lab.maker, lab.start, CPU)
    assert model.backbone.embed_tokens.weight is lab.start.backbone.embed_tokens.weight
    policy = load_policy(whole / POLICY, lab.config.model, CPU)
    assert is_quantised(policy.model) and (logits(policy.model) - logits(lab.start.model)).abs().max() > 0.05


def test_export_writes_a_peft_adapter(whole, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert main(["export", str(whole), "--format", "adapter", "-o", str(out)]) == 0
    base = model_directory()
    assert capsys.readouterr().out.strip() == (
        f"adapter of the policy written to {out}; its frozen weights are in {base}"
    )
    expected = logits(load_policy(whole / POLICY, open_run(whole).config.model, CPU).model)
    frozen = load_model(base, "x", torch.float32, quantise="nf4", device=CPU)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(frozen, out)), expected, atol=1e-6, rtol=0)


def test_export_merges_into_a_plain_model_that_computes_the_same(whole, tmp_path):
    expected = logits(load_policy(whole / POLICY, open_run(whole).config.model, CPU).model)
    assert main(["export", str(whole), "--format", "merged", "-o", str(tmp_path / "policy")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=2e-4, rtol=1e-4)
    again = load_policy(tmp_path / "policy", open_run(whole).config.model.model_copy(update={"quantise": None}), CPU)
    assert torch.equal(logits(again.model), logits(merged))
    lab = open_run(whole)
    trained_reward, _ = load_reward(whole / REWARD, lab.config, lab.maker, lab.start, CPU)
    what = ["--what", "discriminator", "-o", str(tmp_path / "discriminator")]
    assert main(["export", str(whole), "--format", "merged", *what]) == 0
    backbone = AutoModel.from_pretrained(tmp_path / "discriminator", dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (m(input_ids=IDS).last_hidden_state for m in (backbone, trained_reward.backbone))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    plain, _ = load_reward(tmp_path / "discriminator", lab.config, lab.maker, lab.start, CPU)
    assert torch.equal(plain.head.weight, trained_reward.head.weight)


def test_a_moved_run_finds_its_own_start(whole, tmp_path):
    """A warm start is saved whole inside the run, and adapters record where that was."""
    run = tmp_path / "there" / "run"
    shutil.copytree(whole, run, symlinks=True)
    (run / START).unlink()
    shutil.copytree(model_directory(), run / START)
    file = run / POLICY / "adapter_config.json"
    (run / POLICY / MODEL).unlink()  # lists the file as it was
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "/gone/run/start"}))
    config = open_run(whole).config.model
    expected = logits(load_policy(whole / POLICY, config, CPU).model)
    assert torch.equal(logits(load_policy(run / POLICY, config, CPU).model), expected)
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "/gone/elsewhere"}))
    assert main(["export", str(run), "--format", "merged"]) == 2


def test_a_warm_start_is_saved_whole_and_then_quantised(tmp_path):
    more = ("model.path=null", "model.build={}", "warm_start={updates: 3, batch_size: 4, examples: 500}", *NF4, *LORA)
    train(
        *over(model_directory(), *more, "steps=1", "evaluate.final=false", f"output_dir={tmp_path}"), "--run-name", "w"
    )
    run = tmp_path / "w"
    assert not (run / START).is_symlink()
    assert AutoModelForCausalLM.from_pretrained(run / START).dtype == torch.float32
    settings = json.loads((run / POLICY / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run / START)
    lab = open_run(run)
    assert is_quantised(lab.start.model) and is_quantised(load_policy(run / POLICY, lab.config.model, CPU).model)


def refused(capsys, *argv: object) -> str:
    """The one sentence that this command ends with."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_export_says_what_is_wrong(whole, tmp_path, capsys):
    said = refused(capsys, "export", full_run(), "--format", "adapter")
    assert "full trained every weight of its policy (model.lora is not set), so there is no adapter; use" in said
    assert "is no run directory" in refused(capsys, "export", tmp_path)
    assert f"{tmp_path} exists; choose another directory with -o." in refused(capsys, "export", whole, "-o", tmp_path)
    shutil.copytree(whole, tmp_path / "half", symlinks=True)
    shutil.rmtree(tmp_path / "half" / "final")
    assert "half has no final/policy; finish the run with --resume auto." in refused(
        capsys, "export", tmp_path / "half"
    )
    what = ("--what", "discriminator")
    assert "has no final/discriminator" in refused(capsys, "export", whole / "baselines" / "sft", *what)
    assert main(["export", str(full_run()), "-o", str(tmp_path / "copy")]) == 0
    assert {f.name for f in (tmp_path / "copy").iterdir()} == set(os.listdir(full_run() / POLICY)) - {MODEL}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.quantise=nf4"], "model.quantise=nf4 freezes the weights, so nothing would be trained; set model.lora"),
        (["discriminator.quantise=nf4"], "discriminator.quantise=nf4 freezes the backbone's weights; set"),
        ([*LORA, "model.quantise=nf4"], "shares the policy's frozen weights as they are; set discriminator.quantise"),
        ([LORA[0], "model.quantise=nf4"], "would train the policy's 4-bit weights, which is impossible; set"),
        (["model.lora={dropout: 0.1}"], "model.lora.dropout=0.1 would make the ratio of the policy to its sampler"),
        (["model.lora={targets: [lm_head]}"], "model.lora.targets: lm_head is the output layer"),
        (["discriminator.lora={targets: [x]}"], "discriminator.lora.targets: x is no linear layer of Qwen2Model;"),
        (["reward.scale_weights=[0,0,0]"], "reward.scale_weights=[0, 0, 0] leaves no reward"),
        (["discriminator.warmup_learning_rate=0.0"], "discriminator.warmup_learning_rate"),
        (["model.path=Qwen/Qwen2.5-3B-Instruct"], "set model.path=DIR to a local copy of Qwen/Qwen2.5-3B-Instruct;"),
        (["discriminator.path=meta-llama/Llama-3.2-1B"], "set discriminator.path=DIR to a local copy of meta-llama/"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(changes, message, capsys):
    assert message in refused(capsys, "train", "tiny", "--dry-run", *over(model_directory(), *changes))


def test_an_adapter_is_no_start_policy(whole, capsys):
    said = refused(capsys, "train", "tiny", "--dry-run", *over(whole / POLICY))
    assert "holds a PEFT adapter, not a model" in said and "airl-fast export RUN --format merged" in said


def test_a_dry_run_says_what_is_trained(capsys):
    assert main(["train", "tiny", "--dry-run", *over(model_directory(), *NF4, *LORA, "model.dtype=bfloat16")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  trained")]
    assert lines == ["  trained       adapters of 0.03M parameters over frozen 4-bit weights, AdamW"] * 2
    assert main(["train", "tiny", "--dry-run", *over(model_directory(), "model.dtype=bfloat16")]) == 0
    assert "  trained       all of it, AdamW, float32 masters\n" in capsys.readouterr().out
