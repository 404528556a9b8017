"""The ops under pytest-benchmark, for comparing commits with its own tools. Not part of `make test`.

    python -m pytest bench/test_ops_benchmark.py --benchmark-only [--benchmark-autosave --benchmark-compare]

Ours alone and one round per input set; the peers, floors and verification are in `python -m bench.ops`.
"""

import pytest
import torch

from bench.cases import OPS
from bench.inputs import make_inputs
from bench.measure import Problem, problems
from bench.peers import airl
from bench.shapes import load_shapes
from bench.timing import synchronize

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
PROBLEMS = problems(load_shapes("gpu" if DEVICE.type == "cuda" else "cpu"), OPS)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.case.op}-{p.case.mode}-{p.shape.name}")
def test_op(benchmark, problem: Problem) -> None:
    inputs = make_inputs(problem.case, problem.shape, DTYPE, DEVICE)
    run = airl.prepare(problem.case, problem.shape)
    benchmark.group = f"{problem.case.op} {problem.case.mode}"

    def call():
        run(inputs)
        synchronize(DEVICE)

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
