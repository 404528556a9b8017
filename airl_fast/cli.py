"""The command line `airl-fast`. A mistake of the user's ends in one sentence and exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from airl_fast.commands import (
    ablate,
    compare,
    data,
    evaluate,
    export,
    generate,
    localize,
    machine,
    report,
    rerank,
    score,
    serve,
    train,
    transfer,
)
from airl_fast.errors import UserError

# In the order that `airl-fast --help` lists them.
COMMANDS = (
    train,
    ablate,
    evaluate,
    report,
    score,
    localize,
    rerank,
    transfer,
    compare,
    generate,
    export,
    serve,
    data,
    machine,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Imports happen in the commands, so that `--help` answers at once."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and data are local directories; nothing is ever fetched
    try:
        arguments = _parse(argv)
        return arguments.command(arguments)
    except UserError as error:
        print(f"airl-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training, where nothing has to be saved
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, as for every other mistake, in place of the usage."""
        raise UserError(f"{message}; see `{self.prog} --help`.")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes all overrides in one place only; `train tiny --run-name x seed=1 --dry-run` is fine too."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words = [*arguments.words, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="airl-fast", description="Learn reasoning rewards from demonstrations by adversarial inverse RL."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for module in COMMANDS:
        module.add(commands)
    return parser


def _version() -> str:
    return f"airl-fast {version('airl-fast')}"
