"""The step benchmark: its padded reference equals the packed forward, its operations are counted by hand, it runs."""

import json

import pytest
import torch

from airl_fast.models.forward import hidden_states
from airl_fast.pack import pack
from airl_fast.types import Segments
from bench.padded import padded_hidden_states
from bench.profile import PARTS
from bench.profile import main as profile_main
from bench.step import PHASES, main
from bench.step_flops import attended_pairs, forward_flops
from tests.airl_fast.model_cases import CPU, language_model, random_traces


@pytest.mark.parametrize("share", [True, False])
def test_the_padded_way_gives_the_same_states_and_gradients(share):
    lm = language_model("llama")
    batch = pack(random_traces(4), CPU, share=share)
    weights = torch.randn(batch.num_loss_tokens, 1)
    found = []
    for states in (hidden_states, padded_hidden_states):
        hidden = states(lm.backbone, batch)
        lm.model.zero_grad()
        ((hidden[batch.loss_rows] + hidden[batch.label_rows]) * weights).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in lm.backbone.parameters())])
    for packed, padded in zip(*found, strict=True):
        scale = padded.abs().max()
        torch.testing.assert_close(packed / scale, padded / scale, atol=1e-5, rtol=0)


def test_operations_by_hand():
    segments = Segments(prompts=(3,), completions=(2, 1), counts=(2,))
    # Triangles of 3, 2 and 1 rows; each completion's rows see the prompt's three.
    assert attended_pairs(segments) == 6 + 3 + 1 + 3 * 2 + 3 * 1
    lm = language_model()  # two layers of width 16: q, o 16x16, k, v 16x8, gate, up, down 16x32
    weights = 2 * (2 * 256 + 2 * 128 + 3 * 512)
    assert forward_flops(lm.backbone, segments) == 2 * weights * 6 + 4 * 16 * 2 * attended_pairs(segments)


def test_a_small_step_end_to_end(tmp_path, capsys):
    out = tmp_path / "step.json"
    sizes = ["--prompts", "2", "--group", "2", "--prompt-tokens", "48", "--completion-tokens", "6"]
    assert main([*sizes, "--steps", "2", "--rounds", "1", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    rows = {row["name"]: row for row in document["rows"]}
    ours = rows["airl-fast"]
    assert ours["phase_seconds"].keys() == set(PHASES) and all(s >= 0 for s in ours["phase_seconds"].values())
    assert ours["tokens_per_s"] == pytest.approx(2 * 2 * 6 / ours["seconds"])
    assert ours["ratio_to"]["padded"] == pytest.approx(ours["tokens_per_s"] / rows["padded"]["tokens_per_s"])
    assert 0 < ours["model_flops_utilisation"] < 1 and ours["peak_mib"] >= ours["start_mib"] > 100
    if "trl" in rows:
        assert ours["ratio_to"]["trl"] == pytest.approx(ours["tokens_per_s"] / rows["trl"]["tokens_per_s"])
        assert 0 < rows["trl"]["phase_seconds"]["discriminator"] < rows["trl"]["seconds"]
    printed = capsys.readouterr().out
    assert "in the update phases" in printed and "MFU, policy update" in printed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--variants", "ours"], "--variants: no variant ours; choose from airl-fast, padded, trl"),
        (["--prompts", "x"], "invalid int value: 'x'"),
        (["--prompt-tokens", "3", "--rounds", "1", "--steps", "1"], "--prompt-tokens 3: the task's prompts have"),
    ],
)
def test_bad_arguments(flags, sentence, capsys):
    assert main(flags) == 2
    assert sentence in capsys.readouterr().err


def test_a_profile_divides_each_phase_into_its_parts(tmp_path, capsys):
    out = tmp_path / "profile.json"
    sizes = ["--prompts", "2", "--group", "2", "--prompt-tokens", "48", "--completion-tokens", "6"]
    assert profile_main([*sizes, "--steps", "2", "--json", str(out)]) == 0
    phases = json.loads(out.read_text())["phases"]
    assert phases.keys() == set(PHASES)
    for parts in phases.values():
        assert sum(parts[part] for part in PARTS) == pytest.approx(parts["seconds"])
    for name in ("sample", "discriminator", "score", "policy"):
        assert phases[name]["products"] > 0 and phases[name]["attention"] > 0
    assert phases["policy"]["our operations"] > 0 == phases["sample"]["our operations"]
    assert "times as fast" in capsys.readouterr().out
