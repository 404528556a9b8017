"""`airl-fast export`."""

import argparse
from pathlib import Path

from airl_fast.commands.settings import add_trust


def add(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write a run's policy or discriminator as an adapter or a plain model")
    export.add_argument("run", help="directory of the run, such as runs/demo")
    export.add_argument("--format", choices=("adapter", "merged"), default="merged", help="(default: merged)")
    export.add_argument("--what", choices=("policy", "discriminator"), default="policy", help="(default: policy)")
    export.add_argument("-o", "--out", help="directory to write; must not exist (default: RUN/export/WHAT-FORMAT)")
    add_trust(export)
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from airl_fast.export import export

    out = None if arguments.out is None else Path(arguments.out)
    trust = arguments.trust_remote_code
    print(export(Path(arguments.run), arguments.what, arguments.format, out, trust_remote_code=trust))
    return 0
