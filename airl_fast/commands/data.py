"""`airl-fast data`."""

import argparse
from collections.abc import Sequence

from airl_fast.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="look at prompts, demonstrations and perturbations").add_subparsers(
        required=True, metavar="prepare|validate|preview|perturb"
    )
    for name, text in (
        ("prepare", "write a split of a task as JSON Lines"),
        ("validate", "check a JSON Lines file, or every split of a task"),
        ("preview", "print a few prompts with their demonstrations"),
        ("perturb", "print a few perturbed demonstrations with what changed, or write them as labelled traces"),
    ):
        action = data.add_parser(name, help=text)
        action.add_argument("task", help="a task's name, or a JSON Lines file")
        action.add_argument(
            "words", nargs="*", default=[], metavar="key=value", help="path=FOLDER, or an option of the task"
        )
        action.add_argument("--split", choices=("train", "dev", "test", "warmstart"), default="train")
        action.add_argument("-n", type=int, help="how many to print (default: 3), or at most to write (default: all)")
        action.add_argument("-o", "--out", help="file to write (prepare, perturb)")
        if name == "perturb":
            action.add_argument("--copies", type=int, help="with -o: perturbations of each demonstration (default: 1)")
            action.add_argument("--seed", type=int, help="with -o: of what is changed (default: 0)")
            action.add_argument("--originals", action="store_true", help="with -o: also write the demonstrations as is")
        action.set_defaults(command=_data, action=name)


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
    elif arguments.out is not None:
        copies = 1 if arguments.copies is None else arguments.copies
        if copies < 1:
            raise UserError(f"--copies {copies}: give a whole number from 1.")
        written = inspection.write_perturbed(
            task, arguments.split, arguments.out, arguments.n,
            copies=copies, seed=arguments.seed or 0, originals=arguments.originals,
        )  # fmt: skip
        print(
            f"{written.perturbed} perturbed demonstrations and {written.originals} as they are written to "
            f"{arguments.out}; {written.unchanged} perturbations applied to nothing"
        )
    else:
        if arguments.originals or arguments.copies is not None or arguments.seed is not None:
            raise UserError("data perturb: --copies, --seed and --originals say what is written; add -o FILE.")
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
