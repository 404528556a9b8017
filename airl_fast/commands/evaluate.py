"""`airl-fast eval`."""

import argparse
from pathlib import Path

from airl_fast.commands.settings import add_trust
from airl_fast.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("eval", help="evaluate a finished run: pass@k, reranking, localisation")
    evaluate.add_argument("run", help="directory of the run, such as runs/demo")
    evaluate.add_argument("--split", choices=("train", "dev", "test"), default="test")
    evaluate.add_argument("--k", default="1,3,5,10", help="comma-separated k of pass@k (default: 1,3,5,10)")
    evaluate.add_argument("--prompts", type=int, help="how many prompts (default: the run's evaluate.prompts)")
    evaluate.add_argument("--samples", type=int, help="samples per prompt (default: the run's evaluate.samples)")
    add_trust(evaluate)
    evaluate.set_defaults(command=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from airl_fast.evaluate.command import evaluate_command

    print(evaluate_command(
        Path(arguments.run), arguments.split, parse_ks(arguments.k), arguments.prompts, arguments.samples,
        trust_remote_code=arguments.trust_remote_code,
    ), end="")  # fmt: skip
    return 0


def parse_ks(text: str) -> tuple[int, ...]:
    """ "1,3,5" as numbers, ascending."""
    try:
        ks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        ks = (0,)
    if min(ks) < 1:
        raise UserError(f"--k {text}: give whole numbers from 1, such as 1,3,5,10.")
    return ks
