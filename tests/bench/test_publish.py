"""The documents' tables of a GPU are what bench/results/ says, and nothing else can be there."""

import json
from dataclasses import asdict

import pytest

from bench import publish
from bench.errors import BadArgument
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
        assert not publish._environment(folder).get("rehearsal")


def visit(folder, **environment):
    folder.mkdir()
    append(folder / "results.jsonl", "environment", "environment", device="NVIDIA H100 80GB", **environment)
    append(folder / "results.jsonl", "headline", "row", row=asdict(ROW))
    append(folder / "results.jsonl", "headline", "end", code=0, seconds=5.0)
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
    assert "goals 3 are proved, 0 refuted" in text
    assert publish.filled(text, tmp_path / "results", "d.md") == text
    assert text.endswith("<!-- end -->\n")


def test_a_rehearsal_and_any_other_folder_are_refused(tmp_path, capsys):
    with pytest.raises(BadArgument, match="is a rehearsal on a CPU"):
        publish.keep(visit(tmp_path / "toy", rehearsal=True), tmp_path / "results")
    assert publish.main([str(tmp_path)]) == 2
    assert "has no results.jsonl of `make gpu-check`" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


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
