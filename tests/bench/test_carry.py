"""What `bench.carry` keeps of a wheel, what it refuses, and that its pins are the project's."""

import sys
import zipfile
from pathlib import Path

import pytest

from bench import carry

ROOT = Path(__file__).resolve().parents[2]


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def pins(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }


def test_only_what_is_used_is_laid_out(tmp_path, capsys):
    meta = {"some-1.0.dist-info/METADATA": "Name: some", "some-1.0.dist-info/RECORD": "x"}
    wheel(tmp_path / "w", "some", {"some/a.py": "1", "some/tests/t.py": "2", "some/a.pyi": "3", **meta})
    kernels = {"verl/utils/kernel/k.py": "4", "verl/utils/device.py": "5", "verl/plugin/p.py": "6"}
    wheel(tmp_path / "w", "verl", {"verl/__init__.py": "ray", "verl/utils/__init__.py": "ray", **kernels})
    out = tmp_path / "out"
    assert carry.main([str(out), "--offline", str(tmp_path / "w")]) == 0
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == {carry.MARKER, "some/a.py", "some-1.0.dist-info/METADATA", *kernels}
    assert "some-1.0-py3-none-any.whl" in capsys.readouterr().out
    (out / "stale.py").write_text("")
    carry.kernel_list(90, out).write_text("{}")
    assert carry.main([str(out), "--offline", str(tmp_path / "w")]) == 0  # a folder of its own is emptied
    assert not (out / "stale.py").exists()
    assert carry.kernel_list(90, out).exists()  # minutes of recording


def test_a_folder_with_something_else_stays(tmp_path, capsys):
    (tmp_path / "mine").write_text("keep")
    assert carry.main([str(tmp_path), "--offline", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "keep"
    assert carry.main([str(tmp_path / "new"), "--offline", str(tmp_path / "absent")]) == 2
    assert "holds no wheel" in capsys.readouterr().err


@pytest.fixture
def site(tmp_path):
    """Somebody's packages."""
    (tmp_path / "site" / "torch-2.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "torch.py").write_text("keep")
    return tmp_path / "site"


def test_only_a_folder_of_its_own_is_emptied(site, tmp_path, monkeypatch, capsys):
    wheel(tmp_path / "w", "some", {"some/a.py": "1"})
    assert carry.main([str(site), "--offline", str(tmp_path / "w")]) == 2
    assert "site holds something else; give an empty folder or a new one." in capsys.readouterr().err
    assert (site / "torch.py").read_text() == "keep"
    monkeypatch.setattr(carry, "FOLDER", site)  # laid out before there was a marker
    assert carry.main([str(site), "--offline", str(tmp_path / "w")]) == 0
    assert {p.name for p in site.iterdir()} == {carry.MARKER, "some"}


def test_nothing_is_emptied_before_the_wheels_are_there_and_whole(tmp_path, capsys):
    wheel(tmp_path / "w", "some", {"some/a.py": "1" * 1000})
    out, wheels = tmp_path / "out", tmp_path / "w"
    assert carry.main([str(out), "--offline", str(wheels)]) == 0
    (path,) = wheels.iterdir()
    whole = path.read_bytes()
    for broken in (whole[:-30], whole.replace(b"1" * 100, b"2" * 100), b""):
        path.write_bytes(broken)
        assert carry.main([str(out), "--offline", str(wheels)]) == 2
        assert f"{path} is no whole wheel (" in capsys.readouterr().err
        assert (out / "some" / "a.py").exists()
    path.unlink()
    assert carry.main([str(out), "--offline", str(wheels)]) == 2
    assert (out / "some" / "a.py").exists()


def test_the_folder_of_the_wheels_and_a_file_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    wheel(tmp_path / "w", "some", {"some/a.py": "1"})
    assert carry.main([str(out), "--offline", str(tmp_path / "w")]) == 0
    for inner in (out, out / "w"):
        wheel(inner, "some", {"some/a.py": "1"})
        assert carry.main([str(out), "--offline", str(inner)]) == 2
        assert f"--offline {inner}: lies in {out}, which is emptied" in capsys.readouterr().err
        assert list(inner.glob("*.whl"))
    (tmp_path / "file").write_text("keep")
    assert carry.main([str(tmp_path / "file"), "--offline", str(tmp_path / "w")]) == 2
    assert "file is a file; give an empty folder or a new one." in capsys.readouterr().err
    assert carry.main([str(tmp_path / "file" / "x"), "--offline", str(tmp_path / "w")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_too_much_fails(tmp_path, monkeypatch, capsys):
    wheel(tmp_path / "w", "some", {"some/a.py": "x" * 100})
    monkeypatch.setattr(carry, "MOST_BYTES", 99)
    assert carry.main([str(tmp_path / "out"), "--offline", str(tmp_path / "w")]) == 1
    assert "take a package out" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["../a.py", "some/../../a.py", "some/test/a.py"])
def test_no_file_leaves_the_folder(path):
    assert not carry.is_kept(path, "some")


def test_the_pins_are_the_projects():
    mine, projects = pins(carry.REQUIREMENTS), pins(ROOT / "constraints.txt")
    assert {"trl", "liger-kernel", "cut-cross-entropy", "pydantic", "datasets", "verl"} <= mine.keys()
    assert {name: v for name, v in mine.items() if name in projects and v != projects[name]} == {}
    assert all(mine.values())


def test_git_ignores_the_folder():
    assert "/.carry/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_folder_is_used_by_the_python_that_it_was_made_for(tmp_path, monkeypatch):
    assert carry.path_of(tmp_path / "absent") is None
    monkeypatch.setattr(carry, "PYTHON", sys.version_info[:2])
    assert carry.path_of(tmp_path) == tmp_path
    monkeypatch.setattr(carry, "PYTHON", (3, 0))
    assert carry.path_of(tmp_path) is None
