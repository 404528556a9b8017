"""How a benchmark command ends on bad arguments: one sentence and exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class BadArgument(Exception):
    """One sentence that names the argument and what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArgument(f"{message}; see `{self.prog} --help`.")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def run_command(name: str, command: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None) -> int:
    try:
        return command(arguments)
    except BadArgument as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
