"""`airl-fast transfer`."""

import argparse
from pathlib import Path

from airl_fast.commands.rerank import add_common, check_counts, tell


def add(commands: argparse._SubParsersAction) -> None:
    transfer = commands.add_parser("transfer", help="a run's frozen reward on other tasks' or other models' traces")
    transfer.add_argument("run", help="directory of the run whose reward it is")
    transfer.add_argument("words", nargs="*", default=[], metavar="key=value", help="path=DIR or options of the task")
    transfer.add_argument(
        "--task", action="append", default=[], metavar="NAME[:key=value,…]",
        help="a task, as gsm8k:path=DIR (default: the run's); repeat it for a matrix",
    )  # fmt: skip
    transfer.add_argument(
        "--policy", action="append", default=[],
        help="start (default), airl, sft, grpo, a run or a model directory; repeat it for a matrix",
    )  # fmt: skip
    transfer.add_argument("--split", choices=("train", "dev", "test"), default="test")
    transfer.add_argument("--prompts", type=int, help="how many prompts (default: the run's evaluate.prompts)")
    transfer.add_argument("--n", type=int, help="samples per prompt (default: the run's evaluate.samples)")
    transfer.add_argument("--max-new-tokens", type=int, help="of a sample (default: the run's rollout.max_new_tokens)")
    transfer.add_argument("--json", metavar="FILE", help="default: RUN/eval/transfer-….json")
    transfer.add_argument("--png", metavar="FILE", help="the heat map (default of a matrix: beside the JSON)")
    add_common(transfer)
    transfer.set_defaults(command=_transfer)


def _transfer(arguments: argparse.Namespace) -> int:
    from airl_fast.evaluate.outputs import check_output, write_json
    from airl_fast.evaluate.plots import save_figure
    from airl_fast.evaluate.transfer import Options, transfer
    from airl_fast.evaluate.transfer_view import as_document, figure, render

    check_counts(n=arguments.n, prompts=arguments.prompts, **{"max-new-tokens": arguments.max_new_tokens})
    document, picture = check_output("--json", arguments.json), check_output("--png", arguments.png, (".png",))
    run = Path(arguments.run)
    options = Options(
        tasks=tuple(arguments.task),
        words=tuple(arguments.words),
        policies=tuple(arguments.policy) or ("start",),
        split=arguments.split,
        prompts=arguments.prompts,
        samples=arguments.n,
        max_new_tokens=arguments.max_new_tokens,
        too_long=arguments.too_long,
        allow_training_prompts=arguments.allow_training_prompts,
        trust_remote_code=arguments.trust_remote_code,
    )
    cells = transfer(run, options, tell)
    print(render(cells), end="")
    target = document or run / "eval" / f"{_name(options.split, cells)}.json"
    write_json(target, {"run": str(run), "split": options.split, "cells": as_document(cells)})
    print(f" {target}")
    if picture is not None or len(cells) > 1:
        print(f" {save_figure(figure(cells), picture or target.with_suffix('.png'))}")
    return 0


def _name(split: str, cells: tuple) -> str:
    """Of the files: split, policies and tasks, or how many of them where that would be long."""
    parts = ["transfer", split]
    for kind, names in (("policies", [c.policy for c in cells]), ("tasks", [c.task for c in cells])):
        names = list(dict.fromkeys("".join(x if x.isalnum() or x in "_." else "-" for x in name) for name in names))
        joined = "+".join(names)
        parts.append(joined if len(joined) <= 60 else f"{len(names)}-{kind}")
    return "-".join(parts)
