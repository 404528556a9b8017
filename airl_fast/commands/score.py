"""`airl-fast score`."""

import argparse
from pathlib import Path

from airl_fast.commands.rerank import tell
from airl_fast.commands.settings import add_trust
from airl_fast.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser("score", help="token, step and trace rewards of a file's traces, as JSON Lines")
    add_input(score)
    score.add_argument("-o", "--out", metavar="FILE", help=".jsonl or .jsonl.gz (default: standard output)")
    score.add_argument(
        "--only", choices=("trace", "steps", "tokens"), help="write the trace's rewards alone, or with one of the two"
    )
    score.add_argument("--locate", action="store_true", help="also name the step that looks wrong first")
    add_naming(score)
    score.set_defaults(command=_score)


def add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory of the run, such as runs/demo, or its final/discriminator")
    parser.add_argument(
        "file", help="traces as JSON Lines (docs/scoring.md), gzip by extension; - reads standard input"
    )
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--too-long", choices=("error", "drop"), default="error",
        help="a trace that exceeds a model's context: stop (default), or leave it out and count it",
    )  # fmt: skip
    parser.add_argument("--allow-training-prompts", action="store_true", help="also judge what the run was trained on")
    parser.add_argument("--part-tokens", type=int, metavar="N", help="tokens read before they are scored together")
    add_trust(parser)


def add_naming(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rule", choices=("largest_drop", "argmin", "first_below"),
        help="how a step is named (default: the run's evaluate.localise)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, metavar="X",
        help="of rule first_below, a step's reward (default: calibrated on perturbed training demonstrations)",
    )  # fmt: skip


def input_path(name: str) -> Path:
    """UserError for a file that is not there, before a model is loaded for it."""
    if name == "-":
        return Path("/dev/stdin")
    path = Path(name)
    if not path.exists() or path.is_dir():
        raise UserError(f"{name}: no such file; give traces as JSON Lines, or - for standard input.")
    return path


def check_part(tokens: int | None) -> int | None:
    if tokens is not None and tokens < 1:
        raise UserError(f"--part-tokens {tokens}: give a whole number from 1.")
    return tokens


def _score(arguments: argparse.Namespace) -> int:
    file = input_path(arguments.file)
    tokens = check_part(arguments.part_tokens)

    from airl_fast.score.line_writer import check_lines_output
    from airl_fast.score.score_command import ScoreOptions, score_command

    out = check_lines_output(arguments.out, [file], force=arguments.force)
    options = ScoreOptions(
        only=arguments.only,
        locate=arguments.locate,
        rule=arguments.rule,
        threshold=arguments.threshold,
        drop_too_long=arguments.too_long != "error",
        allow_training_prompts=arguments.allow_training_prompts,
        trust_remote_code=arguments.trust_remote_code,
        tokens=tokens,
    )
    score_command(Path(arguments.run), file, out, options, tell)
    return 0
