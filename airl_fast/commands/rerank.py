"""`airl-fast rerank`."""

import argparse
import sys
from pathlib import Path

from airl_fast.commands.evaluate import parse_ks
from airl_fast.commands.settings import add_trust
from airl_fast.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    rerank = commands.add_parser("rerank", help="pick one of N samples by a run's reward, beside votes and chance")
    rerank.add_argument("run", help="directory of the run, such as runs/demo")
    rerank.add_argument("file", nargs="?", help="traces as JSON Lines in place of fresh samples, grouped by prompt")
    rerank.add_argument("--n", type=int, help="samples to pick from (default: the run's evaluate.samples)")
    rerank.add_argument("--k", help="comma-separated k of pass@k|N (default: 1,3,5)")
    rerank.add_argument("--policy", default="start", help="start, airl, sft, grpo, another run or a model directory")
    rerank.add_argument("--split", choices=("train", "dev", "test"), default="test")
    rerank.add_argument("--prompts", type=int, help="how many prompts (default: the run's evaluate.prompts)")
    add_common(rerank)
    rerank.set_defaults(command=_rerank)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--too-long", choices=("error", "drop"), help="default: the run's data.too_long")
    parser.add_argument("--allow-training-prompts", action="store_true", help="also judge what the run was trained on")
    add_trust(parser)


def check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give a whole number from 1.")


def tell(text: str) -> None:
    """Progress goes to standard error, so that standard output is the tables alone."""
    print(text, file=sys.stderr, flush=True)


def _rerank(arguments: argparse.Namespace) -> int:
    from airl_fast.evaluate.rerank_command import Options, rerank_command

    check_counts(n=arguments.n, prompts=arguments.prompts)
    options = Options(
        policy=arguments.policy,
        split=arguments.split,
        prompts=arguments.prompts,
        samples=arguments.n,
        ks=None if arguments.k is None else parse_ks(arguments.k),
        too_long=arguments.too_long,
        allow_training_prompts=arguments.allow_training_prompts,
        trust_remote_code=arguments.trust_remote_code,
    )
    file = None if arguments.file is None else Path(arguments.file)
    print(rerank_command(Path(arguments.run), file, options, tell), end="")
    return 0
