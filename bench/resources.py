"""Registers, shared memory, spills and theoretical occupancy of every Triton kernel on chips that need not be here.

    python -m bench.resources [--arch 80 90 100] [--family returns] [--only TEXT] [--json]

is `python -m airl_kernels.cross_compile` with its result as a table: every kernel at the launches it ships with,
compiled for A100 (80), H100 and H200 (90) and B200 (100). Needs triton, no GPU. Exit code 1 when a kernel spills or
asks for more shared memory than its chip has.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from airl_kernels.cross_compile import CHIPS, FAMILIES, KernelReport, cross_compile, shipped_launches

from bench.errors import BadArgument, Parser, run_command
from bench.report import table


def collect(archs: Sequence[int], families: Sequence[str], only: str = "") -> list[KernelReport]:
    """One report per launch, kernel and chip."""
    return [
        report
        for name, call in shipped_launches(tuple(families)).items()
        if only in name
        for arch in archs
        for report in cross_compile(name, call, arch)
    ]


def render(reports: Sequence[KernelReport]) -> str:
    """One line per launch and kernel; registers, shared memory and occupancy per chip side by side."""
    archs = list(dict.fromkeys(report.arch for report in reports))
    header = ["launch", "kernel", "warps"]
    for arch in archs:
        header += [f"sm_{arch} registers", "spills B", "shared KB", "occupancy"]
    lines: dict[tuple[str, str, int], dict[int, list[str]]] = {}
    for report in reports:
        cells = [
            str(report.registers),
            str(report.local_bytes),
            f"{report.shared_bytes / 1024:.1f}",
            f"{report.occupancy:.0%}",
        ]
        lines.setdefault((report.launch, report.kernel, report.num_warps), {})[report.arch] = cells
    rows = [
        [launch, kernel, str(warps), *(cell for arch in archs for cell in by_arch.get(arch, [""] * 4))]
        for (launch, kernel, warps), by_arch in lines.items()
    ]
    chips = ", ".join(f"sm_{arch} {CHIPS[arch].name}" for arch in archs)
    return f"{chips}; compiled, not run\n\n{table(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.resources", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.resources", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(CHIPS), default=list(CHIPS))
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, in place of the table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BadArgument("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it.")
    reports = collect(options.arch, options.family, options.only)
    if not reports:
        raise BadArgument(f"--only {options.only}: no launch has this in its name.")
    print("\n".join(json.dumps(asdict(report)) for report in reports) if options.json else render(reports))
    problems = [f"{r.launch} sm_{r.arch} {r.kernel}: {'; '.join(r.problems)}" for r in reports if r.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
