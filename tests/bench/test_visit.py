"""The parts of a visit: records that are cut off, processes that die, pytest's results as they come, every stage."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.visit import profile, shards, smoke, steps, summary, updates
from bench.visit.plan import STAGES, Visit
from bench.visit.records import append, of, read
from tests.bench.rows import ROW

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, "a", "case", name="x", value=float("nan"), where=tmp_path)
    with path.open("a") as file:
        file.write('["a list"]\n{"stage": "a", "kind": "ca')
    assert [r["name"] for r in read(path)] == ["x"]
    assert read(tmp_path / "absent.jsonl") == []


DYING = """
import os, signal, sys
from pathlib import Path
from bench.visit.shards import pending, run_cases
records, shard = Path(sys.argv[1]), int(sys.argv[2])
dead = []
def run(name):
    if name == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    if name in ("raises", "poisons"):
        dead.append(name == "poisons")
        raise ValueError("on purpose: " + name)
names = ["a", "b", "kills", "raises", "c", "poisons", "d", "e"]
sys.exit(run_cases(pending(names, shard, 2, records, "s"), run, records, "s", shard, lambda: not any(dead)))
"""


def test_cases_after_one_that_kills_its_process_still_run(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    monkeypatch.setattr(os, "environ", ENVIRONMENT)
    command = [sys.executable, "-c", DYING, str(path)]
    assert shards.run_shards(lambda shard: [*command, str(shard)], 2, path, "s") == 1
    cases = {r["name"]: r for r in of(read(path), "s", "case")}
    assert set(cases) == {"a", "b", "kills", "raises", "c", "poisons", "d", "e"}
    assert {name for name, r in cases.items() if not r["passed"]} == {"kills", "raises", "poisons"}
    assert cases["kills"]["error"] == "the process died with exit code -9"
    assert "ValueError: on purpose: raises" in cases["raises"]["error"]
    assert len(of(read(path), "s", "case")) == 8  # none ran twice


def test_a_process_that_never_starts_a_case_is_given_up_and_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_RESTARTS", 1)
    path = tmp_path / "r.jsonl"
    assert shards.run_shards(lambda shard: [sys.executable, "-c", "raise SystemExit(9)"], 1, path, "s") == 1
    (first, *_) = of(read(path), "s", "case")
    assert first["error"].startswith("the process died with exit code 9 before its first case")


TEST_FILE = """
import os, pytest
@pytest.mark.parametrize("n", range(4))
def test_right(n): pass
def test_wrong(): assert 1 == 2
def test_skipped(): pytest.skip("not here")
def test_dies(): os._exit(11)
def test_after(): pass
"""


def test_pytests_results_are_recorded_as_each_test_ends(tmp_path):
    path, file = tmp_path / "r.jsonl", tmp_path / "test_small.py"
    file.write_text(TEST_FILE)
    command = [sys.executable, "-m", "bench.visit.tests", "--records", str(path), "--stage", "tests", "--jobs", "2"]
    run = subprocess.run(
        [*command, "--files", str(file)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stdout + run.stderr
    cases = {r["name"].partition("::")[2]: r for r in of(read(path), "tests", "case")}
    assert len(cases) == 8 and len(of(read(path), "tests", "case")) == 8
    assert {n for n, r in cases.items() if not r["passed"]} == {"test_wrong", "test_dies"}
    assert "assert 1 == 2" in cases["test_wrong"]["error"]
    assert cases["test_dies"]["error"] == "the process died with exit code 11"
    assert cases["test_skipped"]["skipped"] and "not here" in cases["test_skipped"]["error"]
    assert not cases["test_after"]["skipped"]


def test_smoke_catches_a_wrong_operation(tmp_path, monkeypatch):
    from bench.peers import airl

    names = list(smoke.cases("cpu"))
    assert sum("bfloat16" in name for name in names) >= 13 and sum("attention" in name for name in names) == 2
    assert "AIRL step float32" in names
    right, name = airl.prepare, "linear_logprob frozen f+b, linear:16x32x300 float32"

    def wrong(case, shape):
        run = right(case, shape)
        return lambda inputs: replace(found := run(inputs), gradients=tuple(1.05 * g for g in found.gradients))

    smoke.cases("cpu")[name]()
    monkeypatch.setattr(airl, "prepare", wrong)
    with pytest.raises(AssertionError, match="gradient 0 is off by 0.05"):
        smoke.cases("cpu")[name]()


def test_smoke_runs_a_whole_step_and_attention():
    smoke.airl_step_case("float32", "cpu")
    smoke.attention_case(6, 2, 16, "cpu")


def test_updates_and_steps_are_recorded_row_by_row(tmp_path):
    path = tmp_path / "r.jsonl"
    assert updates.main(["--records", str(path), "--budget-s", "200", "--device", "cpu"]) == 0
    assert steps.main(["--records", str(path), "--device", "cpu"]) == 0
    records = read(path)
    assert {"shared", "packed", "padded"} <= {r["row"]["variant"] for r in of(records, "updates", "update")}
    taken = of(records, "steps", "step")
    assert [r["warm"] for r in taken] == [True, True, False]
    phases = taken[-1]["phase_seconds"]
    assert taken[-1]["phase_tokens_per_s"]["sample"] == pytest.approx(2 * 2 * 6 / phases["sample"])
    assert "tokens/s by phase" in summary.steps(records) and "LoRA" in summary.updates(records)


def test_the_profile_takes_the_ops_furthest_from_their_goal():
    rows = [
        replace(ROW, percent_of_floor=60.0),  # 75% of its goal
        replace(ROW, percent_of_floor=70.0),
        replace(ROW, op="selective_log_softmax", mode="f+b in place", shape="logits:64x300", percent_of_floor=80.0),
        replace(ROW, op="discriminator_loss", mode="f+b", shape="head:64x8x9", percent_of_floor=20.0),
        replace(ROW, op="gae", mode="forward", shape="sequences:4x9", percent_of_floor=1.0),  # has no goal
    ]
    records = [{"stage": "headline", "kind": "row", "row": asdict(row)} for row in rows]
    chosen = profile.furthest(records, 2)
    assert [(row.op, row.percent_of_floor) for row in chosen] == [
        ("discriminator_loss", 20.0),
        ("linear_logprob", 60.0),
    ]
    assert profile.furthest([], 2) == []


NCU = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3","_stats_kernel","gpu__time_duration.sum","ns","1,234"
"0","7","python3","_stats_kernel","launch__registers_per_thread","register/thread","80"
"1","7","python3","_stats_kernel","something_else","","3"
==PROF== Disconnected
"""


