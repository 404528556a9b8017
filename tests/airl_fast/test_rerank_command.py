"""`airl-fast rerank`: fresh samples, traces of a file, labels that come last, and subsets by brute force."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from airl_fast.cli import main
from airl_fast.data.task import make_task
from airl_fast.judge.judge import Scored
from airl_fast.judge.scoring import join
from airl_fast.measures.localise import TokenValues
from airl_fast.measures.rerank import choose_by_score, choose_by_vote
from airl_fast.measures.subsets import best_of_subset, sizes, vote_of_subset
from airl_fast.overrides import read_yaml
from tests.airl_fast.run_cases import small_run

OPTIONS = {"min_ops": 1, "max_ops": 2, "train_size": 40, "dev_size": 16, "test_size": 16}


def reranked(capsys: pytest.CaptureFixture, *words: object) -> tuple[str, dict]:
    """What the command printed, and the JSON whose path is its last line."""
    capsys.readouterr()
    assert main(["rerank", str(small_run()), *map(str, words)]) == 0
    said = capsys.readouterr().out
    return said, json.loads(Path(said.splitlines()[-1].strip()).read_text())


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    capsys.readouterr()
    assert main(["rerank", str(small_run()), *map(str, words)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.splitlines()[-1].startswith("airl-fast: ")
    return told.err.splitlines()[-1]


def test_the_start_policys_samples_give_the_figures_of_the_run(capsys: pytest.CaptureFixture) -> None:
    said, document = reranked(capsys)
    summary = json.loads((small_run() / "summary.json").read_text())
    first = document["rerank"]["at_k"]["1"]
    for name, value in (summary["rerank_pass_at_1"] | summary["rerank_other_pass_at_1"]).items():
        assert first[name]["value"] == pytest.approx(value), name
    within = document["correctness"]["scores"]["reward"]["auroc_within_prompt"]
    assert (within and within["value"]) == pytest.approx(summary["auroc_within_prompt"])
    assert set(document["rerank"]["at_k"]) == {"1", "3", "5"} and document["rerank"]["samples"] == 5
    assert "pass@1|5 [95%]" in said and "reward-weighted vote" in said and max(map(len, said.splitlines())) <= 120
    assert (small_run() / "eval" / "rerank-test-start.png").read_bytes()[:4] == b"\x89PNG"


def test_differences_are_those_of_the_prompts(capsys: pytest.CaptureFixture) -> None:
    _, document = reranked(capsys, "--n", 4, "--prompts", 6, "--policy", "airl", "--k", "2")
    rerank, per_prompt = document["rerank"], document["rerank"]["per_prompt"]
    assert document["prompts"] == 6 and document["traces"] == 24 and set(rerank["at_k"]) == {"1", "2"}
    for name, row in rerank["at_k"]["1"].items():
        expected = np.mean(np.array(per_prompt[name]) - np.array(per_prompt["random"]))
        assert row["minus_random"]["value"] == pytest.approx(expected)
    whole = {name: row[-1]["value"] for name, row in rerank["by_size"]["pass_at_1"].items()}
    assert whole == pytest.approx({name: row["value"] for name, row in rerank["at_k"]["1"].items()})
    assert rerank["by_size"]["sizes"] == [1, 2, 4]
    correct = np.array(document["each"]["correct"]).reshape(6, 4)
    assert rerank["by_size"]["pass_at_1"]["reward"][0]["value"] == pytest.approx(correct.mean())


# ---------------------------------------------------------------------------------------------- a file's traces


def rows(counts: list[int], flip: bool = False, labels: str = "correct") -> list[dict]:
    """Fresh questions with `counts` traces each: the demonstration, then perturbed ones, in turn."""
    task = make_task("arithmetic", seed=read_yaml(small_run() / "config.yaml")["seed"], **OPTIONS)
    found = []
    for example, count in zip(task.load("test"), counts, strict=False):
        wrong = example.expert.replace(f"<answer>{example.answer}</answer>", "<answer>77</answer>")
        for i in range(count):
            row = {"prompt": example.prompt, "completion": wrong if i % 2 else example.expert}
            right = i % 2 == 0
            known = {"correct": right != flip} if labels == "correct" else {"answer": example.answer}
            found.append(row | known)
    return found


def written(path: Path, traces: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in traces))
    return path


def test_labels_change_the_verdicts_and_no_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, as_they_are = reranked(capsys, written(tmp_path / "right.jsonl", rows([4] * 8)))
    _, flipped = reranked(capsys, written(tmp_path / "flipped.jsonl", rows([4] * 8, flip=True)))
    assert as_they_are["each"]["scores"] == flipped["each"]["scores"]
    assert as_they_are["each"]["correct"] == [not label for label in flipped["each"]["correct"]]
    one, other = (d["correctness"]["scores"]["reward"]["auroc_within_prompt"]["value"] for d in (as_they_are, flipped))
    assert one == pytest.approx(1 - other)


def test_the_task_verifies_where_the_file_gives_the_answer_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, labelled = reranked(capsys, written(tmp_path / "labelled.jsonl", rows([2] * 4)))
    _, verified = reranked(capsys, written(tmp_path / "verified.jsonl", rows([2] * 4, labels="answer")))
    assert verified["each"] == labelled["each"]
    assert verified["rerank"]["at_k"]["1"]["random"]["value"] == 0.5


def test_unequal_groups_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = written(tmp_path / "unequal.jsonl", rows([5, 2, 4, 1, 4]))
    said, document = reranked(capsys, file, "--n", 4)
    assert (document["prompts"], document["prompts_reranked"], document["traces"]) == (5, 3, 16)
    assert "5 prompts, 16 traces, 1 to 5 a prompt" in said
    assert "the first 4 samples of the 3 prompts that have as many, 12 of 16 traces" in " ".join(said.split())
    assert document["rerank"]["at_k"]["1"]["random"]["value"] == 0.5  # the fifth trace of the first prompt is left out
    assert document["correctness"]["scores"]["reward"]["prompts_with_both"] == 4
    said, document = reranked(capsys, file)  # as many as every prompt has: one
    assert "rerank" not in document and document["correctness"]["traces"] == 16
    assert "nothing to pick from" in said
    assert "no prompt of" in (error := refused(capsys, file, "--n", 6)) and "the most is 5; lower --n." in error


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--k 9: more than the 5 samples per prompt; raise --n." in refused(capsys, "--k", "9")
    assert "--n 0: give a whole number from 1." in refused(capsys, "--n", 0)
    assert "--policy random: neither one of start, airl, sft, grpo" in refused(capsys, "--policy", "random")
    assert "--allow-training-prompts" in refused(capsys, "--split", "train")
    bare = written(tmp_path / "bare.jsonl", [{"prompt": "1 + 1?", "completion": "<answer>2</answer>"}])
    assert f"{bare}:1: neither 'correct' nor 'answer' says" in refused(capsys, bare)
    long = written(tmp_path / "long.jsonl", [*rows([2]), {"prompt": "x", "completion": "1 " * 400, "correct": False}])
    error = refused(capsys, long)
    assert f"{long}:3 has" in error and "(1 of 3 traces are too long); leave such traces out with --too-long" in error
    _, document = reranked(capsys, long, "--too-long", "drop")
    assert (document["prompts"], document["traces"]) == (1, 2)


def test_training_prompts_can_be_allowed(capsys: pytest.CaptureFixture) -> None:
    _, document = reranked(capsys, "--split", "train", "--allow-training-prompts", "--prompts", 2, "--n", 2)
    assert document["prompts"] == 2 and document["traces"] == 4


# ---------------------------------------------------------------------------------------------- subsets


def test_the_best_of_subsets_is_the_mean_over_all_of_them_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (7, 6)).astype(float)
    scores[rng.random((7, 6)) < 0.2] = -np.inf
    correct = rng.random((7, 6)) < 0.5
    for m in (1, 2, 4, 6):
        each = [choose_by_score(scores[:, list(c)], correct[:, list(c)]) for c in combinations(range(6), m)]
        assert best_of_subset(scores, correct, m) == pytest.approx(np.mean(each, axis=0))


def test_a_vote_among_subsets_is_exact_or_close_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    classes, correct = rng.integers(-1, 3, (5, 12)), rng.random((5, 12)) < 0.5
    weights = rng.random((5, 12))
    each = [
        choose_by_vote(classes[:, list(c)], correct[:, list(c)], weights[:, list(c)])
        for c in combinations(range(12), 5)
    ]
    found, exact = vote_of_subset(classes, correct, 5, weights)
    assert exact and found == pytest.approx(np.mean(each, axis=0))
    monkeypatch.setattr("airl_fast.measures.subsets._MOST_VOTES", 100)
    near, exact = vote_of_subset(classes, correct, 5, weights)
    assert not exact and np.abs(near - found).max() < 0.08


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, (1,)), (5, (1, 2, 4, 5)), (16, (1, 2, 4, 8, 16)), (64, (1, 4, 16, 64)), (100, (1, 4, 16, 64, 100))],
)
def test_sizes_end_with_all_samples(n: int, expected: tuple[int, ...]) -> None:
    assert sizes(n) == expected


def test_joined_parts_are_the_whole() -> None:
    def part(*lengths: int) -> Scored:
        total = sum(lengths)
        values = TokenValues(
            values=np.arange(total, dtype=float) + 10 * len(lengths),
            offsets=np.cumsum([0, *lengths]),
            step_ends=np.arange(total) % 2 == 0,
            answer_mask=np.arange(total) % 3 == 0,
        )
        return Scored(traces=(), reward=values, logprob=values)

    whole = join([part(2, 3), part(4), part(1, 1, 1)])
    assert whole.reward.offsets.tolist() == [0, 2, 5, 9, 10, 11, 12]
    assert whole.reward.values.tolist() == [20, 21, 22, 23, 24, 10, 11, 12, 13, 30, 31, 32]
    assert np.flatnonzero(whole.logprob.answer_mask).tolist() == [0, 3, 5, 8, 9]
