"""The runner of `processors.py`: settings reach the tests, workers and their processes, and failures are named."""

import pytest

from tests.processors import SETTINGS, main, run

TESTS = """
import os, subprocess, sys
import numpy as np, torch

def total():  # of [1, K] @ [K, 1], added in float32
    left, right = torch.tensor([[1.0, 2.0**-24, 2.0**-24]]), torch.ones(3, 1)
    return (left @ right).item()

def test_products():
    order = os.environ.get("AIRL_PRODUCT_ORDER")
    assert order in (None, "backwards")
    if order:
        assert total() == 1.0 + 2.0**-23  # first to last both small terms are lost

def test_threads():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])

def test_that_fails():
    assert False

def test_that_is_skipped():
    import pytest
    pytest.skip("for the count")
"""


@pytest.mark.parametrize("setting", ["backwards", "two"])
def test_settings_reach_the_tests_and_failures_are_named(setting, tmp_path):
    file = tmp_path / "test_inner.py"
    file.write_text(TESTS)
    outcome = run(setting, [str(file)], processes=1)
    assert (outcome.passed, outcome.skipped) == (2, 1), outcome
    assert [name.rpartition("::")[2] for name in outcome.failed] == ["test_that_fails"]
    assert outcome.line().split()[:4] == [setting, "2", "1", "1"]


def test_a_run_without_tests_fails(tmp_path):
    (tmp_path / "test_none.py").write_text("")
    assert run("default", [str(tmp_path)], processes=1).failed[0].startswith("pytest ended with 5")


def test_an_unknown_setting_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["arm"])
    assert f"arm: give some of {', '.join(SETTINGS)}." in capsys.readouterr().err
