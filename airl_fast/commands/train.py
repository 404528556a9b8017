"""`airl-fast train`, `make-model` and `presets`."""

import argparse
import sys
from pathlib import Path

from airl_fast.commands.settings import PRESETS, add_config, load


def add(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("train", help="train a preset or a configuration file, then evaluate it")
    add_config(train)
    train.add_argument("--run-name", help="name of the run's directory (default: the preset's name and the seed)")
    train.add_argument("--resume", default="never", metavar="auto|never|PATH", help="continue a run's checkpoint")
    train.add_argument("--dry-run", action="store_true", help="check configuration, data and model, then stop")
    train.set_defaults(command=_train)

    model = commands.add_parser("make-model", help="write the small model and tokenizer of a preset to a directory")
    add_config(model)
    model.add_argument("-o", "--out", required=True, help="directory to write; must not exist")
    model.set_defaults(command=_make_model)

    presets = commands.add_parser("presets", help="list the presets")
    presets.set_defaults(command=_presets)


def _train(arguments: argparse.Namespace) -> int:
    config = load(arguments)
    if arguments.dry_run:
        from airl_fast.preflight import dry_run

        print(dry_run(config))
        return 0
    from airl_fast.baselines import end_with_parent
    from airl_fast.evaluate.summary import render_table
    from airl_fast.run import Interrupted, train_run

    end_with_parent()
    name = arguments.run_name or f"{Path(arguments.config).stem}-seed{config.seed}"
    try:
        summary = train_run(config, name, resume=arguments.resume)
    except Interrupted as stopped:
        print(f"airl-fast: {stopped}", file=sys.stderr)
        return 130
    if summary is not None:
        print(render_table(summary), end="")
    print(f"run directory: {Path(config.output_dir) / name}")
    return 0


def _make_model(arguments: argparse.Namespace) -> int:
    config = load(arguments)
    from airl_fast.preflight import make_model

    print(make_model(config, Path(arguments.out)))
    return 0


def _presets(arguments: argparse.Namespace) -> int:
    paths = sorted(PRESETS.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    for path in paths:
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{path.stem:{width}} {first}")
    return 0
