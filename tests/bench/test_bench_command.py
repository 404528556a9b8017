"""`airl-fast bench`: a child process of the checkout, its flags and exit code passed through."""

import json

import pytest

from airl_fast import benchmark
from airl_fast.benchmark import BENCHMARKS
from airl_fast.cli import main
from airl_fast.errors import UserError


def test_flags_and_results_pass_through(tmp_path, capfd):
    path = tmp_path / "rows.json"
    flags = ["--shapes", "sequences:4x12", "--ops", "gae", "--backends", "airl", "--device", "cpu"]
    assert main(["bench", "ops", *flags, "--json", str(path)]) == 0
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["gae"]
    assert "gae" in capfd.readouterr().out


def test_the_exit_code_passes_through(capfd):
    assert main(["bench", "ops", "--ops", "nope"]) == 2
    assert capfd.readouterr().err.startswith("bench.ops: --ops nope")


def test_an_unknown_benchmark(capsys):
    assert main(["bench", "nope"]) == 2
    names = ", ".join(BENCHMARKS)
    assert "profile" in names and capsys.readouterr().err == f"airl-fast: bench nope: give one of {names}.\n"


def test_without_a_checkout_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match=r"has no bench/ops\.py; run it from a checkout of the repository\."):
        benchmark.run_benchmark("ops", [])
