"""`airl-fast transfer`: a frozen reward on other tasks, policies and tokenizers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from airl_fast.cli import main
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.evaluate.policies import Samples
from airl_fast.evaluate.sources import find_policy, find_task, with_policy, with_task
from airl_fast.evaluate.transfer import measure
from airl_fast.evaluate.transfer_view import figure
from airl_fast.judge.judge import Judge, open_judge
from airl_fast.models.heads import make_head
from airl_fast.types import Kind, Trace
from tests.airl_fast.run_cases import DATA, small_run

FEW = ("--prompts", "4", "--n", "3")


def transferred(capsys: pytest.CaptureFixture, *words: object) -> tuple[str, list[dict]]:
    """What the command printed, and the cells of the JSON that it names."""
    capsys.readouterr()
    assert main(["transfer", str(small_run()), *map(str, words)]) == 0
    said = capsys.readouterr().out
    file = next(line.strip() for line in said.splitlines() if line.endswith(".json"))
    return said, json.loads(Path(file).read_text())["cells"]


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    capsys.readouterr()
    assert main(["transfer", str(small_run()), *map(str, words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.splitlines()[-1]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return open_judge(small_run())


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of its own, learned from another text and smaller."""
    folder = tmp_path_factory.mktemp("models") / "stranger"
    words = ["data.task=countdown", "data.options={}", "model.build.vocab_size=310", "device=cpu"]
    assert main(["make-model", "tiny", *words, "-o", str(folder)]) == 0
    return folder


def test_on_its_own_task_and_policy_it_repeats_the_run(capsys: pytest.CaptureFixture) -> None:
    said, (cell,) = transferred(capsys)
    summary = json.loads((small_run() / "summary.json").read_text())
    assert cell["pass_at_1"]["value"] == pytest.approx(summary["pass_at_1"]["start"])
    for name, value in summary["rerank_pass_at_1"].items():
        assert cell["rerank_pass_at_1"][name]["value"] == pytest.approx(value), name
    for name, value in summary["localise_hit_at_1"].items():
        assert cell["localise"][name]["hit_at_1"]["value"] == pytest.approx(value), name
    picks = cell["rerank_pass_at_1"]
    assert cell["gain_over_random"]["value"] == pytest.approx(picks["reward"]["value"] - picks["random"]["value"])
    assert cell["wrong_steps_are"] == "the policy's own errors" and cell["prompts_left_out"] == 0
    assert "start's samples of arithmetic, picked by" in said and max(map(len, said.splitlines())) <= 120


def test_a_matrix_of_policies_and_tasks(capsys: pytest.CaptureFixture, tmp_path: Path, stranger: Path) -> None:
    words = ["--task", "arithmetic", "--task", "countdown:min_numbers=3,max_numbers=3", *FEW]
    picture = tmp_path / "matrix.png"
    said, cells = transferred(capsys, *words, "--policy", "start", "--policy", stranger, "--png", picture)
    assert [(cell["policy"], cell["task"]) for cell in cells] == [
        (policy, task)
        for policy in ("start", "/".join(stranger.parts[-2:]))
        for task in ("arithmetic", "countdown min_numbers=3 max_numbers=3")
    ]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert said.count("rerank gain ") == 1 and "AUROC within prompts " in said
    _, (single,) = transferred(capsys, "--task", "countdown", "min_numbers=3", "max_numbers=3", *FEW)
    assert single == cells[1]  # nothing of one cell reaches another
    for cell in cells:
        assert (cell["prompts"], cell["samples"]) == (4, 3)
        assert 0 <= cell["localise"]["reward"]["hit_at_1"]["value"] <= 1 and cell["traces_with_a_wrong_step"] > 0
    assert cells[1]["wrong_steps_are"] == "perturbed demonstrations"


def test_another_runs_final_policy_is_that_runs(judge: Judge) -> None:
    found = find_policy(str(small_run()), small_run(), judge.config)
    assert found.directory == small_run() / "final/policy"
    theirs, ours = (
        list(with_policy(judge, find_policy(name, small_run(), judge.config)).policy.model.parameters())
        for name in (str(small_run()), "airl")
    )
    assert all(a.equal(b) for a, b in zip(theirs, ours, strict=True))
    assert any(not a.equal(b) for a, b in zip(ours, judge.policy.model.parameters(), strict=True))


def test_another_tokenizer_reads_the_same_text(judge: Judge, stranger: Path) -> None:
    """The reward of a text does not depend on whose tokens it is given in, but for how they share its characters."""
    other = with_policy(judge, find_policy(str(stranger), small_run(), judge.config))
    (example,) = judge.task.load("test", 1)
    one, two = (each.score([each.trace(example, 0, example.expert)], [example]) for each in (judge, other))
    assert two.traces[0].tokens != one.traces[0].tokens and two.traces[0].text == one.traces[0].text
    assert two.reward.values.mean() == pytest.approx(one.reward.values.mean(), abs=0.5)
    assert two.logprob.values.mean() != pytest.approx(one.logprob.values.mean(), abs=0.1)


