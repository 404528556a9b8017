"""Train the runs of an ablation in processes of their own; what is finished is not run again."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from airl_fast.ablate.grid import Job
from airl_fast.artifacts import POLICY
from airl_fast.baselines import PARENT, train_command
from airl_fast.errors import UserError
from airl_fast.rundir import write_atomically

Say = Callable[[str], None]


@dataclass(slots=True)
class Runner:
    """processes: how many train at once. Leaving by an error, or by Ctrl-C, ends those that run."""

    processes: int
    say: Say
    _running: dict[str, subprocess.Popen] = field(default_factory=dict)
    _stopped: bool = False

    def run(self, jobs: Sequence[Job], what: str) -> list[str]:
        """Train all jobs that are not finished; returns the names of those that failed. Each has a log beside it."""
        left = [job for job in jobs if not _finished(job)]
        if len(left) < len(jobs):
            self.say(f"{len(jobs) - len(left)} of {len(jobs)} {what} are there already")
        failed: list[str] = []
        began = time.monotonic()
        with ThreadPoolExecutor(self.processes) as pool:
            waiting: dict[Future[int], Job] = {pool.submit(self._train, job): job for job in left}
            try:
                while waiting:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        job = waiting.pop(future)
                        if future.result():
                            failed.append(job.name)
                        self._report(job, bool(future.result()), len(left) - len(waiting), len(left), began)
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failed

    def _train(self, job: Job) -> int:
        """The exit code of `airl-fast train`; an interrupted run continues from its checkpoint."""
        if self._stopped:
            return 1
        folder = Path(job.tree["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{job.name}.yaml"
        write_atomically(file, yaml.safe_dump(dict(job.tree), sort_keys=False, allow_unicode=True))
        command = train_command(file, job.name, trusted=job.tree["model"]["trust_remote_code"])
        with log_of(job).open("ab") as log:
            environment = os.environ | {PARENT: str(os.getpid())}
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            self._running[job.name] = process
            code = process.wait()
            del self._running[job.name]
        return code

    def _stop(self) -> None:
        self._stopped = True
        for process in list(self._running.values()):
            process.terminate()

    def _report(self, job: Job, failed: bool, done: int, total: int, began: float) -> None:
        seconds = time.monotonic() - began
        minutes = seconds / done * (total - done) / 60
        ending = f"failed, see {log_of(job)}" if failed else "done"
        remaining = f"; about {minutes:.0f} min left" if done < total else ""
        self.say(f"[{done}/{total}] {job.name}: {ending}{remaining}")


def log_of(job: Job) -> Path:
    return Path(job.tree["output_dir"]) / f"{job.name}.log"


def summary_of(job: Job) -> Path:
    return Path(job.tree["output_dir"]) / job.name / "summary.json"


def _finished(job: Job) -> bool:
    """Is there a run of exactly this configuration, trained (and evaluated, where that was asked for)?"""
    directory = Path(job.tree["output_dir"]) / job.name
    if not (directory / POLICY).is_dir() or (job.variant is not None and not summary_of(job).is_file()):
        return False
    saved = directory / "config.yaml"
    try:
        then, now = (yaml.safe_load(t) for t in (saved.read_text(encoding="utf-8"), yaml.safe_dump(dict(job.tree))))
        for tree in (then, now):
            tree["model"]["trust_remote_code"] = False  # says nothing of what was computed
        same = then == now
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{directory} holds a run of another configuration; choose another directory with -o, or remove it."
        )
    return True
