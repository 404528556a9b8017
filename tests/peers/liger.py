"""Liger-Kernel's own GRPO tests, run against our surfaces: python -m tests.peers.liger [--all]

Downloads the source distribution of the installed Liger-Kernel version into build/peers (once), and runs its tests
from there with `liger_plugin.py`, which puts our functions in place of Liger's. Nothing of it is copied here. Two
passes: our CPU implementation, and our Triton kernels under the interpreter. Prints passed, failed and skipped per
file with reasons, and exits with 1 when a test fails that `EXPLAINED` does not name, or when ours was never called.
On a machine with an NVIDIA GPU, Liger's tests choose it by themselves and the first pass runs the kernels on it.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "peers"
FILES = ("test/chunked_loss/test_grpo_loss.py", "test/transformers/test_grpo_loss.py")

# Minutes of matrix products on two CPU cores, at other sizes of the same cases; --all runs them.
LARGE = "8-128-1024-4096 or 151936 or 64000 or large_seq"
# The interpreter takes seconds per case. Every test function runs; of the three with the longest lists of
# parameters, a combination or two of each loss type.
INTERPRETED = {
    FILES[0]: (
        "not test_correctness[ or dtype1 and None-token and "
        "(True-True-True-0.1-0.2-0.2-1.0-True or True-False-False-0.0-0.1-0.1-2.0-False)"
    ),
    FILES[1]: (
        "not vllm_is_ratio and not vs_trl or vs_trl and 0.04-True and (token-None or sequence-1.5)"
        " or vllm_is_ratio and (0.04-grpo or 5-0.04)"
    ),
}
EXPLAINED = {
    r"test_correctness\[(None|2\.0)-sequence-luspo-False-False-True-0\.1-.*-True-1\.0-dtype0-.*-3-47-31-123\]": (
        "bfloat16 noise: luspo multiplies by the sequence length, the loss cancels to 0.01, and the test's absolute "
        "tolerance 0.1 is what bfloat16 log-probabilities leave open; docs/integrations/liger.md has the float64 "
        "comparison"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileResult:
    """What happened in one test file of one pass."""

    path: str
    outcomes: list[dict[str, str]]
    calls: int
    left_out: str

    def unexplained(self) -> list[str]:
        failed = [o["test"] for o in self.outcomes if o["outcome"] == "failed"]
        return [test for test in failed if explanation(test) is None]


def explanation(test: str) -> str | None:
    """Why this test may fail, or None."""
    return next((reason for pattern, reason in EXPLAINED.items() if re.search(pattern, test)), None)


def sources(version: str) -> Path:
    """The unpacked source distribution of that version of Liger-Kernel."""
    folder = BUILD / f"liger_kernel-{version}"
    if folder.is_dir():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    download = ["pip", "download", "-q", "--no-deps", "--no-binary=liger-kernel", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", *download, "-d", str(BUILD), f"liger-kernel=={version}"], check=True)
    with tarfile.open(BUILD / f"{folder.name}.tar.gz") as archive:
        archive.extractall(BUILD, filter="data")
    return folder


def run_file(folder: Path, path: str, *, interpreted: bool, everything: bool) -> FileResult:
    """Run one of Liger's test files in a process of its own."""
    parts = [] if everything else [f"not ({LARGE})"]
    if interpreted and not everything:
        parts.append(f"({INTERPRETED[path]})")
    result = BUILD / "result.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "PEER_RESULT": str(result), "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "AIRL_KERNELS_NATIVE": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.peers.liger_plugin", "-k", " and ".join(parts), path]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if not result.exists():
        raise RuntimeError(f"{path} did not run:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    recorded = json.loads(result.read_text(encoding="utf-8"))
    left_out = re.search(r"(\d+) deselected", run.stdout)
    return FileResult(
        path=path,
        outcomes=recorded["outcomes"],
        calls=sum(recorded["calls"].values()),
        left_out=left_out[1] if left_out else "0",
    )


def report(title: str, result: FileResult) -> None:
    """Print the counts of a file and why tests failed or were skipped."""
    counts = Counter(o["outcome"] for o in result.outcomes)
    numbers = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    print(f"{title}: {result.path}: {numbers}, {result.left_out} left out, {result.calls} calls of ours")
    for reason, count in Counter(o["reason"] for o in result.outcomes if o["outcome"] == "skipped").most_common():
        print(f"    skipped {count}: {reason}")
    for outcome in result.outcomes:
        if outcome["outcome"] == "failed":
            reason = explanation(outcome["test"])
            print(f"    failed {outcome['test'].split('::')[1]}\n        {outcome['reason']}")
            print(f"        {'UNEXPLAINED' if reason is None else 'explained: ' + reason}")


def main(arguments: list[str]) -> int:
    """Run both passes; 0 when every failure is explained."""
    version = importlib.metadata.version("liger-kernel")
    folder = sources(version)
    everything = "--all" in arguments
    print(f"Liger-Kernel {version}, its own tests, our functions")
    if not everything:
        print(f"left out without --all: {LARGE}; under the interpreter also most combinations of parameters")
    good = True
    for title, interpreted in (("torch", False), ("interpreted kernels", True)):
        for path in FILES:
            result = run_file(folder, path, interpreted=interpreted, everything=everything)
            report(title, result)
            good = good and result.calls > 0 and not result.unexplained()
    print("every failure is explained" if good else "there are unexplained failures, or ours was not called")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
