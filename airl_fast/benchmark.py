"""`airl-fast bench`: runs a benchmark of the checkout as a process of its own.

The package never imports the benchmarks, which need not be installed with it.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from airl_fast.errors import UserError

BENCHMARKS = ("ops", "step", "profile", "updates", "roofline", "resources")
CHECKOUT = Path(__file__).parents[1]


def run_benchmark(name: str, flags: Sequence[str]) -> int:
    """`python -m bench.<name> <flags>` in this process's directory; returns its exit code.

    Raises UserError where there is no such benchmark beside the package.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench {name}: give one of {', '.join(BENCHMARKS)}.")
    if not (CHECKOUT / "bench" / f"{name}.py").is_file():
        raise UserError(f"bench {name}: {CHECKOUT} has no bench/{name}.py; run it from a checkout of the repository.")
    paths = (str(CHECKOUT), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, "-m", f"bench.{name}", *flags], env=environment, check=False).returncode
