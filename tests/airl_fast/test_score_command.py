"""`airl-fast score`: the rewards of a file's traces, the same however they are read, and never seen by a label."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from airl_fast.cli import main
from airl_fast.data.task import make_task
from airl_fast.integrations.reward import AIRLRewardFunction
from airl_fast.judge.judge import open_judge
from airl_fast.measures.localise import step_scores
from airl_fast.measures.rerank import trace_scores
from airl_fast.types import Example
from tests.airl_fast.run_cases import small_run

OPTIONS = {"min_ops": 1, "max_ops": 2, "train_size": 40, "dev_size": 16, "test_size": 16}
ARITHMETIC = make_task("arithmetic", **OPTIONS)
OTHER = "start 1; gain 2; lose 1; gain 3?"  # longer than any prompt of the run
CLOSE = {"abs": 2e-6}  # rounding to six digits


def traces(count: int = 6, *, right: bool = True) -> list[dict]:
    """Demonstrations of test prompts, each followed by one with a wrong last step."""
    rows = []
    for example in ARITHMETIC.load("test")[:count]:
        rows.append({"id": example.id, "prompt": example.prompt, "completion": example.expert, "correct": right})
        broken = example.expert.replace(f"<answer>{example.answer}", f"<answer>{int(example.answer) + 1}")
        rows.append({"prompt": example.prompt, "completion": broken, "correct": not right, "first_wrong_step": 1})
    return rows


def written(path: Path, rows: Sequence[dict | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def scored(capsys: pytest.CaptureFixture, file: Path, *words: object, run: Path | None = None) -> list[dict]:
    """The rows on standard output."""
    capsys.readouterr()
    assert main(["score", str(run or small_run()), str(file), *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    capsys.readouterr()
    assert main(["score", str(small_run()), *map(str, words)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("airl-fast: ") and said[-1].endswith(".")
    return said[-1]


def numbers(row: dict) -> list[float]:
    return [*row["rewards"].values(), row["logprob"], *row["token_rewards"], *row["token_logprobs"]]


def test_the_numbers_are_those_of_the_judge_and_of_the_reward_function(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = traces()
    found = scored(capsys, written(tmp_path / "in.jsonl", rows), run=small_run() / "final" / "discriminator")
    judge = open_judge(small_run())
    examples = [Example(id=str(i), prompt=row["prompt"], answer="") for i, row in enumerate(rows)]
    made = [judge.trace(e, i, row["completion"]) for i, (e, row) in enumerate(zip(examples, rows, strict=True))]
    expected = judge.score(made, examples)
    own = AIRLRewardFunction(small_run())
    theirs = own.token_rewards([row["prompt"] for row in rows], [trace.tokens for trace in made])
    means = trace_scores(expected.reward, "mean")
    lows, logprobs = step_scores(expected.reward, "min"), trace_scores(expected.logprob, "mean")
    assert [row["id"] for row in found[:2]] == [rows[0]["id"], "in.jsonl:2"]
    for i, row in enumerate(found):
        inside = slice(*expected.reward.offsets[i : i + 2])
        assert row["token_rewards"] == pytest.approx(expected.reward.values[inside], **CLOSE)
        assert row["token_rewards"] == pytest.approx(theirs[i].tolist(), **CLOSE)
        assert row["token_logprobs"] == pytest.approx(expected.logprob.values[inside], **CLOSE)
        assert (row["rewards"]["mean"], row["logprob"]) == pytest.approx((means[i], logprobs[i]), **CLOSE)
        assert row["rewards"]["last"] == row["token_rewards"][-1]
        assert "".join(row["tokens"]) == rows[i]["completion"] + "<|end|>"
        assert "".join(step["text"] for step in row["steps"]) == rows[i]["completion"]
        assert [step["reward_min"] for step in row["steps"]] == pytest.approx(
            lows.values[slice(*lows.offsets[i : i + 2])], **CLOSE
        )
        assert [rows[i]["completion"][s["start"] : s["end"]] for s in row["steps"]] == [s["text"] for s in row["steps"]]
        last = row["token_rewards"][-len(own_tokens(row)) :]
        to_go = sum(value * judge.config.advantage.gamma**k for k, value in enumerate(last))
        assert row["steps"][-1]["reward_to_go"] == pytest.approx(to_go, abs=1e-5)
        assert row["run"] == "small" and len(row["reward_sha256"]) == 16 and row["scorer"] == "min_step"


def own_tokens(row: dict) -> list[str]:
    """The tokens of the last step."""
    start = row["steps"][-1]["start"]
    return [token for token, (a, _) in zip(row["tokens"], row["token_spans"], strict=True) if a >= start]


def test_scores_do_not_depend_on_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = written(tmp_path / "in.jsonl", traces())
    whole = scored(capsys, file, "--locate")
    for tokens in (1, 90):
        cut = scored(capsys, file, "--locate", "--part-tokens", tokens)
        assert [row["id"] for row in cut] == [row["id"] for row in whole]
        for one, other in zip(cut, whole, strict=True):
            assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)
            assert one["first_wrong_step"]["suspicion"] == pytest.approx(
                other["first_wrong_step"]["suspicion"], abs=1e-5
            )


def test_labels_are_carried_and_change_no_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = traces(3)
    one = scored(capsys, written(tmp_path / "one.jsonl", rows), "--locate")
    flipped = [row | {"correct": not row["correct"], "first_wrong_step": None, "answer": 9} for row in rows]
    other = scored(capsys, written(tmp_path / "one.jsonl", flipped), "--locate")
    assert [row.pop("labels") for row in one] == [
        {"correct": True}, {"correct": False, "first_wrong_step": 1},
    ] * 3  # fmt: skip
    assert [row.pop("labels") for row in other] == [
        {"correct": False, "first_wrong_step": None, "answer": "9"},
        {"correct": True, "first_wrong_step": None, "answer": "9"},
    ] * 3
    assert one == other


def test_how_much_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = written(tmp_path / "in.jsonl", [{"prompt": OTHER, "completion": "1 + 2 = 3\nso 3"}])
    ((whole,), (trace,), (steps,), (tokens,)) = (
        scored(capsys, file, *words) for words in ((), ("--only", "trace"), ("--only", "steps"), ("--only", "tokens"))
    )
    assert trace["rewards"]["answer"] is None and whole["labels"] == {}  # it names no answer
    per_token = {"tokens", "token_spans", "token_rewards", "token_logprobs"}
    assert set(steps) - set(trace) == {"steps"} and set(tokens) - set(trace) == per_token
    assert whole == trace | steps | tokens and len(whole["steps"]) == 2


def test_files_gzip_and_standard_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = traces(2)
    file, out = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl.gz"
    expected = scored(capsys, file, "--only", "trace")
    assert scored(capsys, file, "--only", "trace", "-o", out) == []
    with gzip.open(out, "rt") as lines:
        assert [json.loads(line) for line in lines] == expected
    assert "exists already" in refused(capsys, file, "-o", out)
    assert scored(capsys, file, "--only", "trace", "-o", out, "--force") == []
    assert "this is the input" in refused(capsys, file, "-o", file, "--force") and file.read_text().count("\n") == 4
    assert "no such file" in refused(capsys, tmp_path / "none.jsonl")
    kept = os.dup(0)
    with file.open() as given:
        os.dup2(given.fileno(), 0)
        try:
            piped = scored(capsys, Path("-"), "--only", "trace")
        finally:
            os.dup2(kept, 0)
            os.close(kept)
    assert [row["rewards"] for row in piped] == [row["rewards"] for row in expected] and piped[1]["id"] == "stdin:2"


def test_a_bad_row_is_named_and_what_was_scored_stays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows, out = traces(2), tmp_path / "out.jsonl"
    file = written(tmp_path / "in.jsonl", [*rows[:3], '{"prompt": "p"', rows[3]])
    assert f"{file}:4: not JSON" in refused(capsys, file, "-o", out, "--only", "trace")
    assert not out.exists()
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.partial").read_text().splitlines()]
    assert [row["rewards"] for row in kept] == [
        row["rewards"] for row in scored(capsys, written(tmp_path / "good.jsonl", rows[:3]), "--only", "trace")
    ]


def test_what_is_too_long_or_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = traces(1)
    long = {"prompt": OTHER, "completion": "1 + 2 = 3\n" * 60}
    file = written(tmp_path / "in.jsonl", [rows[0], long, rows[1], long])
    said = refused(capsys, file)
    assert f"{file}:2 has " in said and "the policy's context 256; leave such traces out with --too-long drop" in said
    capsys.readouterr()
    assert main(["score", str(small_run()), str(file), "--only", "trace", "--too-long", "drop"]) == 0
    told = capsys.readouterr()
    assert [json.loads(line)["id"] for line in told.out.splitlines()] == [rows[0]["id"], "in.jsonl:3"]
    assert "2 traces passed over as too long (--too-long drop): the first, " + f"{file}:2 has" in told.err
    seen = ARITHMETIC.load("train")[0]
    file = written(tmp_path / "in.jsonl", [rows[0], {"prompt": seen.prompt, "completion": seen.expert}])
    assert f"{file}:2: the run was trained on this question" in refused(capsys, file)
    assert len(scored(capsys, file, "--allow-training-prompts", "--only", "trace")) == 2


def test_the_named_step_follows_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = written(tmp_path / "in.jsonl", traces(3))
    for row in scored(capsys, file, "--locate", "--rule", "argmin"):
        named = row["first_wrong_step"]
        lowest = [step["reward_min"] for step in row["steps"]]  # evaluate.step_score of the run
        assert named["predicted"] == int(np.argmin(lowest)) and named["threshold"] is named["below_threshold"] is None
        assert named["suspicion"] == pytest.approx([-value for value in lowest], **CLOSE)
    for row in scored(capsys, file, "--locate", "--rule", "first_below", "--threshold", 0.5):
        below = [k for k, step in enumerate(row["steps"]) if step["reward_min"] < 0.5]
        assert row["first_wrong_step"]["below_threshold"] is bool(below)
        assert not below or row["first_wrong_step"]["predicted"] == below[0]
    assert "add --locate" in refused(capsys, file, "--rule", "argmin")
    assert "rule argmin has none" in refused(capsys, file, "--locate", "--rule", "argmin", "--threshold", 1)
    assert "--part-tokens 0" in refused(capsys, file, "--part-tokens", 0)
