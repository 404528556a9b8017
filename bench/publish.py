"""Keep a visit's results and write the documents' tables from them: a table of a GPU comes from nowhere else.

    python -m bench.publish DIR     # DIR: what `make gpu-check` wrote, copied to bench/results/<device>/
    python -m bench.publish         # the tables anew, from bench/results/

Rewrites what lies between `<!-- results:NAME -->` and `<!-- end -->` in docs/benchmarks.md and README.md. Without a
folder in bench/results/ the sections say that no GPU has run this.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.errors import BadArgument, Parser, run_command
from bench.goals import PROVED, REFUTED, findings, findings_table
from bench.visit import summary
from bench.visit.records import of, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
NOTHING = "**No GPU has run this yet.**"
_MARKED = re.compile(r"(<!-- results:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.publish", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser: argparse.ArgumentParser = Parser(prog="python -m bench.publish", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="what `make gpu-check OUT=folder` wrote")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        print(f"kept in {keep(options.folder, RESULTS)}")
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        new = filled(text, RESULTS, str(document))
        document.write_text(new, encoding="utf-8")
        print(f"{document.name}: {'changed' if new != text else 'as it was'}")
    return 0


def keep(folder: Path, results: Path) -> Path:
    """Copy a visit's folder to results/<device>, over an earlier one. A rehearsal is no result."""
    environment = _environment(folder)
    if environment.get("rehearsal"):
        raise BadArgument(f"{folder} is a rehearsal on a CPU, which says nothing of a GPU; give a visit's folder.")
    target = results / re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("results.jsonl", "summary.md", "chunk_sweep.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    return target


def _environment(folder: Path) -> dict:
    found = of(read(folder / "results.jsonl"), kind="environment")
    if not found:
        raise BadArgument(f"{folder}: has no results.jsonl of `make gpu-check`; give the folder that it wrote.")
    return found[0]


def filled(text: str, results: Path, name: str) -> str:
    """The document with every marked section as `results` has it. Raises BadArgument for a section nobody writes."""

    def section(match: re.Match) -> str:
        writer = SECTIONS.get(match[2])
        if writer is None:
            raise BadArgument(f"{name}: no section results:{match[2]}; name one of {', '.join(SECTIONS)}.")
        return f"{match[1]}{writer(results)}\n{match[3]}"

    return _MARKED.sub(section, text)


def _folders(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.glob("*/results.jsonl"))


def _by_device(results: Path, write: Callable[[list[dict]], list[str]], nothing: str) -> str:
    parts = []
    for folder in _folders(results):
        records, environment = read(folder / "results.jsonl"), _environment(folder)
        title = ", ".join(f"{key} {environment.get(key)}" for key in ("commit", "torch", "cuda", "triton"))
        parts += [f"**{environment['device']}** ({title}; bench/results/{folder.name})", *write(records)]
    return "\n\n".join(parts) if parts else nothing


def _gpu(records: list[dict]) -> list[str]:
    found = findings(summary.rows_of(records), summary.updates_of(records))
    return [
        findings_table(found),
        summary.stages_table(records),
        summary.benchmark(records),
        summary.updates(records),
        summary.steps(records),
    ]


def _brief(records: list[dict]) -> list[str]:
    found = findings(summary.rows_of(records), summary.updates_of(records))
    counts = {state: sum(f.state == state for f in found) for state in (PROVED, REFUTED)}
    rest = len(found) - sum(counts.values())
    sentence = f"Of {len(found)} goals {counts[PROVED]} are proved, {counts[REFUTED]} refuted, {rest} not measured."
    return [sentence, findings_table([f for f in found if f.state in counts])]


SECTIONS: dict[str, Callable[[Path], str]] = {
    "gpu": lambda results: _by_device(
        results,
        _gpu,
        f"{NOTHING} Every time below is of a CPU, or a prediction that says so. `make gpu-check "
        "OUT=dir`\nmeasures, and `python -m bench.publish dir` writes its tables here.",
    ),
    "gpu-brief": lambda results: _by_device(
        results,
        _brief,
        "No GPU has run this version: the Triton kernels are checked under Triton's interpreter and compiled for "
        "sm_80, sm_90\nand sm_100, and no speed is claimed for them. `make gpu-check OUT=dir` is what to run on one.",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
