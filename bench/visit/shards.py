"""Named cases spread over processes; a process that dies is started again without the cases it has run.

An illegal access leaves a CUDA context in which every later call fails. So a process that finds its context dead ends
with `DEAD`, and the cases after the one that broke it run in a new process. A case whose process died under it is
recorded as failed.
"""

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.tied import tied
from bench.visit.records import MOST_TEXT, append, of, read

DEAD = 70
MOST_RESTARTS = 5


def run_shards(
    command: Callable[[int], Sequence[str]], count: int, records: Path, stage: str, ends: tuple[int, ...] = (0,)
) -> int:
    """Start `command(shard)` for every shard and wait; 1 when a case failed or a process never came to its end.

    ends: exit codes of a process that ran all its cases. None outlives this one.
    """
    processes = {shard: subprocess.Popen(tied(command(shard))) for shard in range(count)}
    restarts, broken = dict.fromkeys(processes, 0), False
    while processes:
        time.sleep(0.1)
        for shard, process in list(processes.items()):
            code = process.poll()
            if code is None:
                continue
            del processes[shard]
            if code in ends:
                continue
            _close_open_case(records, stage, shard, code)
            restarts[shard] += 1
            if restarts[shard] <= MOST_RESTARTS:
                processes[shard] = subprocess.Popen(tied(command(shard)))
            else:
                broken = True
                print(f"shard {shard} died {restarts[shard]} times and is given up", file=sys.stderr)
    failed = any(not r["passed"] for r in of(read(records), stage, "case"))
    return int(broken or failed)


def _close_open_case(records: Path, stage: str, shard: int, code: int) -> None:
    mine = [r for r in of(read(records), stage) if r.get("shard") == shard]
    ended = {r["name"] for r in mine if r["kind"] == "case"}
    for record in mine:
        if record["kind"] == "case-begin" and record["name"] not in ended:
            error = f"the process died with exit code {code}"
            append(records, stage, "case", name=record["name"], shard=shard, passed=False, seconds=None, error=error)
            return
    if not ended:  # it never came to a case: counted as one, so that it is seen
        error = f"the process died with exit code {code} before its first case; see log.txt"
        append(records, stage, "case", name=f"shard {shard}", shard=shard, passed=False, seconds=None, error=error)


def pending(names: Sequence[str], shard: int, count: int, records: Path, stage: str) -> list[str]:
    """The names of this shard that no record closes yet."""
    ended = {r["name"] for r in of(read(records), stage, "case")}
    return [name for name in names[shard::count] if name not in ended]


def run_cases(
    names: Iterable[str], run: Callable[[str], None], records: Path, stage: str, shard: int, alive: Callable[[], bool]
) -> int:
    """Run each case, keeping its traceback; `DEAD` as soon as the device answers no more."""
    for name in names:
        append(records, stage, "case-begin", name=name, shard=shard)
        start, error = time.monotonic(), None
        try:
            run(name)
        except Exception:
            error = traceback.format_exc()[-MOST_TEXT:]
        seconds = round(time.monotonic() - start, 2)
        append(records, stage, "case", name=name, shard=shard, passed=error is None, seconds=seconds, error=error)
        print(f"{'passed' if error is None else 'FAILED'} {name} ({seconds} s)", flush=True)
        if error is not None:
            print(error, flush=True)
            if not alive():
                return DEAD
    return 0


def device_is_alive() -> bool:
    """Whether the CUDA context of this process is still of use; True where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda")  # refused for good after a capture that could not end
        return torch.cuda.current_stream() == torch.cuda.default_stream()
    except Exception:
        return False
