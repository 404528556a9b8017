"""The documents' tables of a GPU are what bench/results/ says, and nothing else can be there."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench import publish
from bench.errors import BadArgument
from bench.visit import summary
from bench.visit.records import append
from tests.bench.rows import ROW


@pytest.mark.parametrize("document", publish.DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_results(document):
    """After a change of the results or of a table: python -m bench.publish."""
    text = document.read_text(encoding="utf-8")
    assert "<!-- results:" in text
    assert publish.filled(text, publish.RESULTS, document.name) == text


def test_every_result_that_is_kept_is_of_a_gpu():
    for folder in publish.RESULTS.glob("*/"):
        publish.load(folder)


DEVICE = "NVIDIA H100 80GB"
OF_GPU = replace(ROW, device=DEVICE)


def visit(folder, *, rows=(OF_GPU,), ends=True, **environment):
    folder.mkdir()
    path = folder / "results.jsonl"
    append(path, "environment", "environment", **({"device": DEVICE} | environment))
    append(path, "headline", "begin", limit=60)
    for row in rows:
        append(path, "headline", "row", row=row if isinstance(row, dict) else asdict(row))
    append(path, "headline", "case", name="a case", passed=True, seconds=1.0)
    if ends:
        append(path, "headline", "end", code=0, seconds=5.0)
    (folder / "summary.md").write_text("# H100\n")
    (folder / "log.txt").write_text("not kept")
    return folder


TEXT = "before\n<!-- results:gpu -->\nan old table\n<!-- end -->\nafter <!-- results:gpu-brief -->\n<!-- end -->\n"


def test_a_visit_becomes_the_tables(tmp_path):
    nothing = publish.filled(TEXT, tmp_path / "results", "d.md")
    assert publish.NOTHING in nothing and "No GPU has run this version" in nothing and "an old table" not in nothing
    kept = publish.keep(visit(tmp_path / "out", commit="abc"), tmp_path / "results")
    assert kept == tmp_path / "results" / "nvidia-h100-80gb"
    assert sorted(p.name for p in kept.iterdir()) == ["results.jsonl", "summary.md"]
    text = publish.filled(nothing, tmp_path / "results", "d.md")
    assert publish.NOTHING not in text and text.startswith("before\n<!-- results:gpu -->\n**NVIDIA H100 80GB**")
    assert "81% at 4096x3584x152064" in text and "commit abc" in text
    assert "goals 3 are proved, 0 refuted" in text and "FAILED" not in text
    assert (kept / "summary.md").read_text() == summary.render(kept / "results.jsonl")
    assert publish.filled(text, tmp_path / "results", "d.md") == text
    assert text.endswith("<!-- end -->\n")


def test_a_rehearsal_and_any_other_folder_are_refused(tmp_path, capsys):
    with pytest.raises(BadArgument, match="is a rehearsal on a CPU"):
        publish.keep(visit(tmp_path / "toy", rehearsal=True), tmp_path / "results")
    assert publish.main([str(tmp_path)]) == 2
    assert "has no results.jsonl of `make gpu-check`" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"device": "???"}, "names no device ('???'); give what `make gpu-check` wrote."),
        ({"device": None}, "names no device (None); give what `make gpu-check` wrote."),
        ({"rows": ({"of": "another schema"},)}, "was written by another version, or by hand (TypeError:"),
        ({"rows": ({**asdict(OF_GPU), "percent_of_floor": "fast"},)}, "was written by another version, or by hand"),
        ({"rows": (OF_GPU, replace(ROW, device="Some CPU, 2 threads"))}, "a figure is of 'Some CPU, 2 threads', the"),
        (
            {"rows": (replace(OF_GPU, error=1.5),)},
            "airl's linear_logprob frozen f+b linear:4096x3584x152064 is further",
        ),
        ({"rows": (replace(OF_GPU, error=float("nan")),)}, "is further off than its budget allows"),
        ({"rows": ()}, "has 0 rows, RESULTS/nvidia-h100-80gb has 1; give --replace to lose them."),
        (
            {"ends": False},
            "was stopped before the end of headline, RESULTS/nvidia-h100-80gb is complete; give --replace",
        ),
        (
            {"stages": ["headline", "tests"]},
            "was stopped before the end of tests, RESULTS/nvidia-h100-80gb is complete",
        ),
    ],
)
def test_what_is_no_whole_visit_to_a_gpu_takes_no_kept_ones_place(changed, sentence, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    monkeypatch.setattr(publish, "RESULTS", results)
    monkeypatch.setattr(publish, "DOCUMENTS", ())
    for name, device in (("first", DEVICE), ("other", "NVIDIA A100")):
        rows = (replace(OF_GPU, device=device),)
        assert publish.main([str(visit(tmp_path / name, device=device, rows=rows))]) == 0
    before = everything(results)
    assert len(before) == 4
    capsys.readouterr()
    assert publish.main([str(visit(tmp_path / "out", **changed))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence.replace("RESULTS", str(results)) in line
    assert everything(results) == before
    if "--replace" in sentence or "complete" in sentence:
        assert publish.main([str(tmp_path / "out"), "--replace"]) == 0
        assert everything(results) != before and len(everything(results)) == 4


def test_two_visits_in_one_file_and_an_environment_without_a_device(tmp_path):
    folder = visit(tmp_path / "two")
    append(folder / "results.jsonl", "environment", "environment", device=DEVICE)
    with pytest.raises(
        BadArgument, match=r"two/results\.jsonl is of 2 visits, not of one; measure into a new folder\."
    ):
        publish.keep(folder, tmp_path / "results")
    (tmp_path / "bare").mkdir()
    append(tmp_path / "bare" / "results.jsonl", "environment", "environment", commit="abc")
    with pytest.raises(BadArgument, match=r"names no device \(None\)"):
        publish.keep(tmp_path / "bare", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_updates_of_another_device_are_refused(tmp_path):
    folder = visit(tmp_path / "out")
    append(folder / "results.jsonl", "updates", "update-header", device="Some CPU, 2 threads")
    with pytest.raises(BadArgument, match="a figure is of 'Some CPU, 2 threads', the visit of 'NVIDIA H100 80GB'"):
        publish.keep(folder, tmp_path / "results")


def test_the_kept_folder_itself_is_left_as_it_is_and_one_within_it_is_refused(tmp_path):
    kept = publish.keep(visit(tmp_path / "out"), tmp_path / "results")
    before = everything(kept)
    assert publish.keep(kept, tmp_path / "results") == kept and everything(kept) == before
    inner = visit(kept / "inner")
    with pytest.raises(BadArgument, match="inner lies in .*, whose place it would take; move it elsewhere first"):
        publish.keep(inner, tmp_path / "results")
    assert inner.is_dir()


def test_what_was_kept_stays_where_copying_fails(tmp_path, monkeypatch):
    kept = publish.keep(visit(tmp_path / "out"), tmp_path / "results")
    before = everything(tmp_path / "results")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(BadArgument, match=r"No space left on device\); what was kept is still there"):
        publish.keep(tmp_path / "out", tmp_path / "results")
    monkeypatch.undo()
    whole = Path.rename

    def fails(self, target):
        return full() if self.name == "new" else whole(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(BadArgument, match="what was kept is still there"):
        publish.keep(tmp_path / "out", tmp_path / "results")
    assert everything(tmp_path / "results") == before and kept.is_dir()


def test_a_kept_folder_of_another_version_stops_the_next_before_it_is_copied(tmp_path):
    kept = publish.keep(visit(tmp_path / "out"), tmp_path / "results")
    append(kept / "results.jsonl", "headline", "row", row={"of": "another schema"})
    other = visit(tmp_path / "other", device="NVIDIA A100", rows=())
    with pytest.raises(BadArgument, match="nvidia-h100-80gb/results.jsonl was written by another version"):
        publish.keep(other, tmp_path / "results")
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["nvidia-h100-80gb"]


def test_a_check_that_failed_is_published_and_its_tables_begin_with_what_failed(tmp_path):
    folder = visit(tmp_path / "out", ends=False, stages=["headline", "tests"])
    for number in range(7):
        append(folder / "results.jsonl", "smoke", "case", name=f"case {number}", passed=False, error="E: x")
    append(folder / "results.jsonl", "smoke", "end", code=1, seconds=5.0)
    publish.keep(folder, tmp_path / "results")
    text = publish.filled(TEXT, tmp_path / "results", "d.md")
    said = (
        "\n\n**The check of this visit FAILED. headline: had not ended when the visit did. "
        "tests: had not ended when the visit did. smoke: exit code 1; 7 of 7 cases failed: "
        "`case 0`, `case 1`, `case 2`, `case 3`, `case 4`, and 2 more.**\n\n"
    )
    assert text.count("nvidia-h100-80gb)" + said) == 2
    assert (tmp_path / "results" / "nvidia-h100-80gb" / "summary.md").read_text().endswith("Check FAILED.\n")


def test_a_section_that_nobody_writes_is_named(tmp_path):
    with pytest.raises(BadArgument, match=r"d\.md: no section results:cpu; name one of gpu, gpu-brief"):
        publish.filled("<!-- results:cpu -->\n<!-- end -->", tmp_path, "d.md")


def test_the_command_rewrites_its_documents(tmp_path, monkeypatch, capsys):
    document = tmp_path / "d.md"
    document.write_text(TEXT)
    monkeypatch.setattr(publish, "DOCUMENTS", (document,))
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    assert publish.main([str(visit(tmp_path / "out"))]) == 0
    assert "d.md: changed" in capsys.readouterr().out
    assert publish.main([]) == 0
    assert "d.md: as it was" in capsys.readouterr().out
    first = json.loads((tmp_path / "results" / "nvidia-h100-80gb" / "results.jsonl").read_text().splitlines()[0])
    assert first["device"] == "NVIDIA H100 80GB"
