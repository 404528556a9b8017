"""The update benchmark at a size for the CPU: every variant, consistent figures, one sentence for a mistake."""

import json

import pytest

from bench import updates
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


def test_a_run_that_is_stopped_leaves_the_rows_it_has(tmp_path, monkeypatch):
    out, time_phase = tmp_path / "updates.json", updates._time

    def stops(phase, device, repeats, seen=[]):  # noqa: B006  (counts the calls)
        seen.append(phase)
        if len(seen) > 3:  # the phases of the first variant
            raise KeyboardInterrupt
        return time_phase(phase, device, repeats)

    monkeypatch.setattr(updates, "_time", stops)
    with pytest.raises(KeyboardInterrupt):
        main(["--policy", "tiny", "--discriminator", "tiny", "--variants", "shared,packed", *SIZES, "--json", str(out)])
    assert [row["variant"] for row in json.loads(out.read_text())["rows"]] == ["shared"]


def test_what_a_budget_leaves_out_is_named(tmp_path, capsys):
    sizes = [*SIZES, "--budget-s", "1e-9", "--variants", "shared"]
    assert main(["--policy", "tiny", "--discriminator", "tiny", *sizes]) == 0
    assert "tiny shared left out: the budget of 1e-09 s is used." in capsys.readouterr().out
    assert main(["--variants", "shard"]) == 2
    assert "--variants: no variant shard; choose from shared, trl" in capsys.readouterr().err


def test_an_unknown_model(capsys):
    assert main(["--policy", "gpt-5"]) == 2
    assert "no model gpt-5; choose from qwen2.5-0.5b" in capsys.readouterr().err