def test_a_log_probability_reward_wants_its_own_tokenizer(judge: Judge, stranger: Path) -> None:
    backbone = judge.model.backbone
    settings = judge.config.discriminator.model_copy(update={"head": "logprob"})
    model = Discriminator(backbone, make_head("logprob", backbone, 0), settings, judge.config.reward, judge.policy)
    reads_logprobs = replace(judge, model=model)
    with pytest.raises(UserError, match="its tokenizer is not that of the reward's start policy"):
        with_policy(reads_logprobs, find_policy(str(stranger), small_run(), judge.config))
    assert with_policy(reads_logprobs, find_policy("airl", small_run(), judge.config)).model is model


def test_labels_come_after_the_scores(judge: Judge) -> None:
    examples = judge.task.load("test", 4)
    traces = []
    for group, example in enumerate(examples):
        wrong = example.expert.replace(f"<answer>{example.answer}</answer>", "<answer>77</answer>")
        traces += [
            replace(judge.trace(example, group, text), correct=text != wrong) for text in (example.expert, wrong)
        ]
    flipped = [replace(trace, correct=not trace.correct) for trace in traces]
    one, other = (
        measure(judge, "p", "t", Samples(examples=tuple(examples), traces=tuple(some), per_prompt=2), {})
        for some in (traces, flipped)
    )
    assert one.auroc_within.estimate.value == pytest.approx(1 - other.auroc_within.estimate.value)
    assert one.gain.value == pytest.approx(-other.gain.value)
    assert one.localise["chance"] == other.localise["chance"]  # known errors are the task's, not the labels'


def test_a_task_without_demonstrations_says_so(judge: Judge) -> None:
    there = with_task(judge, find_task("countdown", judge.config).task)
    bare = [replace(example, expert=None) for example in there.task.load("test", 2)]
    tokens = tuple(there.maker.chat.completion_tokens("<answer>1</answer>", True))
    traces = [
        Trace(group=g, kind=Kind.POLICY, prompt_tokens=there.maker.prompt_tokens(e), tokens=tokens,
              text="<answer>1</answer>", correct=False)
        for g, e in enumerate(bare)
    ]  # fmt: skip
    cell = measure(there, "p", "t", Samples(examples=tuple(bare), traces=tuple(traces), per_prompt=1), {})
    assert (cell.localise, cell.located, cell.errors) == ({}, 0, None)
    assert cell.auroc_within.estimate is None and cell.pass_at_1.value == 0
    drawn = figure([cell])
    assert [text.get_text() for axis in drawn.axes for text in axis.texts] == ["–", "+0.0"]


def test_the_words_of_a_task(judge: Judge) -> None:
    own = find_task(None, judge.config)
    assert own.task == judge.task == find_task("arithmetic", judge.config).task and own.label == "arithmetic"
    other = find_task("arithmetic:max_ops=3,min_ops=3", judge.config)
    assert (other.task.max_ops, other.task.test_size, other.label) == (3, 16, "arithmetic max_ops=3 min_ops=3")
    files = find_task("gsm8k:path=/data/a,b,dev_fraction=0.1", judge.config)
    assert (files.task.path, files.task.dev_fraction, files.label) == ("/data/a,b", 0.1, "gsm8k dev_fraction=0.1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "countdown", "--task", "countdown"], "--task countdown is given twice; name each once."),
        (
            ["--task", "countdown", "--task", "arithmetic", "path=x"],
            "path=x: with several --task write --task NAME",
        ),
        (["--task", "gsm8k:DIR"], "--task gsm8k:DIR: 'DIR' is no key=value; write --task NAME:path=DIR,option=value."),
        (["--task", "countdwn"], "unknown task 'countdwn': did you mean 'countdown'?"),
        (["--task", "gsm8k:path=nowhere"], "data.path: nowhere does not exist"),
        (["--split", "train", *FEW], "arithmetic, train prompt"),
        (["--policy", "nowhere"], "--policy nowhere: neither one of start, airl, sft, grpo"),
        (["--max-new-tokens", "255", *FEW], "and none of the 4 prompts fits; ask for more prompts"),
        (["--n", "0"], "--n 0: give a whole number from 1."),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture, words: list[str], expected: str) -> None:
    assert expected in refused(capsys, *words)


def test_a_run_without_a_reward_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["transfer", str(small_run() / "baselines/sft")]) == 2
    assert "has no final/discriminator; give a finished run" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the published files are not in {DATA}")
def test_prompts_that_do_not_fit_are_counted(capsys: pytest.CaptureFixture) -> None:
    words = ["--task", "gsm8k", f"path={DATA / 'gsm8k'}", "--prompts", "12", "--n", "2", "--max-new-tokens", "40"]
    error = refused(capsys, *words)
    assert "the policy's context is 256 tokens" in error and "leave such prompts out with --too-long drop." in error
    _, (cell,) = transferred(capsys, *words, "--too-long", "drop")
    assert cell["prompts"] + cell["prompts_left_out"] == 12 and 0 < cell["prompts"] < 12
