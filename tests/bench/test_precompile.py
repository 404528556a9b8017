"""Launches recorded on a GPU that is not there, and the pool that compiles them."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from airl_fast.rollout.engine import SamplingParams
from bench import precompile
from bench.callers import _Evaluate, _short
from bench.carry import kernel_list
from bench.precompile import Precompiler
from bench.pretend import pretend_gpu
from bench.visit import plan

ROOT = Path(__file__).parents[2]


def python(code: str, folder: Path) -> dict:
    """What a process of its own prints as JSON on its last line. It fills a cache in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT), str(folder)))
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# ---- a GPU that is not there -----------------------------------------------------------------------------------


def test_tensors_look_as_on_a_gpu_inside_and_only_there():
    with pretend_gpu(90):
        x = torch.randn(4, 6, device="cuda:0", generator=torch.Generator("cuda").manual_seed(3))
        row = x.to(torch.bfloat16)[1:]
        assert (x.is_cuda, x.device.type, row.device.type, torch.zeros(2).device.type) == (True, "cuda", "cuda", "cpu")
        assert (x.data_ptr() % 512, row.data_ptr() % 16) == (0, 12)
        assert (x.sum().item(), bool((x > 0).all()), x.cpu().tolist()[0]) == (1.0, True, [1.0] * 6)
        assert (x[x > 0].shape, torch.cuda.get_device_capability(), torch.cuda.device_count()) == ((12,), (9, 0), 1)
        x.requires_grad_()
        assert torch.autograd.grad((x @ x.T).sum(), x)[0].shape == x.shape
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert not torch.zeros(2, device="meta").is_cuda
    assert torch.cuda.device_count() == 0 or torch.cuda.get_device_name() != "NVIDIA H100 80GB HBM3 (pretended)"


def test_assertions_are_evaluated_and_their_outcome_ignored():
    import ast

    source = "seen = []\nassert seen.append(1), 'no'\nassert 1 / 0\nseen.append(2)\n"
    names: dict = {}
    exec(compile(ast.fix_missing_locations(_Evaluate().visit(ast.parse(source))), "x", "exec"), names)
    assert names["seen"] == [1, 2]


# ---- recording -------------------------------------------------------------------------------------------------

LAUNCHES = """
import json, shutil, sys
from pathlib import Path
import torch
from airl_kernels import selective_log_softmax
from bench.pretend import pretend_gpu
from bench.recording import compiling, recording

def call():
    for vocab, dtype in ((96, torch.float32), (97, torch.float32), (97, torch.bfloat16), (97, torch.float32)):
        logits = torch.randn(5, vocab, device="cuda").to(dtype)
        selective_log_softmax(logits, torch.zeros(5, dtype=torch.int64, device="cuda"))

with pretend_gpu(), recording(90) as recorder:
    call()
found = list(recorder.found)
"""
FILL = """
from bench.stubs import compile_one
cold = [compile_one(entry, 90) for entry in found]
warm = [compile_one(entry, 90) for entry in found]
"""
AGAIN = """
with pretend_gpu(), compiling(90) as hits:
    call()
print(json.dumps({"hits": hits}))
"""


def test_what_is_compiled_from_the_record_is_what_a_launch_looks_up(tmp_path):
    """By another process, as on the GPU machine; and a kernel that is missing from the cache is noticed."""
    said = """
print(json.dumps({"launches": recorder.launches, "names": [entry.name for entry in found],
                  "errors": [entry.error for entry in (*cold, *warm)],
                  "paths": [entry.name for entry in found if sys.prefix in entry.data or "site-packages" in entry.data],
                  "cold": [entry.hit for entry in cold], "warm": [entry.hit for entry in warm]}))
"""
    filled = python(LAUNCHES + FILL + said, tmp_path)
    assert filled["launches"] == 4
    assert len(set(filled["names"])) == 3  # 97 columns in float32 came twice; 96 is a multiple of 16
    assert filled["errors"] == [""] * 6
    assert filled["paths"] == []  # the GPU machine's Triton lies elsewhere
    assert (filled["cold"], filled["warm"]) == ([False] * 3, [True] * 3)
    assert python(LAUNCHES + AGAIN, tmp_path) == {"hits": [True] * 3}
    for group in list((tmp_path / "cache").glob("*/__grp___stats_kernel.json"))[:1]:
        group.unlink()
    assert sorted(python(LAUNCHES + AGAIN, tmp_path)["hits"]) == [False, True, True]


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def good(x, n):
    tl.store(x, n)

@triton.jit
def broken(x, n):
    tl.store(x, n + nothing_of_that_name)
"""
POOL = """
import json
import torch
import made_kernels
from bench.precompile import Precompiler, summary
from bench.pretend import pretend_gpu
from bench.recording import recording
from dataclasses import asdict

with pretend_gpu(), recording(90) as recorder:
    for kernel in (made_kernels.broken, made_kernels.good):
        kernel[(1,)](torch.zeros(3, device="cuda"), 5)
known = {"specialisations": [asdict(entry) for entry in recorder.found]}
outcome = Precompiler(arch=90, jobs=2, budget=BUDGET, say=print).run((), known, compile_them=True, verify=False)
print(json.dumps({"code": outcome.code, "left": outcome.left, "summary": summary(outcome),
                  "errors": {entry.name.split("(")[0]: entry.error for entry in outcome.compiled}}))
