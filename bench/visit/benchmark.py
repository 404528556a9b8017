"""Benchmark rows of `bench.ops`, each recorded as soon as its problem is measured.

    python -m bench.visit.benchmark --records FILE --stage headline|benchmark --budget-s S [--device cpu]

`headline`: the rows of the goals, ours beside eager torch and the peer that a goal names. `benchmark`: the goals'
operations beside all peers, then the others beside all but torch.compile, which takes seconds a problem; Liger-Kernel's
GRPO loss is compiled so as well. A problem that kills the process is left behind by the next one.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.cases import CASES, OPS, Backend
from bench.measure import Problem, Settings, problems, run_all
from bench.peers import BACKENDS, airl, airl_torch, compiled, liger_scaled, loops, torch_eager
from bench.results import Absent, Row, commit, device_name, versions
from bench.shapes import load_shapes, parse_shape
from bench.visit import records as log
from bench.visit.shards import DEAD, device_is_alive, pending, run_shards

Names = Sequence[tuple[str, str, str]]

# op, mode and shape of every goal, the one that matters most first.
HEADLINE = (
    ("linear_logprob", "frozen f+b", "linear:8192x4096x131072"),
    ("linear_ppo_loss", "trainable f+b", "linear:4096x4096x128256"),
    ("discounted_returns", "forward", "sequences:1024x8192"),
    ("discriminator_loss", "f+b", "head:32768x3584x152064"),
    ("selective_log_softmax", "f+b in place", "logits:4096x151936"),
    ("linear_logprob", "frozen f+b", "linear:4096x3584x152064"),
    ("linear_logprob", "no_grad", "linear:4096x4096x128256"),
    ("linear_ppo_loss", "trainable f+b", "linear:4096x896x151665of151936"),
    ("discriminator_loss", "f+b", "head:32768x896x151936"),
)
# Few, so that each gets its seconds with every peer.
GOALS = (
    ("linear_logprob", "frozen f+b", "linear:4096x4096x128256"),
    ("linear_ppo_loss", "trainable f+b", "linear:4096x4096x128256"),
    ("discriminator_loss", "f+b", "head:32768x3584x152064"),
    ("selective_log_softmax", "f+b in place", "logits:4096x151936"),
    ("linear_ppo_loss", "trainable f+b", "linear:4096x896x151665of151936"),
    ("linear_logprob", "frozen f+b", "linear:16384x3584x152064"),
    ("linear_logprob", "no_grad", "linear:4096x3584x152064"),
)
OTHERS = (
    ("discounted_returns", "forward", "sequences:1024x8192"),
    ("linear_ppo_loss", "frozen f+b", "linear:4096x4096x128256"),
    ("linear_ppo_loss", "trainable f+b", "linear:16384x3584x152064"),
    ("linear_ppo_loss", "trainable f+b", "linear:4096x1536x151936"),
    ("linear_logprob", "frozen f+b", "linear:4096x896x151665of151936"),
    ("discriminator_loss", "f+b", "head:32768x896x151936"),
    ("linear_logprob", "trainable f+b", "linear:4096x4096x128256"),
    ("linear_logprob", "no_grad, entropy", "linear:4096x4096x128256"),
    ("group_advantages", "forward", "sequences:1024x8192"),
    ("gae", "forward", "sequences:1024x8192"),
    ("ppo_loss", "f+b", "sequences:1024x8192"),
    ("discounted_returns", "forward", "sequences:272x300"),
    ("ppo_loss", "f+b", "sequences:272x300"),
    ("token_rewards", "forward", "head:32768x3584x152064"),
    ("discriminator_loss", "index f+b", "head:32768x3584x152064"),
    ("ppo_loss", "from logits f+b", "logits:4096x151936"),
    ("selective_log_softmax", "forward", "logits:4096x151936"),
    ("selective_log_softmax", "f+b", "logits:4096x151936"),
)
GOALS_SHARE = 0.7  # of the benchmark's seconds
TOY_HEADLINE = (
    ("linear_logprob", "frozen f+b", "linear:64x32x500"),
    ("linear_ppo_loss", "trainable f+b", "linear:64x32x490of500"),
    ("discriminator_loss", "f+b", "head:64x32x50"),
    ("discounted_returns", "forward", "sequences:16x64"),
)
TOY = "linear:64x32x490of500,head:64x32x50,sequences:16x40,logits:32x300"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.benchmark")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--stage", choices=("headline", "benchmark"), required=True)
    parser.add_argument("--budget-s", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shard", type=int)
    options = parser.parse_args(arguments)
    if options.shard is None:
        until = time.time() + options.budget_s
        command = [sys.executable, "-m", "bench.visit.benchmark", "--records", str(options.records)]
        command += ["--stage", options.stage, "--device", options.device, "--shard", "0", "--budget-s"]

        def again(shard: int) -> list[str]:
            return [*command, f"{max(until - time.time(), 1):.1f}"]

        return run_shards(again, 1, options.records, options.stage)
    return measure(options.stage, options.records, torch.device(options.device), options.budget_s)


def measure(stage: str, records: Path, device: torch.device, budget: float) -> int:
    """Each problem is a case of the stage, failed when ours was wrong or could not run."""
    toy, start, timer = device.type == "cpu", time.monotonic(), Clock(records, stage)
    for names, backends, share in _groups(stage, toy):
        by_name = {_name(problem): problem for problem in map(_problem, names)}
        left = budget - (time.monotonic() - start)
        settings = Settings(
            device=device, device_name=device_name(device), commit=commit(),
            dtype=torch.float32 if toy else torch.bfloat16, backends=backends, budget=max(share * left, 1e-3),
            seconds=0.02 if toy else 0.3 if stage == "headline" else 0.2,
        )  # fmt: skip
        log.append(records, stage, "versions", **versions(backends))
        todo = [by_name[name] for name in pending(tuple(by_name), 0, 1, records, stage)]
        for entry in run_all(todo, settings, timer.begin):
            kind = "row" if isinstance(entry, Row) else "absent"
            log.append(records, stage, kind, **{kind: asdict(entry)})
            timer.saw(entry)
            if kind == "absent" and entry.kind == "failed" and not device_is_alive():
                timer.end()
                return DEAD
        timer.end()
    return 0


class Clock:
    """Records where each problem begins and ends, and whether ours was right."""

    def __init__(self, records: Path, stage: str) -> None:
        self.records, self.stage, self.name, self.start, self.error, self.rows = records, stage, None, 0.0, None, 0

    def begin(self, name: str) -> None:
        self.end()
        print(name, file=sys.stderr, flush=True)
        self.name, self.start, self.error, self.rows = name.partition("] ")[2], time.monotonic(), None, 0
        log.append(self.records, self.stage, "case-begin", name=self.name, shard=0)

    def saw(self, entry: Row | Absent) -> None:
        if isinstance(entry, Row):
            self.rows += 1
            print(f"  {entry.backend}: {entry.ms:.3f} ms, {entry.percent_of_floor:.0f}% of the floor", flush=True)
            return
        print(f"  {entry.kind}: {entry.backend}: {entry.reason}", flush=True)
        if entry.backend == airl.NAME and entry.kind == "failed":
            self.error = entry.reason

    def end(self) -> None:
        if self.name is None:
            return
        seconds, passed = round(time.monotonic() - self.start, 2), self.error is None
        log.append(
            self.records, self.stage, "case", name=self.name, shard=0, passed=passed, seconds=seconds,
            error=self.error, rows=self.rows,
        )  # fmt: skip
        self.name = None


def _name(problem: Problem) -> str:
    return f"{problem.case.op} {problem.case.mode} {problem.shape.name}"


def _problems(stage: str, toy: bool) -> list[Problem]:
    """All of a stage."""
    return [_problem(name) for names, _, _ in _groups(stage, toy) for name in names]


def _problem(name: tuple[str, str, str]) -> Problem:
    op, mode, shape = *name[:2], parse_shape(name[2])
    case = next(c for c in CASES if (c.op, c.mode) == (op, mode) and c.runs_at(shape))
    return Problem(case=case, shape=shape)


def _groups(stage: str, toy: bool) -> list[tuple[Names, tuple[Backend, ...], float]]:
    """Problems, beside whom, and the share that they may take of the seconds left."""
    if toy:  # importing Liger-Kernel takes half a rehearsal's time
        if stage == "headline":
            return [(TOY_HEADLINE, (airl, torch_eager), 1.0)]
        whole = [(p.case.op, p.case.mode, p.shape.name) for p in problems(load_shapes(TOY), OPS)]
        return [(whole[:3], (airl, torch_eager, liger_scaled), GOALS_SHARE), (whole[3:], (airl, torch_eager), 1.0)]
    if stage == "headline":
        return [(HEADLINE, (airl, torch_eager, liger_scaled), 1.0)]
    everyone = tuple(b for b in BACKENDS if b not in (airl_torch, loops))
    return [(GOALS, everyone, GOALS_SHARE), (OTHERS, tuple(b for b in everyone if b is not compiled), 1.0)]


if __name__ == "__main__":
    sys.exit(main())
