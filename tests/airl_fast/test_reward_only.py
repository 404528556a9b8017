"""`algorithm: reward` learns from demonstrations and their perturbed copies alone: no policy is sampled or trained."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from airl_fast.artifacts import POLICY, REWARD, START
from airl_fast.checkpoint import load_tree
from airl_fast.cli import main
from airl_fast.evaluate.command import open_run
from airl_fast.evaluate.summary import read_summary
from airl_fast.judge.judge import open_judge
from airl_fast.judge.locate import changed_steps
from airl_fast.measures.localise import chance_hits, step_scores, summarise_hits, suspicion, trace_hits
from tests.airl_fast.run_cases import EASY, metrics, small_run, train, weights

CLOCK = ("seconds/", "tokens_per_s", "eta_s", "peak_rss_gib")
STEPS = 60


def words(root: Path, *more: object) -> tuple[str, ...]:
    """From the small run's start policy; without a warm-up, which would want samples."""
    return (
        *EASY, f"model={{path: {small_run() / START}, build: null}}", "warm_start.updates=0", "algorithm=reward",
        "discriminator.warmup_steps=0", "evaluate.baselines=[]", "tensorboard=false", f"output_dir={root}",
        *map(str, more), "--run-name", "run",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run long enough to learn what a wrong line of one or two operations looks like."""
    root = tmp_path_factory.mktemp("reward")
    train(*words(
        root, f"steps={STEPS}", "rollout.prompts_per_step=16", "discriminator.perturbed_per_expert=3",
        "discriminator.optim.learning_rate=1e-3", "evaluate.prompts=16", "evaluate.every=20", "checkpoint_every=20",
        "data.num_dev=16", "tensorboard=true",
    ))  # fmt: skip
    return root / "run"


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def timeless(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in metrics(run)]


# ---------------------------------------------------------------------------------------------- the run


def test_the_directory_is_a_runs_without_what_a_policy_leaves(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "env.json", "metrics.jsonl", "summary.json", "plots.png", "summary.png", "start", "final",
        "checkpoints", "logs",
    }  # fmt: skip
    assert (run / REWARD).is_dir() and not (run / POLICY).exists()
    assert list((run / "rollouts").glob("*")) == []
    for checkpoint in (run / "checkpoints").iterdir():
        parts = {file.name.split(".")[0] for file in checkpoint.iterdir()}
        assert "discriminator" in parts and not any(part.startswith("policy") for part in parts)


def test_the_start_policy_stays_and_the_discriminator_moves_away_from_it(run: Path) -> None:
    start = weights(run / START)
    assert same(start, weights(small_run() / START))
    trained = {k: v for k, v in weights(run / REWARD).items() if k.startswith("model.safetensors/")}
    pairs = [(start[k.replace("model.safetensors/", "model.safetensors/model.")], v) for k, v in trained.items()]
    assert all(old.shape == new.shape for old, new in pairs)
    assert sum(torch.equal(old, new) for old, new in pairs) == 0


def test_a_discriminator_that_hardly_steps_is_the_start_policys_backbone(tmp_path: Path) -> None:
    train(*words(tmp_path, "steps=1", "discriminator.optim.learning_rate=0", "evaluate.final=false"))
    start, trained = weights(tmp_path / "run" / START), weights(tmp_path / "run" / REWARD)
    for key, tensor in trained.items():
        if key.startswith("model.safetensors/"):
            assert torch.equal(start[key.replace("model.safetensors/", "model.safetensors/model.")], tensor)


def test_steps_are_measured_and_nothing_is_sampled(run: Path) -> None:
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        phases = {key.removeprefix("seconds/") for key in line if key.startswith("seconds/")} - {"step", "dev"}
        assert phases == {"perturb", "pack", "discriminator"}
        assert not any(key.startswith(("policy/", "rollout/", "sync/")) for key in line)
        assert line["discriminator/grad_norm"] > 0 and math.isfinite(line["discriminator/loss"])
        assert line["discriminator/reward_gap"] is None  # there are no samples to compare with
        assert ("dev/hit_at_1" in line) == (line["step"] % 20 == 0)
    first, last = lines[0], lines[-1]
    assert last["discriminator/loss"] < first["discriminator/loss"] - 0.02
    assert last["discriminator/accuracy"] > 0.52


def test_development_demonstrations_are_watched_with_chance_beside_them(run: Path) -> None:
    lab = open_run(run)
    broken = open_judge(run).perturbed(lab.material.dev)
    steps = [len(lab.maker.step_tokens(trace)) for trace in broken.traces]
    looks = [line for line in metrics(run) if "dev/chance" in line]
    assert len(looks) == 3
    for line in looks:
        assert line["dev/chance"] == pytest.approx(sum(1 / n for n in steps) / len(steps))
    # The last look is at the reward that was saved: its lowest step, over traces made anew.
    hits = []
    start = 0
    for trace, count in zip(broken.traces, steps, strict=True):
        ends = [end + 1 for end in lab.maker.step_tokens(trace)]
        values = broken.reward.values[start : start + len(trace.tokens)]
        scores = [values[a:b].min() for a, b in zip([0, *ends], ends, strict=False)]
        changed = lab.maker.token_at(trace, trace.first_changed + 1)
        truth = next(i for i, end in enumerate(ends) if changed < end)
        hits.append(scores.index(min(scores)) == truth)
        start += len(trace.tokens)
        assert len(scores) == count
    assert looks[-1]["dev/hit_at_1"] == pytest.approx(sum(hits) / len(hits))


def test_it_learns_where_an_error_is(run: Path) -> None:
    """On prompts it has not seen, from labels of whole traces alone: nothing told it which line was changed."""
    judge = open_judge(run)
    broken = judge.perturbed([*judge.task.load("test"), *judge.task.load("dev")])
    truth = changed_steps(judge.maker, broken)
    steps = step_scores(broken.reward, "min")
    found = summarise_hits(trace_hits(steps, suspicion(steps, "argmin"), truth)).hit_at_1
    chance = summarise_hits(chance_hits(steps, truth)).hit_at_1
    assert len(truth) > 60 and found.low > chance.high, (found, chance)


def test_the_summary_holds_the_start_policy_alone(run: Path) -> None:
    summary = read_summary(run / "summary.json")
    assert summary.pass_at_1["start"] is not None
    assert all(summary.pass_at_1[name] is None for name in ("sft", "grpo", "airl"))
    assert summary.control_random_reward is None
    assert summary.rerank_pass_at_1["random"].value == pytest.approx(summary.pass_at_1["start"].value)
    assert set(json.loads((run / "summary.json").read_text())["localise_hit_at_1"]) == {"reward", "chance", "logprob"}


# ---------------------------------------------------------------------------------------------- other commands


def test_eval_and_export_read_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert main(["eval", str(copy), "--split", "dev", "--prompts", "4", "--samples", "2", "--k", "1,2"]) == 0
    said = capsys.readouterr().out
    assert "start policy" in said and "pass@k on dev" in said
    assert read_summary(copy / "eval" / "dev.json").counts["dev_prompts"] == 4
    assert main(["export", str(copy), "--what", "discriminator", "-o", str(tmp_path / "reward")]) == 0
    assert same(weights(tmp_path / "reward"), weights(run / REWARD))
    assert main(["export", str(copy), "--what", "policy", "-o", str(tmp_path / "policy")]) == 2
    assert "has no final/policy" in capsys.readouterr().err


def test_dry_run_says_that_no_policy_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(*words(tmp_path)[:-2], "--dry-run")
    said = capsys.readouterr().out
    assert "algorithm       reward, " in said
    assert "  trained       not at all: it is the baseline of the reward" in said
    assert said.count("all of it, AdamW") == 1  # the discriminator
    assert list(tmp_path.iterdir()) == []


def test_no_policy_is_made_and_no_optimiser_for_one(run: Path) -> None:
    lab = open_run(run)
    assert lab.policy is None
    assert not any(p.requires_grad for p in lab.start.model.parameters())
    owned = {id(p) for p in lab.reward.optimiser.parameters}
    assert owned == {id(p) for p in lab.reward.model.parameters()}


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("settings", [(), ("discriminator.loss=pairwise", "discriminator.head=linear")])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(settings: tuple[str, ...], tmp_path: Path) -> None:
    more = ("steps=4", "checkpoint_every=2", "evaluate.final=false", *settings)
    train(*words(tmp_path / "whole", *more))
    whole, part = tmp_path / "whole" / "run", tmp_path / "part" / "run"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(part / "checkpoints" / "step_4")
    train(*words(tmp_path / "part", *more), "--resume", "auto")
    assert same(weights(part / REWARD), weights(whole / REWARD))
    assert timeless(part) == timeless(whole)
    final = load_tree(part / "checkpoints" / "step_4" / "discriminator_optimiser")
    assert final["scheduler"]["last_epoch"] == 4


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "discriminator.perturbed_per_expert=0",
            "discriminator.perturbed_per_expert=0 makes none; set it to 1 or more",
        ),
        ("discriminator.updates_per_step=0", "trains nothing with discriminator.updates_per_step=0"),
        ("evaluate.baselines=[random]", "trains no policy, so evaluate.baselines=[random] compares nothing; set it to"),
        ("evaluate.baselines=[sft,grpo]", "evaluate.baselines=[sft,grpo] compares nothing"),
        ("discriminator.perturbed_per_prompt=2", "discriminator.perturbed_per_prompt=2 is about its samples"),
        ("discriminator.replay_size=9", "discriminator.replay_size=9 is about its samples"),
        ("discriminator.warmup_steps=3", "discriminator.warmup_steps=3 is about its samples"),
        ("discriminator.positives=expert_and_correct", "positives=expert_and_correct is about its samples"),
        ("discriminator.overlap=true", "discriminator.overlap=True is about its samples"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    word: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(*words(tmp_path, word), code=2)
    said = capsys.readouterr().err
    assert said.startswith("airl-fast: ") and said.count("\n") == 1 and "algorithm=reward" in said
    assert expected in said
    assert list(tmp_path.iterdir()) == []


def test_demonstrations_that_cannot_be_perturbed_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "words.jsonl"
    expert = "<think>\nI say it.\n</think>\n<answer>yes</answer>"
    rows = [{"prompt": f"say yes {'again ' * i}", "expert": expert, "answer": "yes"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "words.yaml"
    config.write_text(
        f"algorithm: reward\ndevice: cpu\nthreads: 1\ndata: {{task: jsonl, path: {file}}}\n"
        f"model: {{path: {small_run() / START}}}\noutput_dir: {tmp_path / 'runs'}\nrollout: {{max_new_tokens: 40}}\n"
    )
    train(config=config, code=2)
    said = capsys.readouterr().err
    assert "algorithm=reward: none of the" in said and "to perturb, so there is nothing to learn from" in said
    assert not (tmp_path / "runs").exists()