def test_counters_are_read_by_launch():
    assert profile.counters_in(NCU) == {"0 _stats_kernel": {"ns": "1,234", "registers": "80"}}
    assert profile.counters_in("==ERROR== The user does not have permission") == {}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_names_flags_that_its_module_knows(stage, tmp_path, capsys):
    """On a GPU: what is not known is listed, and it is the planted flag alone."""
    visit = Visit(out=tmp_path)
    reason = stage.absent(visit)
    if reason is not None:
        pytest.skip(reason)
    _, minus_m, module, *flags = stage.command(visit, 50.0)
    assert minus_m == "-m"
    try:
        code = importlib.import_module(module).main([*flags, "--no-such-flag"])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert capsys.readouterr().err.partition("unrecognized arguments: ")[2].split()[0].strip(";") == "--no-such-flag"


def test_a_summary_of_everything(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, "environment", "environment", device="X", commit="abc")
    append(path, "headline", "begin", limit=60)
    append(path, "headline", "row", row=asdict(ROW))
    absent = {"kind": "skipped", "op": "o", "mode": "m", "shape": "s", "backend": "trl", "reason": "not installed."}
    append(path, "headline", "absent", absent=absent)
    append(path, "profile", "kernels", name="an op", calls=3, ms_by_kernel={"_stats_kernel": 0.25})
    append(path, "profile", "counters", name="an op", kernels={"0 _stats_kernel": {"dram %": "81.2"}}, error=None)
    text = summary.render(path)
    for part in (
        "# X",
        "commit abc",
        "under way when the visit ended",
        "81.2",
        "0.2500",
        "skipped: trl: not installed.",
    ):
        assert part in text
    assert json.dumps(asdict(ROW)) in path.read_text()
