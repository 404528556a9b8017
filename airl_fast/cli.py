"""The command line `airl-fast`. A mistake of the user's ends in one sentence and exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from airl_fast.errors import UserError

PRESETS = Path(__file__).parent / "presets"


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

    train = commands.add_parser("train", help="train a preset or a configuration file, then evaluate it")
    _add_config(train)
    train.add_argument("--run-name", help="name of the run's directory (default: the preset's name and the seed)")
    train.add_argument("--resume", default="never", metavar="auto|never|PATH", help="continue a run's checkpoint")
    train.add_argument("--dry-run", action="store_true", help="check configuration, data and model, then stop")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="evaluate a finished run: pass@k, reranking, localisation")
    evaluate.add_argument("run", help="directory of the run, such as runs/demo")
    evaluate.add_argument("--split", choices=("train", "dev", "test"), default="test")
    evaluate.add_argument("--k", default="1,3,5,10", help="comma-separated k of pass@k (default: 1,3,5,10)")
    evaluate.add_argument("--prompts", type=int, help="how many prompts (default: the run's evaluate.prompts)")
    evaluate.add_argument("--samples", type=int, help="samples per prompt (default: the run's evaluate.samples)")
    evaluate.set_defaults(command=_eval)

    export = commands.add_parser("export", help="write a run's policy or discriminator as an adapter or a plain model")
    export.add_argument("run", help="directory of the run, such as runs/demo")
    export.add_argument("--format", choices=("adapter", "merged"), default="merged", help="(default: merged)")
    export.add_argument("--what", choices=("policy", "discriminator"), default="policy", help="(default: policy)")
    export.add_argument("-o", "--out", help="directory to write; must not exist (default: RUN/export/WHAT-FORMAT)")
    export.set_defaults(command=_export)

    model = commands.add_parser("make-model", help="write the small model and tokenizer of a preset to a directory")
    _add_config(model)
    model.add_argument("-o", "--out", required=True, help="directory to write; must not exist")
    model.set_defaults(command=_make_model)

    data = commands.add_parser("data", help="look at prompts, demonstrations and perturbations").add_subparsers(
        required=True, metavar="prepare|validate|preview|perturb"
    )
    for name, text in (
        ("prepare", "write a split of a task as JSON Lines"),
        ("validate", "check a JSON Lines file, or every split of a task"),
        ("preview", "print a few prompts with their demonstrations"),
        ("perturb", "print a few perturbed demonstrations with what changed"),
    ):
        action = data.add_parser(name, help=text)
        action.add_argument("task", help="a task's name, or a JSON Lines file")
        action.add_argument(
            "words", nargs="*", default=[], metavar="key=value", help="path=FOLDER, or an option of the task"
        )
        action.add_argument("--split", choices=("train", "dev", "test", "warmstart"), default="train")
        action.add_argument("-n", type=int, help="how many to print (default: 3), or at most to write (default: all)")
        action.add_argument("-o", "--out", help="file to write (prepare)")
        action.set_defaults(command=_data, action=name)

    bench = commands.add_parser("bench", help="measure the fused operations, or a training step")
    bench.add_argument("name", metavar="ops|step|roofline|resources")
    bench.add_argument("flags", nargs=argparse.REMAINDER, help="passed on; see `airl-fast bench ops --help`")
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser("doctor", help="say what this machine has, and what would run on what")
    doctor.set_defaults(command=_doctor)
    presets = commands.add_parser("presets", help="list the presets")
    presets.set_defaults(command=_presets)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a preset (`airl-fast presets`) or a YAML file")
    parser.add_argument("words", nargs="*", default=[], metavar="a.b=v", help="values that replace the configuration's")


def _version() -> str:
    return f"airl-fast {version('airl-fast')}"


def _load(arguments: argparse.Namespace):
    from airl_fast.config import Config
    from airl_fast.overrides import find_preset, load_config

    source, origin = find_preset(arguments.config, PRESETS)
    return load_config(Config, source, arguments.words, origin=origin)


def _train(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
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


def _eval(arguments: argparse.Namespace) -> int:
    from airl_fast.evaluate.command import evaluate_command

    print(evaluate_command(
        Path(arguments.run), arguments.split, _ks(arguments.k), arguments.prompts, arguments.samples
    ), end="")  # fmt: skip
    return 0


def _ks(text: str) -> tuple[int, ...]:
    try:
        ks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        ks = (0,)
    if min(ks) < 1:
        raise UserError(f"--k {text}: give whole numbers from 1, such as 1,3,5,10.")
    return ks


def _export(arguments: argparse.Namespace) -> int:
    from airl_fast.export import export

    out = None if arguments.out is None else Path(arguments.out)
    print(export(Path(arguments.run), arguments.what, arguments.format, out))
    return 0


def _make_model(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    from airl_fast.preflight import make_model

    print(make_model(config, Path(arguments.out)))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from airl_fast.data import inspection
    from airl_fast.data.task import make_task, task_names

    if arguments.task not in task_names() and arguments.task.endswith((".jsonl", ".jsonl.gz", ".json")):
        if arguments.action == "validate":
            report = inspection.validate_file(arguments.task)
            print(report)
            return 2 if report.problems else 0
        task = make_task("jsonl", path=arguments.task)
    else:
        task = make_task(arguments.task, **_options(arguments.words))
    if arguments.n is not None and arguments.n < 1:
        raise UserError(f"-n {arguments.n}: give a whole number from 1.")
    if arguments.action == "prepare":
        if arguments.out is None:
            raise UserError("data prepare: name the file to write with -o FILE.")
        rows = inspection.prepare(task, arguments.split, arguments.out, arguments.n)
        print(f"{rows} rows written to {arguments.out}")
    elif arguments.action == "validate":
        print("\n".join(map(str, inspection.validate_task(task))))
    elif arguments.action == "preview":
        print(inspection.preview(task, arguments.split, arguments.n or 3))
    else:
        print(inspection.preview_perturbations(task, arguments.split, arguments.n or 3))
    return 0


def _options(words: Sequence[str]) -> dict[str, object]:
    from airl_fast.overrides import parse_yaml

    options: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word}: options are written key=value, such as path=data/gsm8k.")
        options[key] = parse_yaml(value, origin=word) if key != "path" else value
    return options


def _bench(arguments: argparse.Namespace) -> int:
    from airl_fast.benchmark import run_benchmark

    return run_benchmark(arguments.name, arguments.flags)


def _doctor(arguments: argparse.Namespace) -> int:
    from airl_fast import doctor

    report = doctor.collect()
    print(doctor.render(report))
    return report.exit_status


def _presets(arguments: argparse.Namespace) -> int:
    paths = sorted(PRESETS.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    for path in paths:
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{path.stem:{width}} {first}")
    return 0
