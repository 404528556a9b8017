"""`airl-fast localize`."""

import argparse
from pathlib import Path

from airl_fast.commands.rerank import tell
from airl_fast.commands.score import add_input, add_naming, check_part, input_path


def add(commands: argparse._SubParsersAction) -> None:
    localize = commands.add_parser("localize", help="name the first wrong step of a file's traces, and how often right")
    add_input(localize)
    localize.add_argument("-o", "--out", metavar="FILE", help="the predictions, .jsonl or .jsonl.gz, one line a trace")
    localize.add_argument("--json", metavar="FILE", help="the figures of the tables")
    add_naming(localize)
    localize.set_defaults(command=_localize)


def _localize(arguments: argparse.Namespace) -> int:
    file = input_path(arguments.file)
    tokens = check_part(arguments.part_tokens)

    from airl_fast.errors import UserError
    from airl_fast.evaluate.outputs import check_output
    from airl_fast.score.line_writer import check_lines_output
    from airl_fast.score.localise_command import localise_command
    from airl_fast.score.score_command import Options

    if arguments.out == "-":
        raise UserError("-o -: standard output is for the tables; name a file for the predictions.")
    out = check_lines_output(arguments.out, [file], force=arguments.force)
    document = check_output("--json", arguments.json)
    for taken in (file, out):
        if document is not None and taken is not None and document.resolve() == taken.resolve():
            raise UserError(f"--json {arguments.json}: this is the input or -o; choose another name.")
    options = Options(
        rule=arguments.rule,
        threshold=arguments.threshold,
        drop_too_long=arguments.too_long != "error",
        allow_training_prompts=arguments.allow_training_prompts,
        trust_remote_code=arguments.trust_remote_code,
        tokens=tokens,
    )
    print(localise_command(Path(arguments.run), file, out, document, options, tell), end="")
    return 0
