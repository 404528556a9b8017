"""Whole runs of a longrope model whose samples cross the change of its rotary factors."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from airl_fast.commands.settings import PRESETS
from airl_fast.config import BuildConfig, Config
from airl_fast.errors import UserError
from airl_fast.guided.steps import Beam
from airl_fast.guided.tokens import Reweigh
from airl_fast.judge.judge import open_judge
from airl_fast.lab import load_material
from airl_fast.models.build import build_tokenizer
from airl_fast.models.regimes import Regimes
from airl_fast.overrides import find_preset, load_config
from tests.airl_fast.guided.test_methods import open_session
from tests.airl_fast.run_cases import EASY, metrics, train

CHANGE = 32  # tokens: between a prompt (10 to 14) and the end of its samples and of some demonstrations


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Phi-3 with random weights in the tiny task's vocabulary."""
    task = load_material(load_config(Config, find_preset("tiny", PRESETS)[0], list(EASY), origin="tiny")).task
    texts = [text for e in task.load("warmstart", 300) for text in (e.prompt, e.expert) if text is not None]
    tokenizer = build_tokenizer(texts, BuildConfig(vocab_size=400))
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": CHANGE}
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=CHANGE,
        rope_parameters=rope | {"short_factor": [1.0, 1.0, 1.1, 1.2], "long_factor": [1.3, 2.0, 5.0, 9.0]},
        initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("longrope")
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def words(folder: Path, out: Path) -> list[str]:
    return [
        *EASY, f"model.path={folder}", "model.build=null", "warm_start.updates=0", "steps=2", "checkpoint_every=2",
        "evaluate.baselines=[]", f"output_dir={out}", "--run-name", "x",
    ]  # fmt: skip


def test_ratios_of_samples_that_cross_the_change_are_refused(folder, tmp_path, capsys):
    """And importance sampling, which corrects for them, is named; samples that cannot cross are welcome."""
    train(*words(folder, tmp_path), code=2)
    sentence = capsys.readouterr().err
    assert f"other rotary factors above {CHANGE} tokens" in sentence
    assert "rollout.max_new_tokens=40" in sentence and "policy.importance_sampling=token" in sentence
    train(*words(folder, tmp_path), "rollout.max_new_tokens=2", "data.too_long=drop", "--dry-run")
    train(*words(folder, tmp_path), "algorithm=sft", "--dry-run")


def test_a_run_whose_samples_cross_the_change(folder, tmp_path, capsys):
    train(*words(folder, tmp_path), "policy.importance_sampling=token", "discriminator.loss=pairwise")
    assert f"policy: other rotary factors above {CHANGE} tokens" in capsys.readouterr().err
    steps = metrics(tmp_path / "x")
    assert all(step["policy/grad_norm"] > 0 and step["policy/mismatch_kl"] >= 0 for step in steps)
    judge = open_judge(tmp_path / "x")
    assert judge.policy.regimes == judge.model.regimes == judge.bridge.regimes == Regimes(switches=(CHANGE,))
    with pytest.raises(UserError, match=r"test:0: --guided tokens reads a trace while .* above 32 tokens, between"):
        Reweigh(n=1, beta=1.0, top_k=5).solve(open_session(judge, 2))
    outcomes = Beam(beam=1, expand=2).solve(open_session(judge, 2))
    assert len(outcomes) == 2
    # The judge reads traces of any lengths together as each alone.
    session = open_session(judge, 6)
    drafts = session.to_end([session.fresh(p, 0) for p in range(6)])
    together = session.read(drafts)
    for i, draft in enumerate(drafts):
        single = session.read([draft]).values
        found = together.values[together.offsets[i] : together.offsets[i + 1]]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(single), atol=1e-5, rtol=1e-5)
