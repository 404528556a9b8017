"""`airl-fast compare`."""

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser("compare", help="finished runs side by side: what differs, and what each reached")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs; the first is compared with")
    compare.add_argument("--by-seed", action="store_true", help="a row for every run, also where only the seed differs")
    compare.add_argument("--split", choices=("train", "dev", "test"), help="the figures that `eval --split` wrote")
    compare.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    compare.add_argument("--json", metavar="FILE", help="write every figure, one run at a time too")
    compare.add_argument("--png", metavar="FILE", help="draw a forest plot")
    compare.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from airl_fast.evaluate.compare import aggregate, as_document, figure, read_runs, render
    from airl_fast.evaluate.outputs import check_output, write_json
    from airl_fast.evaluate.plots import save_figure

    document, picture = check_output("--json", arguments.json), check_output("--png", arguments.png, (".png",))
    rows = aggregate(read_runs([Path(run) for run in arguments.runs], arguments.split), by_seed=arguments.by_seed)
    print(render(rows, markdown=arguments.markdown), end="")
    if document is not None:
        write_json(document, as_document(rows))
    if picture is not None:
        save_figure(figure(rows), picture)
    return 0
