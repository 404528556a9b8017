"""The update benchmark at a size for the CPU: every variant, consistent figures, one sentence for a mistake."""

import json

import pytest

from bench.updates import main

SIZES = ["--prompts", "2", "--group", "2", "--prompt-tokens", "9", "--completion-tokens", "5", "--repeats", "1"]


def test_every_variant_is_timed(tmp_path, capsys):
    out = tmp_path / "updates.json"
    assert main(["--policy", "tiny", "--discriminator", "tiny", *SIZES, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    rows = {row["variant"]: row for row in document["rows"]}
    assert {"shared", "packed", "padded"} <= rows.keys()
    assert rows["shared"]["rows"] == 2 * (9 + 3 * 5) and rows["packed"]["rows"] == 2 * 3 * (9 + 5)
    for row in rows.values():
        tokens = 2 * (2 if row["variant"] == "trl" else 3) * 5
        assert row["tokens_per_s"] == pytest.approx(tokens / sum(row["seconds"].values()))
    ours = rows["shared"]["model_flops_utilisation"] * rows["shared"]["seconds"]["policy"]
    assert ours == pytest.approx(rows["padded"]["model_flops_utilisation"] * rows["padded"]["seconds"]["policy"])
    assert "LoRA" in capsys.readouterr().out


def test_an_unknown_model(capsys):
    assert main(["--policy", "gpt-5"]) == 2
    assert "no model gpt-5; choose from qwen2.5-0.5b" in capsys.readouterr().err
