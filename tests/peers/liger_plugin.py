"""Pytest plugin: our GRPO losses in place of Liger-Kernel's while Liger's own tests run. Used by `tests.peers.liger`.

What Liger's tests import is replaced before they are collected. Where they compare two of Liger's own, only one of
the two is ours. Calls are counted: a test file that never called ours has tested nothing.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import airl_kernels.integrations.liger as ours
import liger_kernel.chunked_loss as chunked_loss
import liger_kernel.chunked_loss.functional as functional
import liger_kernel.ops.grpo_loss as ops
import liger_kernel.transformers.grpo_loss as transformers_loss
import pytest

calls: Counter = Counter()
outcomes: list[dict[str, str]] = []


def counted(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        calls[function.__qualname__] += 1
        return function(*args, **kwargs)

    return call


ours.LigerFusedLinearGRPOLoss.forward = counted(ours.LigerFusedLinearGRPOLoss.forward)
chunked_loss.LigerFusedLinearGRPOLoss = ours.LigerFusedLinearGRPOLoss
functional.liger_fused_linear_grpo = counted(ours.liger_fused_linear_grpo)
transformers_loss.triton_grpo_loss = counted(ours.triton_grpo_loss)
ops.fused_selective_log_softmax = counted(ours.fused_selective_log_softmax)

if os.environ.get("TRITON_INTERPRET") == "1":
    from airl_kernels.testing.interpreted import run_kernels_on_the_cpu

    run_kernels_on_the_cpu()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            reason = str(call.excinfo.value).strip().splitlines()[-1] if str(call.excinfo.value).strip() else "failed"
        outcomes.append({"test": item.nodeid, "outcome": report.outcome, "reason": reason})


def pytest_sessionfinish() -> None:
    result = {"calls": calls, "outcomes": outcomes}
    Path(os.environ["PEER_RESULT"]).write_text(json.dumps(result), encoding="utf-8")
