"""`airl-fast eval`, and what an evaluation makes of traces whose errors are known."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from airl_fast.artifacts import REWARD, load_reward
from airl_fast.cli import main
from airl_fast.evaluate.command import open_run
from airl_fast.evaluate.policies import Samples
from airl_fast.evaluate.reward import evaluate_reward
from airl_fast.judge.judge import judge_of
from airl_fast.lab import Lab, held_out
from airl_fast.types import Example, Kind, Trace
from tests.airl_fast.run_cases import metrics, small_run


def evaluated(capsys: pytest.CaptureFixture, split: str, *words: str) -> tuple[str, dict]:
    capsys.readouterr()
    assert main(["eval", str(small_run()), "--split", split, *words]) == 0
    return capsys.readouterr().out, json.loads((small_run() / "eval" / f"{split}.json").read_text())


def test_eval_repeats_the_figures_of_the_run(capsys: pytest.CaptureFixture) -> None:
    _, again = evaluated(capsys, "test", "--k", "1")
    first = json.loads((small_run() / "summary.json").read_text())
    for key in ("pass_at_1", "pass_at_5", "rerank_pass_at_1", "localise_hit_at_1", "auroc_within_prompt", "counts"):
        assert again[key] == first[key], key


def test_eval_of_another_split_at_several_k(capsys: pytest.CaptureFixture) -> None:
    said, document = evaluated(capsys, "dev", "--k", "3,1")
    assert document["counts"]["dev_prompts"] == 8
    rows = {row[0]: row[1:] for row in re.findall(r"^  (\w+) +1: ([\d.]+) \[.*?3: ([\d.]+) \[", said, re.MULTILINE)}
    assert set(rows) == {"start", "airl", "sft", "grpo"}
    for name, (one, three) in rows.items():
        assert float(one) == pytest.approx(100 * document["pass_at_1"][name], abs=0.051)
        assert float(three) >= float(one)
    assert document["rerank_n"] == 5
    assert len(metrics(small_run())) == 4  # the run itself is left alone


def test_eval_with_other_numbers_of_prompts_and_samples(capsys: pytest.CaptureFixture) -> None:
    said, document = evaluated(capsys, "train", "--k", "1,2", "--prompts", "3", "--samples", "2")
    assert document["counts"]["train_prompts"] == 3 and document["rerank_n"] == 2
    assert document["pass_at_5"]["start"] is None and "–" in said


def test_eval_stays_within_the_prompts_there_are(capsys: pytest.CaptureFixture) -> None:
    _, document = evaluated(capsys, "dev", "--k", "1", "--prompts", "500", "--samples", "1")
    assert document["counts"]["dev_prompts"] == 16


# ---------------------------------------------------------------------------------------------- known errors


@pytest.fixture(scope="module")
def lab() -> Lab:
    return open_run(small_run())


def report(lab: Lab, samples: Samples):
    model, bridge = load_reward(small_run() / REWARD, lab.config, lab.maker, lab.start, lab.policy.lm.device)
    return evaluate_reward(judge_of(lab, model, bridge), samples, lab.material.train)


def written(lab: Lab, example: Example, group: int, text: str, finished: bool = True) -> Trace:
    tokens = tuple(lab.maker.chat.completion_tokens(text, finished))
    correct = finished and lab.material.task.verify(example, text)
    return Trace(
        group=group, kind=Kind.POLICY, prompt_tokens=lab.maker.prompt_tokens(example), tokens=tokens, text=text,
        finished=finished, logprobs=(0.0,) * len(tokens), correct=correct,
    )  # fmt: skip


def known_samples(lab: Lab) -> tuple[Samples, list[int | None]]:
    """Per prompt one right trace and two broken ones, and where each goes wrong."""
    examples, traces, truth = held_out(lab, "test"), [], []
    for group, example in enumerate(examples):
        for text in (example.expert, *(broken(lab, example, seed) for seed in (1, 2))):
            traces.append(written(lab, example, group, text))
            truth.append(lab.material.task.first_wrong_step(example, text))
    return Samples(examples=tuple(examples), traces=tuple(traces), per_prompt=3), truth


def broken(lab: Lab, example: Example, seed: int) -> str:
    return lab.material.task.perturb(example, example.expert, random.Random(seed)).text


def test_localisation_counts_the_traces_with_an_error_and_chance_follows_their_steps(lab: Lab) -> None:
    samples, truth = known_samples(lab)
    found = report(lab, samples)
    wrong = [trace for trace, step in zip(samples.traces, truth, strict=True) if step is not None]
    assert found.located == len(wrong) == 2 * len(samples.examples)
    steps = [len(lab.material.task.step_ends(trace.text)) for trace in wrong]
    assert found.localise["chance"].hit_at_1.value == pytest.approx(np.mean([1 / count for count in steps]))
    for name in ("reward", "logprob"):
        assert 0 <= found.localise[name].hit_at_1.value <= 1
    assert found.rerank["random"].value == pytest.approx(samples.correct.mean())
    assert found.rerank["oracle"].value == 1


def test_a_right_policy_leaves_nothing_to_localise(lab: Lab) -> None:
    examples = held_out(lab, "test")
    traces = [written(lab, e, g, e.expert) for g, e in enumerate(examples) for _ in range(2)]
    found = report(lab, Samples(examples=tuple(examples), traces=tuple(traces), per_prompt=2))
    assert (found.localise, found.located, found.auroc_within_prompt) == ({}, 0, None)
    assert found.rerank["reward"].value == found.rerank["majority"].value == 1


def test_a_trace_without_an_answer_is_picked_last_and_ranked_below_the_rest(lab: Lab) -> None:
    config = lab.config.model_copy(update={"evaluate": lab.config.evaluate.model_copy(update={"scorer": "answer"})})
    examples = held_out(lab, "test")
    traces = []
    for group, example in enumerate(examples):
        traces.append(written(lab, example, group, example.expert))
        traces.append(written(lab, example, group, example.expert.split("<answer>")[0], finished=False))
    samples = Samples(examples=tuple(examples), traces=tuple(traces), per_prompt=2)
    found = report(replace(lab, config=config), samples)
    assert found.rerank["reward"].value == 1  # whatever the reward says of the answers
    assert found.auroc_within_prompt.value == 1


def test_steps_are_the_tasks_own_whatever_the_reward_was_trained_on(lab: Lab) -> None:
    samples, _ = known_samples(lab)
    plain = report(lab, samples)
    every_two = lab.config.reward.model_copy(update={"granularity": "interval", "interval": 2})
    cut = replace(
        lab, config=lab.config.model_copy(update={"reward": every_two}), maker=replace(lab.maker, reward=every_two)
    )
    assert report(cut, samples).localise["chance"] == plain.localise["chance"]


def test_no_perturbations_in_training_still_calibrates(lab: Lab) -> None:
    samples, _ = known_samples(lab)
    none = lab.config.discriminator.model_copy(update={"perturbed_per_expert": 0})
    found = report(replace(lab, config=lab.config.model_copy(update={"discriminator": none})), samples)
    assert found.localise.keys() == report(lab, samples).localise.keys()


def test_the_untrained_run_cannot_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text((small_run() / "config.yaml").read_text())
    assert main(["eval", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"airl-fast: {tmp_path} has no start policy; continue the run with --resume auto.\n"
    )
