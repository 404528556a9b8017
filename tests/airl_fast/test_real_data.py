"""Every published data set loads, scores and produces its tables, by a reward too small to be any good: what is
checked is that counts, baselines and refusals are right, against the raw files. Excerpts keep it short.
"""

import contextlib
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from airl_fast.cli import main
from airl_fast.data.task import make_task
from airl_fast.judge.judge import open_judge
from tests.airl_fast.run_cases import DATA, train

FILES = {
    "solutions": DATA / "gsm8k" / "model_solutions.jsonl.gz",
    "mistakes": DATA / "localisation" / "bigbench_mistake.jsonl",
    "mmlu_pro": DATA / "mmlu_pro" / "val_cot.jsonl",
    "medreason": DATA / "medreason" / "medmcqa_validation.jsonl",
    "gsm8k": DATA / "gsm8k" / "train.jsonl",
}
pytestmark = pytest.mark.skipif(
    not all(file.is_file() for file in FILES.values()),
    reason=f"the published data is not at {DATA}; set AIRL_DATA to its folder",
)
FEW = ("--prompts", "3", "--n", "2", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward of GSM8K with 40 thousand weights, two steps old."""
    root = tmp_path_factory.mktemp("real")
    with contextlib.redirect_stdout(io.StringIO()):
        train(
            f"data.path={DATA / 'gsm8k'}", "device=cpu", "threads=1", "steps=2", "checkpoint_every=0",
            "warm_start={updates: 2, batch_size: 2, examples: 200, learning_rate: 1e-3}", "data.num_experts=12",
            "data.num_dev=4", "rollout={prompts_per_step: 4, max_new_tokens: 8}",
            "model.build={vocab_size: 1024, hidden_size: 16, layers: 2, heads: 2, kv_heads: 1, "
            "intermediate_size: 32, max_length: 2048}", "evaluate={final: false, every: 0}", "tensorboard=false",
            f"output_dir={root}", "--run-name", "run", config="gsm8k-reward",
        )  # fmt: skip
    return root / "run"


def rows_of(file: Path) -> list[dict]:
    raw = file.read_bytes()
    text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
    return [json.loads(line) for line in text.splitlines() if line]


def written(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def call(capsys: pytest.CaptureFixture, *words: object, code: int = 0) -> str:
    """What the command printed; of one that is refused, its sentence."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    said = capsys.readouterr()
    return said.err.splitlines()[-1] if code else said.out


def json_named(said: str) -> dict:
    """The JSON file that a command says it wrote."""
    return json.loads(Path(next(line.strip() for line in said.splitlines() if line.endswith(".json"))).read_text())


def majority_position(truths: list[int], lengths: list[int]) -> float:
    """What always naming the most frequent position scores, counted here by hand; a trace too short for it gets the
    most frequent that it has."""
    counts = {place: truths.count(place) for place in range(max(lengths))}
    hits = []
    for truth, length in zip(truths, lengths, strict=True):
        most = max(counts[place] for place in range(length))
        best = [place for place in range(length) if counts[place] == most]
        hits.append((truth in best) / len(best))
    return sum(hits) / len(hits)


# ---------------------------------------------------------------------------------------------- model solutions


@pytest.fixture(scope="module")
def solutions() -> list[dict]:
    """Thirty questions, two solutions each."""
    return rows_of(FILES["solutions"])[:60]


def test_solutions_are_reranked_with_their_own_labels(
    run: Path, solutions: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = call(capsys, "rerank", run, written(tmp_path / "solutions.jsonl", solutions))
    found = json_named(said)
    right = np.array([row["is_correct"] for row in solutions]).reshape(-1, 2)
    assert found["traces"] == 60 and found["prompts"] == found["prompts_reranked"] == 30
    assert found["each"]["correct"] == right.ravel().tolist()
    at_1 = found["rerank"]["at_k"]["1"]
    assert at_1["random"]["value"] == pytest.approx(right.mean())
    assert at_1["oracle"]["value"] == pytest.approx(right.any(axis=1).mean())
    # Two different answers tie, so a majority of two is a random pick unless one names no answer.
    assert all(row["pred"] for row in solutions) and at_1["majority"]["value"] == pytest.approx(right.mean())
    scores = np.array(found["each"]["scores"]["reward"]).reshape(-1, 2)
    picked = [0.5 * r.sum() if s[0] == s[1] else r[s.argmax()] for s, r in zip(scores, right, strict=True)]
    assert at_1["reward"]["value"] == pytest.approx(np.mean(picked))
    # Prompts with one right and one wrong count; there the AUROC is whether the right one scores higher.
    both = right.sum(axis=1) == 1
    auroc = found["correctness"]["scores"]["reward"]
    assert auroc["prompts_with_both"] == both.sum() > 3 and auroc["prompts"] == 30
    margin = np.where(right[:, 0], scores[:, 0] - scores[:, 1], scores[:, 1] - scores[:, 0])[both]
    assert auroc["auroc_within_prompt"]["value"] == pytest.approx(((margin > 0) + 0.5 * (margin == 0)).mean())
    assert auroc["auroc_within_prompt"]["low"] <= auroc["auroc_within_prompt"]["value"]
    assert "random" in said and "AUROC" in said


def test_scores_of_solutions_do_not_depend_on_any_label(
    run: Path, solutions: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lie = [row | {"is_correct": not row["is_correct"], "gold": "-1"} for row in solutions]
    true, false = (
        json_named(call(capsys, "rerank", run, written(tmp_path / f"{name}.jsonl", rows)))
        for name, rows in (("true", solutions), ("false", lie))
    )
    assert true["each"]["scores"] == false["each"]["scores"]
    assert [not label for label in true["each"]["correct"]] == false["each"]["correct"]
    mean = [found["correctness"]["scores"]["reward"]["auroc_within_prompt"]["value"] for found in (true, false)]
    assert mean[0] == pytest.approx(1 - mean[1])


def test_questions_of_the_training_file_are_refused_unless_asked_for(
    run: Path, solutions: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also one that this run drew no demonstration from: it belongs to the run's training split all the same."""
    known = make_task("gsm8k", path=str(DATA / "gsm8k")).load("train")[200]
    leak = [*solutions[:2], solutions[0] | {"question": "  " + known.prompt.upper()}, solutions[1]]
    file = written(tmp_path / "leak.jsonl", leak)
    told = call(capsys, "rerank", run, file, code=2)
    assert f"{file}:3: the run was trained on this question" in told and "--allow-training-prompts" in told
    said = call(capsys, "rerank", run, file, "--allow-training-prompts", "--n", "1")
    assert json_named(said)["traces"] == 4
    told = call(capsys, "transfer", run, "--split", "train", *FEW, code=2)
    assert "the run was trained on this question" in told


# ---------------------------------------------------------------------------------------------- first wrong steps


@pytest.fixture(scope="module")
def mistakes() -> list[dict]:
    """The first nine short traces of each of BIG-Bench Mistake's five tasks. Two steps of one are a single one where
    a token spans both, so empty steps are left out here: counting by hand must be plain."""
    short = [row for row in rows_of(FILES["mistakes"]) if len(row["question"] + "".join(row["steps"])) < 1500]
    chosen = {}
    for row in short:
        if all(step.strip() for step in row["steps"]):
            chosen.setdefault(row["task"], []).append(row)
    return [row for rows in chosen.values() for row in rows[:9]]


def localised(capsys: pytest.CaptureFixture, run: Path, rows: list[dict], folder: Path) -> tuple[str, dict, list[dict]]:
    """What `localize` printed, its figures, and its predictions row by row."""
    folder.mkdir()
    file, figures, predictions = (folder / name for name in ("in.jsonl", "figures.json", "out.jsonl"))
    said = call(capsys, "localize", run, written(file, rows), "--json", figures, "-o", predictions)
    return said, json.loads(figures.read_text()), rows_of(predictions)


def test_first_wrong_steps_of_big_bench_mistake(
    run: Path, mistakes: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said, figures, predictions = localised(capsys, run, mistakes, tmp_path / "true")
    assert figures["traces"] == len(mistakes) == 45 and figures["too_long"] == 0
    sections = {section["name"]: section for section in figures["sections"]}
    assert set(sections) == {"all", *(row["task"] for row in mistakes)} and len(sections) == 6
    for name, section in sections.items():
        own = [row for row in mistakes if name in ("all", row["task"])]
        wrong = [row for row in own if row["first_error"] is not None]
        assert (section["traces"], section["wrong"], section["without"]) == (
            len(own),
            len(wrong),
            len(own) - len(wrong),
        )
        found = {each: estimate["hit_at_1"]["value"] for each, estimate in section["localise"].items()}
        lengths = [len(row["steps"]) for row in wrong]
        truths = [row["first_error"] for row in wrong]
        assert found["chance"] == pytest.approx(np.mean([1 / n for n in lengths]))
        assert found["majority_position"] == pytest.approx(majority_position(truths, lengths))
        hits = [p["predicted"] == r["first_error"] for p, r in zip(predictions, mistakes, strict=True) if r in wrong]
        assert found["reward"] == pytest.approx(np.mean(hits))
        assert 0 <= found["logprob"] <= 1 and (name in said or name == "all")
    assert [len(each["steps"]) for each in predictions] == [len(row["steps"]) for row in mistakes]


def test_what_score_and_localize_say_of_a_trace_does_not_depend_on_labels(
    run: Path, mistakes: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lie = []
    for row in mistakes:
        moved = None if row["first_error"] == 0 else 0
        lie.append(row | {"first_error": moved, "gold": "?", "answer_correct": not row["answer_correct"]})
    found = []
    for name, rows in (("true", mistakes), ("false", lie)):
        *_, predictions = localised(capsys, run, rows, tmp_path / name)
        scores = tmp_path / name / "scores.jsonl"
        call(capsys, "score", run, tmp_path / name / "in.jsonl", "-o", scores)
        found.append((predictions, rows_of(scores)))
    for true, false in zip(*found, strict=True):
        assert len(true) == len(false) == len(mistakes)
        assert all(one.pop("labels") != other.pop("labels") for one, other in zip(true, false, strict=True))
        assert true == false


def test_solutions_are_scored_row_by_row(
    run: Path, solutions: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "scores.jsonl"
    call(capsys, "score", run, written(tmp_path / "in.jsonl", solutions[:10]), "-o", out)
    scored = rows_of(out)
    assert [row["labels"]["correct"] for row in scored] == [row["is_correct"] for row in solutions[:10]]
    assert [row["labels"]["group"] for row in scored] == ["6b_finetuning", "6b_verification"] * 5
    for row, given in zip(scored, solutions, strict=False):
        assert "<<" not in "".join(row["tokens"]) and row["scorer"] == "mean"
        assert row["rewards"]["mean"] == pytest.approx(np.mean(row["token_rewards"]), abs=1e-5)
        assert row["logprob"] == pytest.approx(np.mean(row["token_logprobs"]), abs=1e-5)
        assert row["steps"][-1]["text"].strip().endswith(f"<answer>{given['pred']}</answer>")


@pytest.mark.parametrize(
    ("task", "folder", "split"),
    [("gsm8k", "gsm8k", "test"), ("mmlu_pro", "mmlu_pro", "train"), ("medreason", "medreason", "dev")],
)
def test_perturbed_demonstrations_of_every_set_are_scored_and_localised(
    task: str, folder: str, split: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "broken.jsonl"
    call(
        capsys, "data", "perturb", task, f"path={DATA / folder}", "--split", split, "-n", 8, "--originals", "-o", file
    )  # fmt: skip
    rows = rows_of(file)
    wrong = [row for row in rows if row["first_wrong_step"] is not None]
    assert len(rows) - len(wrong) == 8 and len(wrong) >= 6
    said, figures, predictions = localised(capsys, run, rows, tmp_path / "found")
    (section,) = [section for section in figures["sections"] if section["name"] == "all"]
    assert (section["traces"], section["wrong"], section["without"]) == (len(rows), len(wrong), 8)
    lengths = [len(p["steps"]) for p, row in zip(predictions, rows, strict=True) if row in wrong]
    truths = [row["first_wrong_step"] for row in wrong]
    found = {each: estimate["hit_at_1"]["value"] for each, estimate in section["localise"].items()}
    assert found["chance"] == pytest.approx(np.mean([1 / n for n in lengths]))
    assert found["majority_position"] == pytest.approx(majority_position(truths, lengths))
    scores = tmp_path / "scores.jsonl"
    call(capsys, "score", run, file, "--only", "trace", "-o", scores)
    assert [row["id"] for row in rows_of(scores)] == [row["id"] for row in rows]
    assert f"first wrong step, {len(wrong)} traces" in said and "most frequent position" in said
    assert f"has a wrong step: {len(wrong)} of {len(rows)}" in said


# ---------------------------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize(
    ("task", "folder", "split", "file"),
    [("mmlu_pro", "mmlu_pro", "train", "val_cot.jsonl"), ("medreason", "medreason", "dev", "medmcqa_validation.jsonl")],
)
def test_multiple_choice_with_demonstrations_is_transferred_to(
    task: str, folder: str, split: str, file: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    said = call(capsys, "transfer", run, "--task", f"{task}:path={DATA / folder}", "--split", split, *FEW)
    (cell,) = json_named(said)["cells"]
    examples = make_task(task, path=str(DATA / folder)).load(split, 3)
    questions = {" ".join(row["question"].split()) for row in rows_of(DATA / folder / file)}
    assert all(any(" ".join(e.prompt.split()).startswith(q) for q in questions) for e in examples)
    assert (cell["task"], cell["prompts"], cell["samples"], cell["prompts_left_out"]) == (task, 3, 2, 0)
    assert cell["wrong_steps_are"] == "perturbed demonstrations"
    # The same broken demonstrations, made again: where they are broken gives chance and the best position.
    judge = open_judge(run, task=make_task(task, path=str(DATA / folder)))
    broken = judge.perturbed(examples)
    lengths = [len(judge.maker.step_tokens(trace)) for trace in broken.traces]
    ends = [judge.maker.step_tokens(trace) for trace in broken.traces]
    places = [judge.maker.token_at(trace, trace.first_changed + 1) for trace in broken.traces]
    truths = [sum(end < place for end in own) for own, place in zip(ends, places, strict=True)]
    assert cell["traces_with_a_wrong_step"] == len(truths) >= 2
    assert cell["localise"]["chance"]["hit_at_1"]["value"] == pytest.approx(np.mean([1 / n for n in lengths]))
    by_position = cell["localise"]["majority_position"]["hit_at_1"]["value"]
    assert by_position == pytest.approx(majority_position(truths, lengths))
    for name in ("reward", "logprob"):
        estimate = cell["localise"][name]["hit_at_1"]
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    # Eight tokens of a model that knows nothing name no option: every way of picking is wrong.
    assert {name: each["value"] for name, each in cell["rerank_pass_at_1"].items()} == dict.fromkeys(
        cell["rerank_pass_at_1"], 0
    )
    assert cell["auroc_within_prompt"] is None and cell["prompts_with_both"] == 0
    assert "first wrong step named by" in said and "pass@1 of the policy" in said


def test_a_matrix_of_published_tests(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Test questions come without a demonstration, so nothing can be perturbed there, and the table says so."""
    tasks = [f"--task={task}:path={DATA / task}" for task in ("gsm8k", "mmlu_pro", "medreason")]
    picture = tmp_path / "matrix.png"
    said = call(capsys, "transfer", run, *tasks, *FEW, "--json", tmp_path / "matrix.json", "--png", picture)
    cells = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert [(cell["task"], cell["prompts"]) for cell in cells] == [("gsm8k", 3), ("mmlu_pro", 3), ("medreason", 3)]
    assert [bool(cell["localise"]) for cell in cells] == [True, False, False]
    assert "No wrong steps are known where prompts have no demonstrations to perturb." in said
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
