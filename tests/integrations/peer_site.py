"""Running the cases that need somebody else's package, in a process whose path ends with build/peers/site.

The folder is appended, so this environment's packages win, and to a process of its own, so no other test sees it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "peers" / "site"
RUN = "import sys, pytest; sys.path.append({site!r}); sys.exit(pytest.main(['-p', 'no:cacheprovider', {file!r}]))"


def run_cases(name: str) -> None:
    """Run tests/peers/<name>_package.py; skip where `make peer-tests` has not installed the package."""
    if not (SITE / name).is_dir():
        pytest.skip(f"{name} is not in build/peers/site; `make peer-tests` installs it.")
    code = RUN.format(site=str(SITE), file=f"tests/peers/{name}_package.py")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
