"""Train a run's baselines: the same command line in processes of its own, from the same start policy."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from pathlib import Path

import yaml

from airl_fast.artifacts import POLICY, START
from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.overrides import deep_merge, load_config, plain
from airl_fast.rundir import write_atomically
from airl_fast.trust import TRUST

_CHANGES: dict[str, dict] = {
    "sft": {"algorithm": "sft"},
    "grpo": {"algorithm": "grpo", "policy": {"kl_coef": 0.0}},
    # AIRL with a discriminator that is never trained: what the machinery does without a learned reward.
    "random": {"algorithm": "airl", "discriminator": {"updates_per_step": 0, "warmup_steps": 0}},
}
PARENT = "AIRL_FAST_PARENT"  # tells a baseline's process which process it belongs to
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """In a baseline's process on Linux: end when the run that started it ends, even by SIGKILL, so that the run can
    be continued without waiting for a process it does not know. Elsewhere, and in other processes, do nothing."""
    parent = os.environ.get(PARENT, "")
    if not parent.isdecimal() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def baseline_config(config: Config, name: str, run: Path) -> Config:
    """The run's configuration with another source of learning, and the run's start policy in place of its model.

    UserError when `baseline_overrides` make it invalid.
    """
    tree = deep_merge(plain(config), _CHANGES[name])
    tree = deep_merge(tree, config.baseline_overrides.get(name, {}))
    tree["model"] |= {"path": str((run / START).resolve()), "build": None}
    tree["warm_start"]["updates"] = 0
    tree["evaluate"] |= {"baselines": [], "every": 0, "final": False}
    tree |= {"output_dir": str(run / "baselines"), "tensorboard": False, "wandb": False}
    words = [TRUST] if config.model.trust_remote_code else []
    return load_config(Config, tree, words, origin=f"baseline {name} (baseline_overrides.{name})")


def train_command(file: Path, name: str, *, trusted: bool) -> list[str]:
    """`airl-fast train FILE` for a process that trains a part of this one's work, which hands on what it trusts.

    Where this process does not import from the working directory (the script airl-fast does not), neither will that.
    """
    here = any(Path(path).resolve() == Path.cwd() for path in sys.path)
    command = [sys.executable, *([] if here else ["-P"]), "-m", "airl_fast"]
    command += ["train", str(file), "--run-name", name, "--resume", "auto"]
    return [*command, TRUST] if trusted else command


@contextmanager
def training(config: Config, run: Path) -> Iterator["Baselines"]:
    """Baselines train while the block runs, `evaluate.workers` at a time; leaving it by an error ends them."""
    baselines = Baselines(config, run)
    try:
        yield baselines
    except BaseException:
        baselines.stop()
        raise
    finally:
        baselines.close()


class Baselines:
    def __init__(self, config: Config, run: Path) -> None:
        self._config, self._run = config, run
        self._pool = ThreadPoolExecutor(max(config.evaluate.workers, 1))
        self._processes: list[subprocess.Popen] = []
        self._stopped = False
        self._jobs: dict[str, Future] = {}
        if config.evaluate.workers:
            self._submit()

    def wait(self, poll: Callable[[], None]) -> None:
        """Until every baseline is trained; `poll` is called meanwhile. UserError names the log of one that failed."""
        self._submit()
        for name, job in self._jobs.items():
            while not wait_for([job], timeout=0.2).done:
                poll()
            if job.result() != 0:
                raise UserError(f"baseline {name} failed; its log is {self._log(name)}.")

    def stop(self) -> None:
        self._stopped = True
        for process in self._processes:
            process.terminate()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        for name in self._config.evaluate.baselines:
            done = (self._run / "baselines" / name / POLICY).is_dir()
            if name not in self._jobs and not done:
                self._jobs[name] = self._pool.submit(self._train, name)

    def _train(self, name: str) -> int:
        if self._stopped:
            return 1
        folder = self._run / "baselines"
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.yaml"
        text = yaml.safe_dump(plain(baseline_config(self._config, name, self._run)), sort_keys=False)
        write_atomically(file, text)
        command = train_command(file, name, trusted=self._config.model.trust_remote_code)
        with self._log(name).open("ab") as log:
            environment = os.environ | {PARENT: str(os.getpid())}
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            self._processes.append(process)
            return process.wait()

    def _log(self, name: str) -> Path:
        return self._run / "baselines" / f"{name}.log"
