"""Lay the packages that a GPU machine lacks into one folder, which `make gpu-check` puts on its path.

    python -m bench.carry [DIR] [--offline WHEELS]      # default .carry, which git ignores

Downloads the wheels of `bench/carry.txt` for Python 3.12 on x86-64 Linux, without their dependencies, unpacks them
and takes out what is not used: tests, type stubs, and of verl all but its fused kernels. Prints each package's size;
exit code 1 when the folder takes more than 60 MiB. The folder is emptied first, which is done to none that this command
did not make, and only when all wheels are there and whole.
"""

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bench.errors import BadArgument, Parser, run_command
from bench.report import table

REQUIREMENTS = Path(__file__).with_name("carry.txt")
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".carry"
MARKER = ".made-by-bench-carry"  # in every folder that was laid out here, and so may be emptied
PYTHON = (3, 12)  # that the compiled ones are for
MOST_BYTES = 60 << 20
PLATFORMS = ("manylinux_2_34", "manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
# Of these packages only what matches is kept. Without __init__.py, verl and verl.utils import none of its trainer.
KEPT = {"verl": ("verl/utils/kernel/*", "verl/utils/device.py", "verl/plugin/*", "*.dist-info/METADATA")}
LEFT_OUT = ("*/tests/*", "*/test/*", "*.pyi", "*.dist-info/RECORD", "*.dist-info/licenses/*", "*.dist-info/WHEEL")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.carry", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser: argparse.ArgumentParser = Parser(prog="python -m bench.carry", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="made, or emptied first; default .carry")
    parser.add_argument("--offline", type=Path, metavar="WHEELS", help="take the wheels from this folder")
    options = parser.parse_args(arguments)
    folder, others = options.folder, _replaceable(options.folder)
    given = options.offline and options.offline.resolve()
    if given is not None and folder.resolve() in (given, *given.parents):
        raise BadArgument(f"--offline {options.offline}: lies in {folder}, which is emptied; give another folder.")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = options.offline or _download(Path(scratch))
        found = sorted(wheels.glob("*.whl"))
        if not found:
            raise BadArgument(f"--offline {wheels}: holds no wheel; leave it out to download them.")
        for wheel in found:
            _check(wheel)
        try:
            _empty(folder, others)
            sizes = {wheel.name: unpack(wheel, folder) for wheel in found}
        except OSError as error:
            raise BadArgument(f"{folder}: cannot be written ({error.strerror}); give another folder.") from None
    whole = sum(sizes.values())
    lines = [(name, f"{size / 2**20:.2f}") for name, size in sorted(sizes.items(), key=lambda item: -item[1])]
    print(table(("wheel", "MiB unpacked"), [*lines, ("all", f"{whole / 2**20:.2f}")]))
    if whole > MOST_BYTES:
        print(f"bench.carry: more than {MOST_BYTES >> 20} MiB; take a package out of {REQUIREMENTS}.", file=sys.stderr)
    return int(whole > MOST_BYTES)


def kernel_list(arch: int | str, folder: Path = FOLDER) -> Path:
    """Where the preflight leaves the list of kernels for a visit; the wheels come and go beside it."""
    return folder / f"kernels-sm{arch}.json"


def path_of(folder: Path = FOLDER) -> Path | None:
    """The folder, where it was laid out and this Python can import from it."""
    return folder if folder.is_dir() and sys.version_info[:2] == PYTHON else None


def _replaceable(folder: Path) -> set[Path]:
    """What emptying would remove: the packages of before, but not a list of kernels. A folder that this command did not
    make is refused unless it is empty. The default one is its own, also where an earlier version left no marker."""
    if folder.exists() and not folder.is_dir():
        raise BadArgument(f"{folder} is a file; give an empty folder or a new one.")
    lists = set(folder.glob(kernel_list("*", folder).name)) if folder.is_dir() else set()
    others = set(folder.iterdir()) - lists if folder.is_dir() else set()
    if others and not (folder / MARKER).is_file() and folder.resolve() != FOLDER.resolve():
        raise BadArgument(f"{folder} holds something else; give an empty folder or a new one.")
    return others


def _check(wheel: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        broken = str(error)
    if broken is not None:
        raise BadArgument(f"{wheel} is no whole wheel ({broken}); download it again.")


def _empty(folder: Path, others: set[Path]) -> None:
    for path in others:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += [
        "--python-version",
        "{}.{}".format(*PYTHON),
        "--implementation",
        "cp",
        "-d",
        str(folder),
        "-r",
        str(REQUIREMENTS),
    ]
    command += [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ["pip download failed"]
        raise BadArgument(f"{lines[-1].removeprefix('ERROR: ')}; see the versions in {REQUIREMENTS}.")
    return folder


def unpack(wheel: Path, folder: Path) -> int:
    """Bytes written. Only files that the package needs at run time."""
    package, written = wheel.name.partition("-")[0], 0
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.is_dir() or not is_kept(entry.filename, package):
                continue
            archive.extract(entry, folder)
            written += entry.file_size
    return written


def is_kept(path: str, package: str) -> bool:
    if ".." in PurePosixPath(path).parts or any(fnmatch.fnmatch(path, pattern) for pattern in LEFT_OUT):
        return False
    return any(fnmatch.fnmatch(path, pattern) for pattern in KEPT.get(package, ("*",)))


if __name__ == "__main__":
    sys.exit(main())
