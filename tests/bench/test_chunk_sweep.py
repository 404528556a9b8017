"""The sweep of chunk sizes at a toy shape, and its bad arguments."""

import json

import pytest

from bench import chunk_sweep


def test_points_are_written_shape_by_shape(tmp_path, capsys):
    path = tmp_path / "chunks.json"
    assert chunk_sweep.main(["--device", "cpu", "--json", str(path), "--rows", "64,16"]) == 0
    points = json.loads(path.read_text())
    assert [(p["mode"], p["chunk_rows"]) for p in points] == [
        (mode, rows) for mode in ("trainable f+b", "frozen f+b") for rows in (64, 16)
    ]
    assert all(p["ms"] > 0 for p in points)
    for whole, small in (points[:2], points[2:]):
        assert whole["chunk_mib"] == 4 * small["chunk_mib"] == 64 * 2048 * 4 / 2**20
        assert whole["peak_mib"] - small["peak_mib"] > 0.8 * 48 * 2048 * 4 / 2**20
        assert min(whole["slower_percent"], small["slower_percent"]) == 0
    assert "chunk rows" in capsys.readouterr().out


def test_no_shape_is_begun_without_budget(tmp_path):
    path = tmp_path / "chunks.json"
    assert chunk_sweep.main(["--device", "cpu", "--json", str(path), "--budget-s", "0"]) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "many"], "--rows many: give whole numbers above 0, divided by commas."),
        (["--rows", "0"], "--rows 0: give whole numbers above 0, divided by commas."),
        (["--shapes", "head:4x4x4"], "--shapes head:4x4x4: give shapes of the form linear:"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, capsys):
    assert chunk_sweep.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
