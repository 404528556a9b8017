"""A run that is stopped, however it is stopped, continues to the very weights of a run that was not."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from airl_fast.artifacts import POLICY, REWARD, START
from airl_fast.baselines import end_with_parent
from airl_fast.checkpoint import load_tree
from airl_fast.cli import main
from tests.airl_fast.run_cases import EASY, SMALL, metrics, small_run, train, weights

STEPS = 6
# What depends on the clock; every other number of a step must be the same.
CLOCK = ("seconds/", "tokens_per_s", "eta_s", "peak_rss_gib")


def words(root: Path, *more: str) -> tuple[str, ...]:
    """A run with a replay buffer that turns over, spectral norm's running vectors, and checkpoints every two steps."""
    return (
        *EASY, f"model={{path: {small_run() / START}, build: null}}", "warm_start.updates=0", f"steps={STEPS}",
        "checkpoint_every=2", "evaluate.final=false", "evaluate.baselines=[]", "tensorboard=false",
        "discriminator.replay_size=6", "discriminator.lipschitz=spectral_norm", "policy.epochs=2",
        "policy.kl_coef=0.05", f"output_dir={root}", *more, "--run-name", "run",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    root = tmp_path_factory.mktemp("whole")
    train(*words(root))
    return root / "run"


@contextlib.contextmanager
def running(root: Path, *more: str) -> Iterator[subprocess.Popen]:
    """The same training in a process of its own, which never outlives the block."""
    command = [sys.executable, "-m", "airl_fast", "train", "tiny", *words(root, *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(condition, process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.stderr.read()}"
        assert time.monotonic() < deadline, f"no {what} within two minutes"
        time.sleep(0.005)


def lines_in(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def timeless(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in metrics(run)]


def assert_same_end(run: Path, whole: Path) -> None:
    for part in (POLICY, REWARD):
        mine, theirs = weights(run / part), weights(whole / part)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), f"{part} {key}"
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert timeless(run) == timeless(whole)
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step:06d}.jsonl.gz"
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    last = f"checkpoints/step_{STEPS}"
    assert load_tree(run / last / "replay") == load_tree(whole / last / "replay")
    assert len(load_tree(run / last / "replay")) == 6


def test_a_killed_run_continues_to_the_same_weights(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(tmp_path) as process:
        wait_until(lambda: lines_in(run / "metrics.jsonl") >= 3, process, "the third step")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (run / POLICY).exists()
    train(*words(tmp_path), "--resume", "auto")
    assert_same_end(run, whole)
    starts = json.loads((run / "env.json").read_text())["starts"]
    assert [start["start_step"] for start in starts] in ([0, 2], [0, 4])  # from the last checkpoint before the kill


def test_a_terminated_run_saves_and_continues_to_the_same_weights(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(tmp_path) as process:
        wait_until(lambda: lines_in(run / "metrics.jsonl") >= 1, process, "the first step")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130
    done = metrics(run)[-1]["step"]
    assert done < STEPS and "Traceback" not in said
    assert said.rstrip().endswith(f"stopped by SIGTERM: saved after step {done}; continue with --resume auto.")
    assert (run / "checkpoints" / f"step_{done}").is_dir()  # whatever checkpoint_every says
    train(*words(tmp_path, "checkpoint_every=3"), "--resume", "auto")  # a key that a run may change on the way
    assert json.loads((run / "env.json").read_text())["starts"][1]["start_step"] == done
    assert_same_end(run, whole)


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / f"step_{STEPS}" / "policy.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    train(*words(tmp_path), "--resume", "auto")
    assert f"step_{STEPS} is damaged (policy.safetensors has changed since it was written)" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", whole)


def test_a_checkpoint_of_another_run_starts_a_new_one(whole: Path, tmp_path: Path) -> None:
    train(*words(tmp_path), "--resume", whole / "checkpoints" / "step_4")
    run = tmp_path / "run"
    assert [line["step"] for line in metrics(run)] == [5, 6]
    for key, tensor in weights(run / POLICY).items():
        assert torch.equal(tensor, weights(whole / POLICY)[key])


def test_an_overlapping_discriminator_continues_to_the_same_weights(tmp_path: Path) -> None:
    """A checkpoint waits for the update beside the next rollout, which the resumed run does not make again."""
    for root, more in (("whole", ()), ("rest", ("--resume", tmp_path / "whole" / "run" / "checkpoints" / "step_4"))):
        train(*words(tmp_path / root, "discriminator.overlap=true"), *more)
    for part in (POLICY, REWARD):
        mine, theirs = weights(tmp_path / "rest" / "run" / part), weights(tmp_path / "whole" / "run" / part)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


def test_a_run_does_not_continue_with_another_method(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(*words(tmp_path, "policy.kl_coef=0.1"), "--resume", "auto", code=2)
    said = capsys.readouterr().err
    assert "policy.kl_coef=0.05" in said and "policy.kl_coef=0.1" in said and "--run-name" in said
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_finished_run_is_evaluated_again_and_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "small"
    shutil.copytree(small_run(), run)
    before = {file: (run / file).read_bytes() for file in ("metrics.jsonl", f"{POLICY}/model.safetensors")}
    figures = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    logs = sorted(path.name for path in (run / "baselines").glob("*.log"))
    train(*SMALL, f"output_dir={tmp_path}", "--run-name", "small", "--resume", "auto")
    assert {file: (run / file).read_bytes() for file in before} == before
    again = json.loads((run / "summary.json").read_text())
    measured = ("pass_at_1", "pass_at_5", "rerank_pass_at_1", "localise_hit_at_1", "auroc_within_prompt", "intervals")
    assert {key: again[key] for key in measured} == {key: figures[key] for key in measured}
    assert sorted(path.name for path in (run / "baselines").glob("*.log")) == logs
    assert "warm start" not in capsys.readouterr().err


def test_a_stopped_warm_start_begins_again(tmp_path: Path) -> None:
    """Before the first checkpoint there is nothing to continue: --resume auto starts afresh in the same directory."""
    run = tmp_path / "run"
    with running(tmp_path, "warm_start={updates: 100000, batch_size: 2, examples: 50}") as process:
        while not (line := process.stderr.readline()).startswith("device"):  # said just before the warm start
            assert line, "ended before the warm start"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130 and "the warm start begins again with --resume auto" in said
    assert not (run / START).exists() and not (run / "metrics.jsonl").exists()
    short = "warm_start={updates: 2, batch_size: 2, examples: 50}"
    train(*words(tmp_path, short, "steps=1"), "--resume", "auto")
    assert [line["step"] for line in metrics(run)] == [1]


def stopped_at(tmp_path: Path, message: str, *more: str) -> str:
    """What a run says after SIGTERM arrives just as it says `message`."""
    with running(tmp_path, "steps=1", *more) as process:
        while not (line := process.stderr.readline()).startswith(message):
            assert line, f"ended before it said {message!r}"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130 and "Traceback" not in said
    assert (tmp_path / "run" / POLICY).is_dir()  # training was complete
    return said


def test_a_run_stops_while_it_waits_for_baselines(tmp_path: Path) -> None:
    said = stopped_at(tmp_path, "wait for the baselines sft", "evaluate.baselines=[sft]")
    assert "stopped by SIGTERM: training is complete; continue with --resume auto." in said
    assert not (tmp_path / "run" / "baselines" / "sft" / POLICY).exists()  # and the baseline with it


def test_a_run_stops_while_it_evaluates_and_evaluates_when_continued(tmp_path: Path) -> None:
    final = "evaluate.final=true"
    said = stopped_at(tmp_path, "evaluate the start policy", final)
    assert "stopped by SIGTERM: training is complete; evaluate with --resume auto." in said
    assert not (tmp_path / "run" / "summary.json").exists()
    train(*words(tmp_path, "steps=1", final), "--resume", "auto")
    assert (tmp_path / "run" / "summary.json").is_file() and len(metrics(tmp_path / "run")) == 1


def test_a_baseline_ends_with_the_run_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a killed run could not be continued: its baseline's directory would be in use."""
    if sys.platform != "linux":
        pytest.skip("asks the Linux kernel")
    reader, writer = os.pipe()
    run = os.fork()
    if run == 0:  # the run: starts a baseline and waits to be killed
        monkeypatch.setenv("AIRL_FAST_PARENT", str(os.getpid()))
        if os.fork() == 0:  # the baseline: says it is ready and would train for a minute
            end_with_parent()
            os.write(writer, b"ready")
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 5) == b"ready"
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    began = time.monotonic()
    assert os.read(reader, 1) == b""  # the pipe closes when its last holder, the baseline, has ended
    assert time.monotonic() - began < 30
    os.close(reader)


def test_ending_with_a_parent_is_for_baselines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRL_FAST_PARENT", raising=False)
    end_with_parent()
    monkeypatch.setenv("AIRL_FAST_PARENT", "nobody")
    end_with_parent()


def test_a_killed_run_with_baselines_continues(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(tmp_path, "evaluate.baselines=[grpo]") as process:
        wait_until(lambda: lines_in(run / "metrics.jsonl") >= 1, process, "the first step")
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(*words(tmp_path, "evaluate.baselines=[grpo]"), "--resume", "auto")
    assert (run / "baselines" / "grpo" / POLICY).is_dir() and len(metrics(run)) == STEPS
    assert main(["eval", str(run), "--samples", "2", "--prompts", "2", "--k", "1,2"]) == 0
