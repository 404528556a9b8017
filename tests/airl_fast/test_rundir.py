"""Run directories: what they refuse, and what continuing keeps and drops."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from airl_fast import checkpoint
from airl_fast.errors import UserError
from airl_fast.processor import model_name
from airl_fast.rundir import RunDir, git_commit, read_rollouts, truncate_metrics, version, write_atomically

CONFIG = {"seed": 0, "steps": 10, "policy": {"lr": 1e-5, "betas": (0.9, 0.99)}, "note": None}


def start(root: Path, name: str = "demo", resume: str = "never", **changes: object) -> RunDir:
    return RunDir.create(root, name, config={**CONFIG, **changes}, resume=resume, say=lambda text: None)


def run_three_steps(root: Path, name: str = "demo") -> Path:
    """A run that wrote metrics and rollouts for steps 1..3 and checkpoints after 1 and 2, then died."""
    run = start(root, name)
    for step in (1, 2, 3):
        with run.metrics.open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        run.write_rollouts(step, [{"text": f"é{step}"}])
        if step < 3:
            checkpoint.save(run.checkpoints, step, {"state": {"step": step}})
    run.close()
    return run.path


def refusal(root: Path, *args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        start(root, *args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_has_the_documented_contents(tmp_path: Path) -> None:
    run = start(tmp_path / "runs")
    assert (run.resume_from, run.start_step) == (None, 0)
    assert {p.name for p in run.path.iterdir()} == {
        ".lock", "config.yaml", "env.json", "rollouts", "eval", "checkpoints", "logs",
    }  # fmt: skip
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert saved == {**CONFIG, "policy": {"lr": 1e-5, "betas": [0.9, 0.99]}}
    (entry,) = json.loads((run.path / "env.json").read_text())["starts"]
    assert entry["versions"]["torch"] == version("torch") is not None
    assert entry["argv"] == sys.argv and entry["device"] == "cpu" and entry["start_step"] == 0
    assert entry["torch_threads"] >= 1
    assert entry["processor"]["model"] == model_name()
    assert entry["processor"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert entry["processor"]["libraries"]


def test_an_existing_run_is_refused_and_kept(tmp_path: Path) -> None:
    path = run_three_steps(tmp_path)
    before = (path / "metrics.jsonl").read_text()
    text = refusal(tmp_path)
    assert "exists and is not empty" in text and "--run-name" in text and "--resume auto" in text
    assert (path / "metrics.jsonl").read_text() == before


def test_an_empty_directory_is_welcome(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert start(tmp_path).start_step == 0


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b"])
def test_run_names_are_plain(tmp_path: Path, name: str) -> None:
    assert "--run-name" in refusal(tmp_path, name)


def test_unwritable_directory(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "cannot be written: Not a directory" in refusal(blocker)
    assert "cannot be written" in refusal(Path("/proc"))


def test_a_second_process_cannot_enter(tmp_path: Path) -> None:
    run = start(tmp_path)
    code = (
        "import sys; from airl_fast.rundir import RunDir; from airl_fast.errors import UserError\n"
        "try: RunDir.create(sys.argv[1], 'demo', config={}, resume='auto')\n"
        "except UserError as e: print(e)"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert "is in use by another process" in out.stdout, out.stderr
    run.close()
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert out.stdout == "" and out.returncode == 0, out.stderr


def test_auto_starts_afresh_without_a_checkpoint(tmp_path: Path) -> None:
    assert start(tmp_path, resume="auto").resume_from is None
    run = start(tmp_path, "second")
    run.metrics.write_text('{"step": 1}\n')
    run.close()
    again = start(tmp_path, "second", resume="auto", seed=5)  # no weights yet: another config is fine
    assert (again.start_step, again.metrics.read_text()) == (0, "")


def test_auto_continues_and_rewinds(tmp_path: Path) -> None:
    path = run_three_steps(tmp_path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by the crash
    run = start(tmp_path, resume="auto")
    assert (run.resume_from, run.start_step) == (path / "checkpoints" / "step_2", 2)
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
    assert run.rollouts(2).exists() and not run.rollouts(3).exists()
    assert [e["start_step"] for e in json.loads((path / "env.json").read_text())["starts"]] == [0, 2]


def test_going_back_sets_the_later_checkpoint_aside(tmp_path: Path) -> None:
    path = run_three_steps(tmp_path)
    run = start(tmp_path, resume=str(path / "checkpoints" / "step_1"))
    assert run.start_step == 1
    assert checkpoint.steps(run.checkpoints) == [1]
    assert (run.checkpoints / "abandoned_step_2").is_dir()
    checkpoint.save(run.checkpoints, 2, {"state": {"step": 2}})
    assert not (run.checkpoints / "abandoned_step_2").exists()


def test_a_new_run_may_start_from_another_runs_checkpoint(tmp_path: Path) -> None:
    path = run_three_steps(tmp_path)
    run = start(tmp_path, "branch", resume=str(path))
    assert (run.resume_from, run.start_step) == (path / "checkpoints" / "step_2", 2)
    assert checkpoint.steps(path / "checkpoints") == [1, 2]
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, "this run has seed=0 and cannot continue with seed=1"),
        ({"policy": {"lr": 1e-4, "betas": (0.9, 0.99)}}, "policy.lr=1e-05 and cannot continue with policy.lr=0.0001"),
        ({"extra": 3}, "extra=unset and cannot continue with extra=3"),
        ({"seed": 1, "steps": 99}, "seed=0"),
    ],
)
def test_a_changed_config_is_named(tmp_path: Path, changes: dict, expected: str) -> None:
    path = run_three_steps(tmp_path)
    assert expected in refusal(tmp_path, resume="auto", **changes)
    assert expected in refusal(tmp_path, "branch", resume=str(path), **changes)
    assert not (tmp_path / "branch").exists()  # a refused start leaves nothing that would block the next one


def test_changeable_keys_may_differ_and_are_saved(tmp_path: Path) -> None:
    run_three_steps(tmp_path)
    config = {**CONFIG, "steps": 20, "policy": {"lr": 3e-5, "betas": (0.9, 0.99)}}
    run = RunDir.create(tmp_path, "demo", config=config, resume="auto", changeable=("steps", "policy"))
    assert yaml.safe_load((run.path / "config.yaml").read_text())["steps"] == 20


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    path = run_three_steps(tmp_path)
    for manifest in path.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert "every checkpoint is damaged" in refusal(tmp_path, resume="auto")


def test_resume_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "there is no such directory" in refusal(tmp_path, resume=str(tmp_path / "nowhere"))


def test_rollouts_round_trip_and_are_reproducible(tmp_path: Path) -> None:
    run = start(tmp_path)
    traces = [{"text": "7 − 2 = 5 ✓", "tokens": [1, 2], "logprobs": [-0.1, -1e-9]}, {"text": ""}]
    path = run.write_rollouts(3, traces)
    assert path.name == "step_000003.jsonl.gz"
    assert list(read_rollouts(path)) == traces
    first = path.read_bytes()
    assert run.write_rollouts(3, traces).read_bytes() == first


def test_truncate_metrics_keeps_order_and_drops_garbage(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "x": null}\n{"step": 2}\nnot json\n{"step": 3}\n{"step": 2')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1, "x": null}\n{"step": 2}\n'
    truncate_metrics(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_git_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a.txt").write_text("1")
    subprocess.run([*git, "add", "a.txt"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_commit(tmp_path) == head
    (tmp_path / "a.txt").write_text("2")
    assert git_commit(tmp_path) == head + "+changes"
    (tmp_path / "site-packages").mkdir()
    assert git_commit(tmp_path / "site-packages") is None  # inside a checkout that does not track it
