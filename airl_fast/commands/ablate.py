"""`airl-fast ablate`."""

import argparse
from pathlib import Path

from airl_fast.commands.settings import PRESETS, add_trust, words_of
from airl_fast.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    ablate = commands.add_parser("ablate", help="train a grid of variants on several seeds and compare them")
    ablate.add_argument("grid", help="tiny, or a YAML file (see airl_fast/presets/ablations/tiny.yaml)")
    ablate.add_argument("words", nargs="*", default=[], metavar="a.b=v", help="values that all runs set")
    ablate.add_argument("--seeds", help="comma-separated (default: the grid's)")
    ablate.add_argument("--only", action="append", default=[], metavar="TOPIC", help="a topic of the grid; may repeat")
    ablate.add_argument("--processes", type=int, default=2, help="runs trained at once (default: 2)")
    ablate.add_argument("-o", "--out", help="directory of the runs, table and figure (default: runs/ablate-GRID)")
    add_trust(ablate)
    ablate.set_defaults(command=_ablate)


def _ablate(arguments: argparse.Namespace) -> int:
    from airl_fast.ablate.command import ablate

    if arguments.processes < 1:
        raise UserError(f"--processes {arguments.processes}: give a whole number from 1.")
    root = Path(arguments.out or f"runs/ablate-{Path(arguments.grid).stem}")
    table, failed = ablate(
        arguments.grid,
        root,
        PRESETS,
        words=words_of(arguments),
        topics=arguments.only,
        seeds=_seeds(arguments.seeds),
        processes=arguments.processes,
    )
    print(table, end="")
    return 1 if failed else 0


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: give different whole numbers from 0, such as 0,1,2.")
    return seeds