"""


def test_a_kernel_that_does_not_compile_is_named_and_the_others_go_on(tmp_path):
    (tmp_path / "made_kernels.py").write_text(KERNELS)
    found = python(POOL.replace("BUDGET", "None"), tmp_path)
    assert (found["code"], found["left"]) == (1, 0)
    assert found["errors"]["good"] == ""
    assert "nothing_of_that_name" in found["errors"]["broken"]
    assert "2 kernels" in found["summary"] and "1 failed" in found["summary"]
    assert "FAILED broken(" in found["summary"]


def test_beyond_the_budget_nothing_is_started(tmp_path):
    (tmp_path / "made_kernels.py").write_text(KERNELS + "# " + "x" * 10)
    code = POOL.replace("BUDGET", "0.0").replace("(made_kernels.broken, made_kernels.good)", "(made_kernels.good,)")
    code = code.replace("[asdict(entry)", "40 * [asdict(entry)")
    found = python(code, tmp_path)
    assert 30 <= found["left"] < 40
    assert f"{found['left']} left out" in found["summary"]


def test_a_list_that_is_used_again_still_says_what_broke_when_it_was_recorded(tmp_path):
    code = """
import json
from pathlib import Path
from bench.precompile import Precompiler, document, read_list, summary
path, codes = Path("FOLDER/list.json"), []
known = {"specialisations": [], "broken": ["smoke: x: TypeError: y"]}
for _ in range(2):
    outcome = Precompiler(arch=90, jobs=1, say=print).run((), known, compile_them=True, verify=False)
    path.write_text(json.dumps(document(outcome)))
    known = read_list(path)
    codes.append((outcome.code, "BROKEN smoke: x: TypeError: y" in summary(outcome)))
print(json.dumps(codes))
"""
    assert python(code.replace("FOLDER", str(tmp_path)), tmp_path) == [[1, True], [1, True]]


def test_a_list_of_other_sources_is_taken_where_it_is_named(tmp_path, capsys, monkeypatch):
    """A visit has no time to record anew; whoever names no list has."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = kernel_list(90, tmp_path)
    path.write_text(json.dumps({"sources": "others", "specialisations": [], "broken": []}))
    assert precompile.main(["--recorded", str(path), "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{path} is of other sources; it is taken as it is." in out and "sm_90: 0 kernels" in out
    monkeypatch.setattr(precompile, "kernel_list", lambda arch: path)
    monkeypatch.setattr(Precompiler, "_record", lambda self, pool, callers: print(f"recorded from {len(callers)}"))
    assert precompile.main(["--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "the callers are run instead." in out and "recorded from" in out
    monkeypatch.setattr(plan, "kernel_list", lambda arch: path)
    (stage,) = (stage for stage in plan.STAGES if stage.name == "precompile")
    assert str(path) in stage.command(plan.Visit(out=tmp_path), stage.seconds)


ORPHANS = """
import os, time
from bench.precompile import Precompiler
pool = Precompiler(arch=90, jobs=2, say=print)._pool()
ids = [future.result() for future in [pool.submit(os.getpid) for _ in range(2)]]
print(*pool._processes, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are left behind")
def test_the_pool_ends_with_a_process_that_is_killed():
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    ) as process:
        workers = [Path("/proc", word, "stat") for word in process.stdout.readline().split()]
        assert len(workers) == 2 and all(path.exists() for path in workers)
        process.kill()
    until = time.monotonic() + 5
    while (left := [path for path in workers if lives(path)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


def lives(stat: Path) -> bool:
    """Not so when it ended and nobody has asked for its exit code yet."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FOREIGN = (
    {"name": "a kernel of another program"},
    {"module": "m", "function": "f", "data": "no JSON"},
    {"module": "m", "function": "f", "data": "{}"},
    {"module": "m", "function": "f", "data": "[]"},
    "a kernel",
)


@pytest.mark.parametrize("known", [*({"specialisations": [entry]} for entry in FOREIGN), {"broken": [3]}])
def test_a_list_of_another_program_is_refused_in_a_sentence(known, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"sources": "others", "specialisations": [], "broken": [], **known}))
    assert precompile.main(["--recorded", str(path), "--jobs", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench.precompile: --recorded {path}: give a file that --json wrote (")


def test_a_kernel_that_is_no_longer_there_does_not_compile(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    empty = {"attrs_keys": [], "attrs_vals": [], "constant_vals": [], "signature": {}}
    entry = {"module": "bench.report", "function": "gone", "data": json.dumps(empty | {"options": {"num_warps": 4}})}
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"sources": "others", "specialisations": [entry], "broken": []}))
    assert precompile.main(["--recorded", str(path), "--jobs", "1"]) == 1
    assert "FAILED gone(; ) 4 warps: AttributeError" in capsys.readouterr().out


def test_a_sample_is_cut_short_where_nothing_ends():
    params = SamplingParams(
        temperature=1.0, top_p=1.0, max_new_tokens=150, end_token=3, other_ends=(), seed=1, batch_size=8
    )
    asked = []
    few = _short(lambda *given: asked.append(given))
    few("lm", [[1]], 4, params, "static")
    few("lm", [[1]], 4, replace(params, max_new_tokens=2))
    assert asked == [("lm", [[1]], 4, replace(params, max_new_tokens=n), x) for n, x in ((6, "static"), (2, None))]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--jobs", "0"], "--jobs 0: give 1 or more processes."),
        (["--callers", "nope"], "--callers nope: give some of updates, smoke,"),
        (["--recorded", "/nowhere.json"], "--recorded /nowhere.json: give a file that --json wrote"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert precompile.main(arguments) == 2
    assert sentence in capsys.readouterr().err
