"""`airl-fast report`."""

import argparse
from pathlib import Path

from airl_fast.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="write one HTML file to look at runs: curves, figures, traces")
    report.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, such as runs/demo")
    report.add_argument("-o", "--out", help="the file (default: RUN/report.html, for several runs report.html)")
    report.add_argument("--split", choices=("train", "dev", "test"), default="test", help="of the figures shown")
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from airl_fast.report.page import write_report

    runs = [Path(run) for run in arguments.runs]
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    output = default if arguments.out is None else Path(arguments.out)
    if output.is_dir() or (arguments.out is not None and not output.parent.is_dir()):
        raise UserError(f"-o {arguments.out}: give the name of a file in a directory that exists.")
    read = write_report(runs, output, arguments.split)
    for sentence in (sentence for run in read for sentence in run.missing):
        print(sentence)
    traces = sum(len(run.traces) for run in read)
    print(f"{output}: {len(read)} run(s), {traces} traces, {output.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0
