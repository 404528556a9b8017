"""Keep a visit's results and write the documents' tables from them: a table of a GPU comes from nowhere else.

    python -m bench.publish DIR     # DIR: what `make gpu-check` wrote, copied to bench/results/<device>/
    python -m bench.publish         # the tables anew, from bench/results/

Nothing is copied before all of it was read and its tables written. A visit that measured less than the one kept of the
same device takes its place only with --replace. One whose check failed is kept, and its tables begin with what failed.

Rewrites what lies between `<!-- results:NAME -->` and `<!-- end -->` in docs/benchmarks.md and README.md. Without a
folder in bench/results/ the sections say that no GPU has run this.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.errors import BadArgument, Parser, run_command
from bench.goals import PROVED, REFUTED, findings, findings_table
from bench.results import Row
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
    parser.add_argument("--replace", action="store_true", help="also where the kept visit measured more")
    options = parser.parse_args(arguments)
    if options.replace and options.folder is None:
        raise BadArgument("--replace: name the folder that is to take a kept one's place.")
    if options.folder is not None:
        print(f"kept in {keep(options.folder, RESULTS, replace=options.replace)}")
    texts = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    changed = {document: filled(text, RESULTS, str(document)) for document, text in texts.items()}
    for document, text in texts.items():
        new = changed[document]
        document.write_text(new, encoding="utf-8")
        print(f"{document.name}: {'changed' if new != text else 'as it was'}")
    return 0


def keep(folder: Path, results: Path, *, replace: bool = False) -> Path:
    """Copy a visit's folder to results/<device>, over an earlier one. A rehearsal is no result.

    What is wrong with it, or with another folder that the tables need, is found before anything is written. The kept
    folder itself is left as it is.
    """
    records = load(folder)
    target = results / _slug(folder, records)
    for other in _folders(results):
        if other != target:
            load(other)
    if folder.resolve() == target.resolve():
        return target
    if target.resolve() in folder.resolve().parents:
        raise BadArgument(f"{folder} lies in {target}, whose place it would take; move it elsewhere first.")
    if not replace:
        _refuse_less(folder, records, target)
    try:
        _copy(folder, target)
    except OSError as error:
        raise BadArgument(f"{target}: cannot be written ({error.strerror}); what was kept is still there.") from None
    return target


def load(folder: Path) -> list[dict]:
    """The records of one visit to a GPU, of which every table can be written. Raises BadArgument."""
    records = read(folder / "results.jsonl")
    found = of(records, kind="environment")
    if not found:
        raise BadArgument(f"{folder}: has no results.jsonl of `make gpu-check`; give the folder that it wrote.")
    if len(found) > 1:
        raise BadArgument(f"{folder}/results.jsonl is of {len(found)} visits, not of one; measure into a new folder.")
    if found[0].get("rehearsal"):
        raise BadArgument(f"{folder} is a rehearsal on a CPU, which says nothing of a GPU; give a visit's folder.")
    device = found[0].get("device")
    _slug(folder, records)
    try:
        rows = summary.rows_of(records)
        headers = [header["device"] for header in of(records, kind="update-header")]
        for write in (_gpu, _brief):
            write(records)
        summary.render(folder / "results.jsonl")
        wrong = [_named(row) for row in rows if not row.error <= row.budget]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BadArgument(
            f"{folder}/results.jsonl was written by another version, or by hand ({type(error).__name__}: {error}); "
            "give what this version's `make gpu-check` wrote."
        ) from None
    for other in (*(row.device for row in rows), *headers):
        if other != device:
            raise BadArgument(f"{folder}: a figure is of {other!r}, the visit of {device!r}; measure on one device.")
    if wrong:
        raise BadArgument(f"{folder}: {wrong[0]} is further off than its budget allows; a wrong result has no speed.")
    return records


def _named(row: Row) -> str:
    return f"{row.backend}'s {row.op} {row.mode} {row.shape}"


def _slug(folder: Path, records: list[dict]) -> str:
    """The device as the name of a folder. One without a name would be the folder of all results."""
    device = of(records, kind="environment")[0].get("device")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") if isinstance(device, str) else ""
    if not slug:
        raise BadArgument(f"{folder}/results.jsonl names no device ({device!r}); give what `make gpu-check` wrote.")
    return slug


def _refuse_less(folder: Path, records: list[dict], target: Path) -> None:
    """Of what is kept nothing but the number of its rows matters: it may be of an earlier version."""
    kept = read(target / "results.jsonl")
    before, now = (len(of(found, kind="row")) for found in (kept, records))
    if now < before:
        raise BadArgument(f"{folder} has {now} rows, {target} has {before}; give --replace to lose them.")
    missing = summary.unfinished(records)
    if kept and missing and not summary.unfinished(kept):
        raise BadArgument(
            f"{folder} was stopped before the end of {', '.join(missing)}, {target} is complete; "
            "give --replace to keep it all the same."
        )


def _copy(folder: Path, target: Path) -> None:
    """Beside the target first, then in its place, so that whatever goes wrong loses nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        for name in ("results.jsonl", "chunk_sweep.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        # Anew: a visit that was killed has none, or one of an earlier stage.
        (new / "summary.md").write_text(summary.render(new / "results.jsonl"), encoding="utf-8")
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


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
        records = load(folder)
        (environment,) = of(records, kind="environment")
        title = ", ".join(f"{key} {environment.get(key)}" for key in ("commit", "torch", "cuda", "triton"))
        parts.append(f"**{environment['device']}** ({title}; bench/results/{folder.name})")
        if failed := summary.failing(records):
            parts.append(f"**The check of this visit FAILED. {'. '.join(failed)}.**")
        parts += write(records)
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
