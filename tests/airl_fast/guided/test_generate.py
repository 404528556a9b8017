"""The command: its rows, its tables and figures, and one sentence for each mistake."""

import json

import pytest

from airl_fast.cli import main
from airl_fast.guided.options import settings_of
from tests.airl_fast.run_cases import small_run


def run(capsys, *words: object, code: int = 0):
    assert main(["generate", str(small_run()), *map(str, words)]) == code
    return capsys.readouterr()


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "start 7; gain 1?", "id": "a", "answer": 8}, {"prompt": "start 2; gain 2; lose 1?"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("guided", ["none", "steps", "tokens", "reject", "revise"])
def test_rows_of_each_kind(capsys, prompts, tmp_path, guided):
    printed = run(capsys, prompts, "--guided", guided, "--seed", 3)
    rows = rows_of(printed.out)
    assert [row["id"] for row in rows] == ["a", "prompts.jsonl:2"]
    assert [row["prompt"] for row in rows] == ["start 7; gain 1?", "start 2; gain 2; lose 1?"]
    assert all(row["generated_tokens"] >= row["tokens"] > 0 and row["scored_tokens"] > 0 for row in rows)
    assert "2 of 2 prompts" in printed.err
    out = tmp_path / "new" / "out.jsonl"
    assert run(capsys, prompts, "--guided", guided, "--seed", 3, "-o", out).out == ""
    assert rows_of(out.read_text()) == rows  # the seed decides


def test_a_comparison(capsys, tmp_path):
    paths = {flag: tmp_path / name for flag, name in (("--json", "c.json"), ("--plot", "c.png"), ("-o", "c.jsonl"))}
    asked = [word for pair in paths.items() for word in pair]
    words = ("--split", "test", "--prompts", 6, "--compare", "--guided", "tokens,reject", "--n", "1,3", "--repeats", 2)
    text = run(capsys, *words, *asked).out
    assert max(map(len, text.splitlines())) <= 100
    found = json.loads(paths["--json"].read_text())
    assert [row["label"] for row in found["rows"]] == [
        "tokens n=1 β=1", "tokens n=3 β=1", "reject n=1 keep=0.95", "reject n=3 keep=0.95",
    ]  # fmt: skip
    outcomes = rows_of(paths["-o"].read_text())
    assert len(outcomes) == 4 * 2 * 6
    for row in found["rows"]:
        own = [o for o in outcomes if o["method"] == row["label"]]
        assert row["tokens"] == pytest.approx(sum(o["generated_tokens"] for o in own) / len(own))
        assert row["difference"]["value"] == pytest.approx(row["accuracy"]["value"] - row["best_of"]["value"])
        assert f"{row['label']:<20}"[:15] in text
    pooled = found["baselines"][0]
    assert pooled["n"] == 1 and pooled["best_of"]["value"] == pytest.approx(found["random"]["value"])
    reject = found["rows"][2]
    assert reject["full_n"] == 1 and reject["saved"] == pytest.approx(1 - reject["tokens"] / pooled["tokens"])
    assert paths["--plot"].read_bytes()[:4] == b"\x89PNG"


def test_a_comparison_needs_answers_and_other_prompts_than_training(capsys, prompts, tmp_path):
    error = run(capsys, prompts, "--compare", code=2).err
    assert "prompts.jsonl:2: --compare needs an 'answer' in every row" in error
    out = ("--json", tmp_path / "a", "--plot", tmp_path / "a.png")
    words = ("--split", "train", "--prompts", 2, "--compare", "--guided", "none", "--n", 1)
    error = run(capsys, *words, *out, code=2).err
    assert "the run was trained on this question" in error
    assert "best of 1" in run(capsys, *words, *out, "--allow-training-prompts").out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give either a file of prompts or --split"),
        (("x.jsonl", "--split", "test"), "give either a file of prompts or --split"),
        (("nowhere.jsonl",), "nowhere.jsonl: cannot be read"),
        (("--split", "test", "--guided", "wish"), "--guided wish: choose one of none, steps"),
        (("--split", "test", "--guided", "steps,tokens"), "several kinds are for --compare"),
        (("--split", "test", "--guided", "steps", "--beta", "1"), "--beta is not read by --guided steps"),
        (("--split", "test", "--beam", "1,2"), "several values are for --compare"),
        (("--split", "test", "--beam", "0"), "--beam 0: give a whole number from 1"),
        (("--split", "test", "--guided", "tokens", "--beta", "nan"), "--beta nan: give a number from 0"),
        (("--split", "test", "--guided", "reject", "--keep", "1.5"), "--keep 1.5: give a share"),
        (("--split", "test", "--guided", "reject", "--running", "max"), "--running max: give min or mean"),
        (("--split", "test", "--policy", "nowhere"), "--policy nowhere: there is no directory nowhere"),
        (("--split", "test", "--max-new-tokens", "0"), "--max-new-tokens 0: give a whole number from 1"),
        (("--split", "test", "--temperature", "-1"), "--temperature -1.0: give a number from 0"),
        (("--split", "test", "--repeats", "2"), "--repeats belongs to --compare"),
    ],
)
def test_mistakes_get_one_sentence(capsys, words, sentence):
    printed = run(capsys, *words, code=2)
    assert printed.out == "" and printed.err.count("\n") == 1
    assert sentence in printed.err


def test_ladders_and_products():
    given = {"n": None, "beta": "0.5, 2", "top_k": None}
    made = [(s.kind, s.values["n"], s.values["beta"]) for s in settings_of(["tokens"], given, compare=True)]
    assert made == [("tokens", n, beta) for n in (1, 2, 4) for beta in (0.5, 2.0)]
    (one,) = settings_of(["revise"], {"rounds": "7"}, compare=False)
    assert dict(one.values) == {"n": 1, "rounds": 7}
