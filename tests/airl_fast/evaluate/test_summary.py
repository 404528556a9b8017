"""summary.json has its agreed keys and survives a round trip; the table shows every figure and what is absent."""

import json
import re
from dataclasses import replace

import pytest

from airl_fast.errors import UserError
from airl_fast.evaluate.summary import Summary, read_summary, render_table, write_summary
from airl_fast.measures.passk import Estimate

FULL = Summary(
    pass_at_1={
        "start": Estimate(0.5331, 0.5, 0.57),
        "sft": Estimate(0.986, 0.97, 1.0),
        "grpo": Estimate(0.9522, 0.93, 0.97),
        "airl": Estimate(0.951, 0.931, 0.9712),
    },
    pass_at_5={name: Estimate(0.99, 0.98, 1.0) for name in ("start", "sft", "grpo", "airl")},
    rerank_pass_at_1={
        "reward": Estimate(0.8542, 0.79, 0.91),
        "random": Estimate(0.5331, 0.5, 0.57),
        "majority": Estimate(0.5632, 0.46, 0.66),
        "logprob": Estimate(0.552, 0.45, 0.65),
    },
    rerank_n=16,
    rerank_other_pass_at_1={"oracle": Estimate(1.0, 1.0, 1.0)},
    localise_hit_at_1={
        "reward": Estimate(0.71, 0.67, 0.74),
        "chance": Estimate(0.22, 0.21, 0.23),
        "logprob": Estimate(0.4, 0.36, 0.44),
    },
    localise_other_hit_at_1={"majority_position": Estimate(0.3, 0.28, 0.33)},
    auroc_within_prompt=Estimate(0.9123, 0.88, 0.94),
    control_random_reward=Estimate(0.013, 0.0, 0.02),
    seconds=211.4,
    peak_rss_gib=1.234,
    seed=3,
    counts={"prompts": 96},
    references=("intervals [95%] by bootstrap",),
)
BARE = Summary(pass_at_1={"start": Estimate(0.5, 0.4, 0.6), "sft": None}, seconds=1.0, peak_rss_gib=0.5, seed=0)


def test_keys_and_values_of_the_file(tmp_path):
    write_summary(tmp_path / "summary.json", FULL)
    document = json.loads((tmp_path / "summary.json").read_text())
    assert document["pass_at_1"] == {"start": 0.5331, "sft": 0.986, "grpo": 0.9522, "airl": 0.951}
    assert document["rerank_pass_at_1"] == {"reward": 0.8542, "random": 0.5331, "majority": 0.5632, "logprob": 0.552}
    assert document["localise_hit_at_1"] == {"reward": 0.71, "chance": 0.22, "logprob": 0.4}
    assert (document["auroc_within_prompt"], document["seconds"]) == (0.9123, 211.4)
    assert (document["peak_rss_gib"], document["seed"]) == (1.234, 3)
    assert document["intervals"]["pass_at_1"]["airl"] == [0.931, 0.9712]
    assert document["intervals"]["auroc_within_prompt"] == [0.88, 0.94]
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_round_trip(tmp_path):
    write_summary(tmp_path / "s.json", FULL)
    assert read_summary(tmp_path / "s.json") == FULL


def test_absent_parts_are_null_and_keep_their_keys(tmp_path):
    write_summary(tmp_path / "s.json", BARE)
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["pass_at_1"] == {"start": 0.5, "sft": None, "grpo": None, "airl": None}
    assert document["rerank_pass_at_1"] == dict.fromkeys(("reward", "random", "majority", "logprob"))
    assert document["localise_hit_at_1"] == dict.fromkeys(("reward", "chance", "logprob"))
    assert document["auroc_within_prompt"] is None
    back = read_summary(tmp_path / "s.json")
    assert back.pass_at_1["start"] == BARE.pass_at_1["start"] and back.pass_at_1["airl"] is None
    assert render_table(back) == render_table(BARE)


def row(table, label):
    (line,) = [line for line in table.splitlines() if line.startswith(label)]
    return re.split(r"\s{2,}", line)[1:]


def test_table_shows_every_figure():
    table = render_table(FULL)
    assert max(map(len, table.splitlines())) <= 100
    assert row(table, "start policy  ") == ["53.3 [50.0, 57.0]", "99.0 [98.0, 100.0]"]
    assert row(table, "AIRL") == ["95.1 [93.1, 97.1]", "99.0 [98.0, 100.0]"]
    assert row(table, "control") == ["1.3 [0.0, 2.0]", "–"]
    assert row(table, "majority vote") == ["56.3 [46.0, 66.0]"]
    assert row(table, "oracle") == ["100.0 [100.0, 100.0]"]
    assert row(table, "chance") == ["22.0 [21.0, 23.0]"]
    assert row(table, "log-probability") == ["40.0 [36.0, 44.0]"]
    assert row(table, "majority position") == ["30.0 [28.0, 33.0]"]
    assert "pass@1|16 [95%]" in table
    assert "0.912 [0.880, 0.940]" in table
    assert "211 s, peak 1.23 GiB, seed 3" in table
    assert "intervals [95%] by bootstrap" in table  # brackets are text, not markup


def test_table_marks_absent_parts():
    table = render_table(BARE)
    assert row(table, "SFT continued") == row(table, "AIRL") == ["–", "–"]
    assert row(table, "majority vote") == row(table, "chance") == ["–"]
    assert "pass@1|– [95%]" in table
    assert "AUROC within a prompt  –" in table
    assert "control" not in table


def test_long_reference_stays_within_the_width():
    table = render_table(replace(BARE, references=("word " * 60,)))
    assert max(map(len, table.splitlines())) <= 100
    assert table.count("word") == 60


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="pass_at_1 has no entry 'AIRL'; use start, sft, grpo, airl"):
        Summary(pass_at_1={"AIRL": None}, seconds=1.0, peak_rss_gib=1.0, seed=0)
    path = tmp_path / "summary.json"
    with pytest.raises(UserError, match="NaN or infinite"):
        write_summary(path, replace(BARE, seconds=float("nan")))
    assert not path.exists()
    with pytest.raises(UserError, match="could not be written"):
        write_summary(tmp_path / "nowhere" / "summary.json", BARE)
    with pytest.raises(UserError, match="does not exist"):
        read_summary(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        read_summary(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="lacks the key 'intervals'"):
        read_summary(path)
    write_summary(path, BARE)
    document = json.loads(path.read_text())
    document["pass_at_1"]["start"] = "half"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="wrong type"):
        read_summary(path)
