"""What an evaluation records is what it measured, and recording touches nothing else of a run."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from airl_fast.artifacts import REWARD, load_reward
from airl_fast.evaluate import record as recording
from airl_fast.evaluate.command import open_run
from airl_fast.evaluate.policies import Samples, sample_policy
from airl_fast.evaluate.record import curve_ks, prompts_that_fit, read_record, record_evaluation, record_path
from airl_fast.evaluate.reward import evaluate_reward
from airl_fast.judge.judge import Judge, judge_of, open_judge
from airl_fast.lab import Lab, held_out
from tests.airl_fast.run_cases import small_run


@pytest.fixture(scope="module")
def recorded():
    return read_record(record_path(small_run(), "test"))


@pytest.fixture(scope="module")
def lab() -> Lab:
    return open_run(small_run())


@pytest.fixture(scope="module")
def samples(lab) -> Samples:
    return sample_policy(lab, lab.start, held_out(lab, "test"), 3, "final-start")


def judge_with(lab: Lab, task: object | None = None) -> Judge:
    maker = lab.maker if task is None else replace(lab.maker, task=task)
    model, bridge = load_reward(small_run() / REWARD, lab.config, maker, lab.start, lab.start.device)
    return judge_of(lab, model, bridge)


def test_figures_are_those_of_the_summary(recorded) -> None:
    record, _ = recorded
    summary = json.loads((small_run() / "summary.json").read_text())
    assert {name: curve[1].value for name, curve in record.pass_at_k.items()} == {
        name: value for name, value in summary["pass_at_1"].items() if value is not None
    }
    assert {name: curve[5].value for name, curve in record.pass_at_k.items()} == summary["pass_at_5"]
    picks = summary["rerank_pass_at_1"] | summary["rerank_other_pass_at_1"]
    assert {name: curve[1].value for name, curve in record.reward.rerank.items()} == picks
    hits = summary["localise_hit_at_1"] | summary["localise_other_hit_at_1"]
    assert {name: each.hit_at_1.value for name, each in record.reward.localisation.items()} == hits
    assert record.reward.auroc_within_prompt.value == summary["auroc_within_prompt"]
    assert (record.samples, record.prompts_total) == (5, summary["counts"]["test_prompts"])
    assert np.mean(record.reward.correct) == pytest.approx(summary["pass_at_1"]["start"])


def test_every_curve_ends_where_all_are_picked(recorded) -> None:
    record, _ = recorded
    oracle = record.reward.rerank["oracle"][1].value
    assert record.pass_at_k["start"][5].value == pytest.approx(oracle)
    for name in ("reward", "random", "logprob"):
        assert record.reward.rerank[name][5].value == pytest.approx(oracle)


def test_token_values_are_the_judges(recorded) -> None:
    record, traces = recorded
    judge = open_judge(small_run())
    examples = judge.task.load("test", len(record.prompts))
    written = [(t, judge.trace(examples[t.prompt], t.prompt, t.text, t.finished)) for t in traces]
    same = [  # a weak policy samples tokens that its text would not be cut into
        (t, made) for t, made in written if judge.maker.chat.token_char_spans(made.text, made.tokens) == t.spans
    ]
    assert {t.kind for t, _ in same} == {"sample", "perturbed"}
    chosen, made = zip(*same, strict=True)
    scored = judge.score(made, examples)
    assert scored.reward.values.tolist() == pytest.approx([r for t in chosen for r in t.reward], abs=2e-4)
    assert scored.logprob.values.tolist() == pytest.approx([v for t in chosen for v in t.logprob], abs=2e-4)
    ends = [np.flatnonzero(scored.reward.step_ends[a:b]).tolist() for a, b in spans(scored.reward.offsets)]
    assert ends == [t.step_ends for t in chosen]
    for trace in traces:
        assert "".join(trace.text[a:b] for a, b in trace.spans) == trace.text
        assert trace.spans[-1] == (len(trace.text), len(trace.text)) or not trace.finished


def spans(offsets: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


def test_steps_and_errors_are_the_tasks(recorded) -> None:
    record, traces = recorded
    task = open_judge(small_run()).task
    examples = task.load("test", len(record.prompts))
    for trace in traces:
        example = examples[trace.prompt]
        assert record.prompts[trace.prompt].prompt == example.prompt
        wrong = task.first_wrong_step(example, trace.text)
        assert trace.truth == (-1 if wrong is None else wrong)
        assert trace.kind == "perturbed" or trace.correct == (trace.finished and task.verify(example, trace.text))
        assert len(trace.step_ends) == len(trace.step_scores) and trace.predicted in range(len(trace.step_ends))
    located = [t for t in traces if t.kind == "sample" and t.truth >= 0]
    hits = np.mean([t.predicted == t.truth for t in located])
    assert hits == pytest.approx(record.reward.localisation["reward"].hit_at_1.value)  # no two steps tie
    assert {t.kind for t in traces} == {"sample", "perturbed"}
    assert [t.sample for t in traces[:6]] == [0, 1, 2, 3, 4, 0]


def test_recording_draws_nothing_of_the_runs(lab, samples, tmp_path) -> None:
    judge = judge_with(lab)
    report = evaluate_reward(judge, samples, lab.material.train)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    path = tmp_path / "eval" / "traces-test.jsonl.gz"
    record_evaluation(path, "test", {"start": samples}, "<|end|>", judge, report)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()) == before
    first = path.read_bytes()
    record_evaluation(path, "test", {"start": samples}, "<|end|>", judge, report)
    assert path.read_bytes() == first


class Silent:
    """A task that knows no errors: its steps are right or wrong, and it cannot tell which."""

    def __init__(self, task) -> None:
        self._task = task

    def __getattr__(self, name: str):
        if name == "first_wrong_step":
            raise AttributeError(name)
        return getattr(self._task, name)


def test_a_task_that_cannot_tell_records_perturbed_demonstrations_and_no_truth(lab, samples, tmp_path) -> None:
    judge = judge_with(lab, Silent(lab.material.task))
    report = evaluate_reward(judge, samples, lab.material.train)
    path = tmp_path / "eval" / "traces-test.jsonl.gz"
    record_evaluation(path, "test", {"start": samples}, "<|end|>", judge, report)
    record, traces = read_record(path)
    broken = [t for t in traces if t.kind == "perturbed"]
    assert {t.truth for t in traces if t.kind == "sample"} == {None}
    assert len(broken) == report.located == record.reward.localisation["reward"].traces
    hits = np.mean([t.predicted == t.truth for t in broken])
    assert hits == pytest.approx(record.reward.localisation["reward"].hit_at_1.value)
    for trace in broken:
        assert lab.material.task.first_wrong_step(samples.examples[trace.prompt], trace.text) == trace.truth


def test_prompts_are_recorded_whole_and_no_more_than_fit(lab, samples, tmp_path, monkeypatch) -> None:
    assert prompts_that_fit(samples) == len(samples.examples) == 8
    monkeypatch.setattr(recording, "MAX_TRACES", 7)
    assert prompts_that_fit(samples) == 2
    judge = judge_with(lab)
    report = evaluate_reward(judge, samples, lab.material.train)
    path = tmp_path / "eval" / "traces-test.jsonl.gz"
    record_evaluation(path, "test", {"start": samples}, "<|end|>", judge, report)
    record, traces = read_record(path)
    assert [t.prompt for t in traces if t.kind == "sample"] == [0, 0, 0, 1, 1, 1]
    assert {t.prompt for t in traces if t.kind == "perturbed"} == {0, 1}
    assert len(record.prompts) == 2 and record.prompts_total == 8 and len(record.reward.rewards) == 24
    monkeypatch.setattr(recording, "MAX_TOKENS", 1)
    assert prompts_that_fit(samples) == 1


def test_a_run_without_a_reward_records_its_curves(samples, tmp_path: Path) -> None:
    path = tmp_path / "eval" / "traces-dev.jsonl.gz"
    record_evaluation(path, "dev", {"start": samples, "grpo": samples}, "<|end|>")
    record, traces = read_record(path)
    assert record.reward is None and traces == [] and record.prompts == []
    assert record.pass_at_k["grpo"][1].value == pytest.approx(samples.correct.mean())


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 4, 5]), (16, [1, 2, 3, 4, 6, 8, 12, 16])])
def test_the_ks_of_a_curve(n, ks) -> None:
    assert curve_ks(n) == ks
