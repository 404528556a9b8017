"""The tests of tests/gpu, spread over processes, each test recorded as it ends.

    python -m bench.visit.tests --records FILE --stage tests|compiled [--jobs 8] [--keyword TEXT]

`compiled` is the tests that wait for torch.compile, `tests` all others. Each process takes every n-th test.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.tied import tied
from bench.visit.shards import run_shards
from bench.visit.stream import VARIABLE

_FILES = "ops", "edges", "devices", "attention", "sampler", "streams"
TESTS = tuple(f"tests/gpu/test_{name}_on_gpu.py" for name in _FILES)
_COMPILED = "compiles_whole"
_ENDS = (0, 1, 5)  # pytest's: all passed, some failed, none collected


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.tests")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--stage", choices=("tests", "compiled"), required=True)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--keyword", help="only tests that pytest's -k selects by this")
    parser.add_argument("--files", nargs="+", default=TESTS)
    parser.add_argument("--shard", type=int)
    options = parser.parse_args(arguments)
    if options.shard is not None:
        os.environ[VARIABLE] = "|".join(
            (str(options.records.resolve()), options.stage, str(options.shard), str(options.jobs))
        )
        command = test_command(options.stage, options.keyword, options.files)
        return subprocess.run(tied(command), check=False).returncode
    command = [sys.executable, "-m", "bench.visit.tests", "--records", str(options.records), "--stage", options.stage]
    command += ["--jobs", str(options.jobs), *(["--keyword", options.keyword] if options.keyword else [])]
    command += ["--files", *options.files, "--shard"]
    return run_shards(lambda shard: [*command, str(shard)], options.jobs, options.records, options.stage, _ENDS)


def test_command(stage: str, keyword: str | None, files: Sequence[str]) -> list[str]:
    chosen = _COMPILED if stage == "compiled" else f"not {_COMPILED}"
    chosen = f"({chosen}) and ({keyword})" if keyword else chosen
    config = ["-c", "tests/gpu/pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider", "-p", "bench.visit.stream"]
    return [sys.executable, "-m", "pytest", *config, "--tb=short", "-k", chosen, *files]


if __name__ == "__main__":
    sys.exit(main())
