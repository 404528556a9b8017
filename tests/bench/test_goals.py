"""Goals from rows: proved, refuted, not measured; and every goal is measured by the visit's own list."""

from dataclasses import replace

import pytest

from bench import targets
from bench.cases import CASES
from bench.goals import LIGER, PROVED, REFUTED, UNMEASURED, findings, findings_table
from bench.shapes import load_shapes
from bench.targets import TARGETS, judge, verdict_table
from bench.visit.benchmark import HEADLINE, _problems
from tests.bench.rows import ROW


def state(rows, updates=(), *, goal: str) -> tuple[str, str]:
    (found,) = (f for f in findings(rows, updates) if goal in f.goal)
    return found.state, found.measured


def test_nothing_measured_proves_nothing():
    found = findings([], [])
    assert {f.state for f in found} == {UNMEASURED}
    assert len(found) == len(TARGETS) + 6
    assert "84-88, 86-90" in findings_table(found)


def test_a_floor_is_refuted_by_one_row_and_at_its_own_shapes_only():
    goal = "linear_logprob frozen f+b >="
    narrow = replace(ROW, shape="linear:4096x896x151936", percent_of_floor=10.0)
    assert state([ROW, narrow], goal=goal) == (PROVED, "81% at 4096x3584x152064")
    missed = replace(ROW, shape="linear:4096x4096x128256", percent_of_floor=79.9)
    assert state([ROW, missed], goal=goal)[0] == REFUTED
    assert state([replace(ROW, backend="liger", percent_of_floor=1.0)], goal=goal)[0] == UNMEASURED


def test_the_headline_beside_liger_or_against_what_it_published():
    goal = "Liger's Hopper kernels"
    beside = replace(ROW, ratio_to_peer={LIGER: 1.81})
    assert state([beside], goal=goal) == (PROVED, "1.81x at 4096x3584x152064")
    assert state([replace(ROW, ratio_to_peer={LIGER: 1.79})], goal=goal)[0] == REFUTED
    published = replace(ROW, shape="linear:8192x4096x131072", ms=25.2, device="NVIDIA H100 80GB HBM3")
    assert state([published], goal=goal) == (PROVED, "2.00x its published 50.4 ms at 8192x4096x131072")
    assert state([replace(published, device="NVIDIA H200")], goal=goal)[0] == UNMEASURED
    assert any(shape == "linear:8192x4096x131072" for _, _, shape in HEADLINE)


def test_peers_and_memory_name_the_rows_that_are_behind():
    behind = replace(ROW, ratio_to_peer={"eager": 0.9}, memory_ratio_to_peer={"eager": 0.5})
    assert state([ROW], goal="ahead of every peer") == (PROVED, "1 of 1 rows")
    verdict, measured = state([ROW, behind], goal="ahead of every peer")
    assert (
        verdict == REFUTED and "1 of 2 rows; linear_logprob frozen f+b 4096x3584x152064: eager takes 0.90" in measured
    )
    verdict, measured = state([ROW, behind], goal="no more memory")
    assert verdict == REFUTED and "eager needs 0.50 of our memory" in measured
    alone = replace(ROW, ratio_to_peer={}, memory_ratio_to_peer={})
    assert state([alone], goal="ahead of every peer")[0] == UNMEASURED


def update(variant: str, seconds: float, rows: int, tokens: int = 100, mfu: float | None = 0.46) -> dict:
    return {
        "policy": "p", "variant": variant, "rows": rows, "policy_tokens": tokens, "seconds": {"policy": seconds},
        "model_flops_utilisation": mfu,
    }  # fmt: skip


def test_the_updates_goals():
    shared, trl, packed = update("shared", 1.0, 100), update("trl", 2.0, 200, 90, None), update("packed", 1.5, 170)
    updates = [shared, trl, packed]
    assert state([], updates, goal="TRL's tokens/s") == (PROVED, "2.22x at p")
    assert state([], [shared, update("trl", 1.0, 200, 90, None)], goal="TRL's tokens/s")[0] == REFUTED
    assert state([], updates, goal="model FLOPs") == (PROVED, "46% at p")
    assert state([], [update("shared", 1.0, 100, mfu=0.44)], goal="model FLOPs")[0] == REFUTED
    assert state([], updates, goal="token ratio") == (PROVED, "88% (1.50x of 1.70x) at p")
    assert state([], [shared, update("packed", 1.3, 170)], goal="token ratio")[0] == REFUTED
    assert state([], [shared], goal="token ratio")[0] == UNMEASURED


def test_verdicts_of_rows():
    rows = [
        replace(ROW, mode="no_grad", shape="linear:4096x896x151936", ratio_to_peer={}, memory_ratio_to_peer={}),
        ROW,
        replace(ROW, percent_of_floor=79.9, ratio_to_peer={"eager": 0.9}, memory_ratio_to_peer={"eager": 0.5}),
        replace(ROW, backend="eager", percent_of_floor=1.0),
        replace(ROW, op="discounted_returns", mode="forward", shape="sequences:1024x8192", percent_of_floor=70.0),
        replace(ROW, op="discounted_returns", mode="forward", shape="sequences:272x300", percent_of_floor=1.0),
    ]
    verdicts = judge(rows)
    found = [(v.target and v.target.percent, v.reached, v.faster, v.leaner) for v in verdicts]
    assert found == [
        (80, True, True, True),
        (80, False, False, False),
        (70, True, True, True),
        (None, None, None, None),
        (None, None, True, True),
    ]
    assert (verdicts[0].fastest_peer, verdicts[0].leanest_peer) == ("liger", "liger")
    reached, missed = verdict_table(verdicts).splitlines()[2:4]
    assert reached.count("pass") == 3 and "1.20x liger" in reached
    assert missed.count("MISS") == 3


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.op} {t.mode}")
def test_every_goal_is_measured_in_the_headline_and_by_the_benchmark(target):
    """Names of ops, modes and shapes are those of the benchmark, so that no goal is silently never judged."""
    case = next(case for case in CASES if (case.op, case.mode) == (target.op, target.mode))
    assert any(case.runs_at(shape) and target.where(shape.sizes) for shape in load_shapes("gpu"))
    for stage in ("headline", "benchmark"):
        mine = [p.shape for p in _problems(stage, False) if p.case is case]
        assert any(target.where(shape.sizes) for shape in mine), stage


def test_every_case_is_measured_once_a_shape_and_the_trainers_own_vocabulary_is_among_them():
    for toy in (False, True):
        whole = _problems("benchmark", toy)
        assert {p.case for p in whole} == set(CASES)
        assert len({(p.case, p.shape) for p in whole}) == len(whole)
    for stage in ("headline", "benchmark"):
        assert "linear:4096x896x151665of151936" in {p.shape.name for p in _problems(stage, False)}
    assert targets.sizes_of("linear:4096x896x151665of151936")[:3] == (4096, 896, 151665)
