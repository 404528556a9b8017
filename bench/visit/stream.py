"""A pytest plugin: run one process's share of the tests and record each as it ends.

`-p bench.visit.stream` with AIRL_VISIT_SHARD = "records file|stage|shard|count". A test that an earlier process of
this share recorded is not run again. After a failure that left the CUDA context dead, the process ends with `DEAD`.
"""

import os
from pathlib import Path

import pytest

from bench.visit.records import MOST_TEXT, append
from bench.visit.shards import DEAD, device_is_alive, pending

VARIABLE = "AIRL_VISIT_SHARD"


class Stream:
    """outcome, seconds, error: of the test under way, over its setup, call and teardown."""

    def __init__(self, setting: str) -> None:
        records, self.stage, shard, count = setting.split("|")
        self.records, self.shard, self.count = Path(records), int(shard), int(count)
        self._clear()

    def _clear(self) -> None:
        self.outcome, self.seconds, self.error = "passed", 0.0, None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        names = pending([item.nodeid for item in items], self.shard, self.count, self.records, self.stage)
        mine = set(names)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
        items[:] = [item for item in items if item.nodeid in mine]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._record(f"collecting {report.nodeid}", False, None, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._clear()
        append(self.records, self.stage, "case-begin", name=nodeid, shard=self.shard)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.failed:
            self.outcome, self.error = "failed", str(report.longrepr)
        elif report.skipped and self.outcome == "passed":
            self.outcome, self.error = "skipped", str(report.longrepr)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._record(nodeid, self.outcome != "failed", round(self.seconds, 2), self.error)
        if self.outcome == "failed" and not device_is_alive():
            os._exit(DEAD)

    def _record(self, name: str, passed: bool, seconds: float | None, error: str | None) -> None:
        text = None if error is None else error[-MOST_TEXT:] if not passed else error[:200]
        append(
            self.records, self.stage, "case", name=name, shard=self.shard, passed=passed,
            skipped=self.outcome == "skipped", seconds=seconds, error=text,
        )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Stream(os.environ[VARIABLE]), "visit-stream")
