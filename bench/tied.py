"""Processes that end with the one that started them, however that ends: none may go on beside the next visit.

As a script, `tied.py PID command ...` becomes the command. The kernel keeps what it asked for across that, which no
argument of `subprocess` does without running Python between fork and exec, where threads may hold locks.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SCRIPT = os.path.abspath(__file__)  # the command may be started in another folder
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def tied(command: Sequence[str]) -> list[str]:
    """The command, to be started by this process, whose end it does not outlive. -I: nothing of bench/ is imported."""
    return [sys.executable, "-I", "-S", _SCRIPT, str(os.getpid()), *command]


def end_with_parent(parent: int) -> None:
    """On Linux this process is killed when the one that started it ends, whose id is `parent`."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise SystemExit, so that every `finally` runs; a second one does not disturb those.

    What was ignored before, as under nohup, stays so.
    """

    def leave(number: int, _frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # `timeout make` sends it twice, from either
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in _ENDS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as problem:
        sys.exit(f"{sys.argv[2]}: {problem.strerror}")
