"""Who may import whom, and how long a file may be. Reads the sources; imports nothing of the project.

`LAYERS` is the map of airl_fast from the bottom up. A module may import its own layer and the ones below, except
that stages never import each other: what two of them need goes below, what combines them goes above.
"""

import ast
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

LAYERS: dict[str, set[str]] = {
    "records": {"errors", "types", "trust"},
    "services": {
        *("config", "overrides", "manifest", "checkpoint", "metrics", "progress", "processor", "rundir", "doctor"),
    },
    "tools": {"device", "data", "models", "optim", "pack", "microbatch", "beside", "granularity", "measures"},
    "stages": {"rollout", "discriminator", "advantage", "policy", "sft", "grpo"},
    "assembly": {
        *("traces", "bridge", "batches", "lab", "warmup", "artifacts", "state", "baselines"),
        *("engines", "preflight", "export", "judge", "saved"),
    },
    "evaluation": {"evaluate", "guided"},
    "loop": {"train"},
    "commands": {
        "run",
        "score",
        "serve",
        "report",
        "benchmark",
        "ablate",
        "commands",
        "cli",
        "__main__",
        "integrations",
    },
}
RANK = {module: rank for rank, layer in enumerate(LAYERS.values()) for module in layer}

KERNEL_IMPORTS = {"torch", "triton", "airl_kernels", *sys.stdlib_module_names}
MAX_LOOP_LINES = 150
LONG_FILE, TOO_LONG_FILE = 400, 500


class Import(NamedTuple):
    name: str  # absolute dotted name, the imported member included: 'airl_fast.types.Trace'
    line: int
    at_import: bool  # False inside a function or an `if TYPE_CHECKING`


def dotted(path: str) -> str:
    """'kernels/airl_kernels/a.py' -> 'airl_kernels.a'; packages lose their '__init__'."""
    parts = Path(path.removeprefix("kernels/")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, source: str) -> Iterator[Import]:
    """Every import statement of a source file."""
    package = dotted(path).split(".")
    if not path.endswith("__init__.py"):
        package.pop()

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = [*base, *(child.module.split(".") if child.module else ())]
                yield from (Import(".".join([*base, alias.name]), child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            ):
                yield from walk(child, False)
            else:
                yield from walk(child, at_import)

    return walk(ast.parse(source, path), True)


def import_violations(files: Mapping[str, str]) -> list[str]:
    """'path:line: sentence' for each import in the wrong direction. files: path relative to the root -> source."""
    found = []
    for path, source in files.items():
        for item in imports(path, source):
            problem = problem_of(path, item)
            if problem:
                found.append(f"{path}:{item.line}: {problem}")
    for path in files:
        module = component(dotted(path))
        if path.startswith("airl_fast/") and module not in RANK and module != "airl_fast":
            found.append(f"{path}:1: {module} has no place yet; put it into one of LAYERS in tests/test_layering.py")
    return found


def component(name: str) -> str:
    """'airl_fast.data.verify.check' -> 'data'; the package itself is 'airl_fast'."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def problem_of(path: str, item: Import) -> str | None:
    top = item.name.split(".")[0]
    if top in ("tests", "conftest") and not path.startswith("tests/"):
        return f"imports {item.name}; nothing imports tests"
    if top == "bench" and not path.startswith(("bench/", "tests/")):
        return f"imports {item.name}; only tests import bench"
    if path.startswith("kernels/"):
        return kernel_problem(path, item, top)
    if path.startswith("airl_fast/") and top == "airl_fast" and item.name != "airl_fast":
        return direction_problem(component(dotted(path)), component(item.name))
    return None


def kernel_problem(path: str, item: Import, top: str) -> str | None:
    """airl_kernels needs torch alone to be imported; Triton comes with the first CUDA tensor."""
    if "/integrations/" in path:
        return f"imports {item.name}; airl_kernels never imports airl_fast" if top == "airl_fast" else None
    if top not in KERNEL_IMPORTS:
        return f"imports {item.name}; airl_kernels depends on torch, triton and the standard library only"
    if item.name.startswith("airl_kernels.integrations"):
        return f"imports {item.name}; integrations are imported by their users only"
    is_triton_file = path.endswith("_triton.py")
    needs_triton = top == "triton" or any(part.endswith("_triton") for part in item.name.split("."))
    if needs_triton and item.at_import and not is_triton_file:
        return f"imports {item.name} at import time; a machine without Triton must be able to import this file"
    return None


def direction_problem(importer: str, imported: str) -> str | None:
    if importer == imported or importer not in RANK or imported not in RANK:
        return None
    if importer in LAYERS["stages"] and imported in LAYERS["stages"]:
        return f"stage {importer} imports stage {imported}; stages never import each other"
    if RANK[imported] > RANK[importer]:
        return f"{importer} imports {imported}, which lies in a higher layer"
    return None


def size_violations(files: Mapping[str, str]) -> list[str]:
    """Files that are too long to be read in one go."""
    found = []
    for path, source in files.items():
        limit = MAX_LOOP_LINES if path == "airl_fast/train.py" else TOO_LONG_FILE
        lines = len(source.splitlines())
        if lines > limit:
            found.append(f"{path}: {lines} lines, more than {limit}")
    return found


def tree() -> dict[str, str]:
    """Path -> source of every Python file of the project."""
    tops = ("airl_fast", "kernels", "bench", "tests")
    paths = (p.relative_to(ROOT) for top in tops for p in sorted((ROOT / top).rglob("*.py")))
    # kernels/build holds copies that an installation made; kernels/setup.py is not part of the library.
    return {
        p.as_posix(): (ROOT / p).read_text(encoding="utf-8")
        for p in paths
        if "build" not in p.parts and p.name != "setup.py"
    }


# ---------------------------------------------------------------------------------------------- the project


def test_imports_point_the_right_way() -> None:
    files = tree()
    assert "airl_fast/types.py" in files
    assert "kernels/airl_kernels/__init__.py" in files
    assert import_violations(files) == []


def test_files_can_be_read_in_one_go() -> None:
    files = tree()
    for path, source in files.items():
        if len(source.splitlines()) > LONG_FILE:
            warnings.warn(f"{path} has more than {LONG_FILE} lines; consider a split", stacklevel=1)
    assert size_violations(files) == []


# ---------------------------------------------------------------------------------------------- the checker


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("airl_fast/policy.py", "from airl_fast.sft import x", "stage policy imports stage sft"),
        ("airl_fast/policy.py", "from airl_fast import sft", "stage policy imports stage sft"),
        ("airl_fast/policy.py", "import airl_fast.rollout.vllm", "stage policy imports stage rollout"),
        ("airl_fast/rollout/builtin.py", "from .. import policy", "stage rollout imports stage policy"),
        ("airl_fast/rollout/builtin.py", "from ..policy import x", "stage rollout imports stage policy"),
        ("airl_fast/policy.py", "def f():\n    from . import train", "2: policy imports train, which lies in a higher"),
        ("airl_fast/types.py", "from airl_fast.config import Config", "types imports config, which lies in a higher"),
        ("airl_fast/data/jsonl.py", "from airl_fast.train import x", "data imports train"),
        ("airl_fast/train.py", "from airl_fast import cli", "train imports cli"),
        ("airl_fast/policy.py", "import tests.helpers", "nothing imports tests"),
        ("airl_fast/cli.py", "from bench.ops import main", "only tests import bench"),
        ("bench/ops.py", "from tests import helpers", "nothing imports tests"),
        ("airl_fast/novel.py", "", "novel has no place yet"),
        ("kernels/airl_kernels/a.py", "import airl_fast.types", "depends on torch, triton and the standard library"),
        ("kernels/airl_kernels/a.py", "def f():\n    import transformers", "imports transformers"),
        ("kernels/airl_kernels/a.py", "import numpy", "imports numpy"),
        ("kernels/airl_kernels/a.py", "import triton.language as tl", "at import time"),
        ("kernels/airl_kernels/a.py", "try:\n    import triton\nexcept ImportError:\n    pass", "2: imports triton at"),
        ("kernels/airl_kernels/a.py", "from . import b_triton", "imports airl_kernels.b_triton at import time"),
        ("kernels/airl_kernels/a.py", "from .b_triton import launch", "imports airl_kernels.b_triton.launch at import"),
        ("kernels/airl_kernels/a.py", "from .integrations import trl", "imported by their users only"),
        ("kernels/airl_kernels/integrations/trl.py", "from airl_fast import types", "never imports airl_fast"),
    ],
)
def test_the_checker_sees_each_violation(path: str, source: str, expected: str) -> None:
    (found,) = import_violations({path: source})
    assert found.startswith(path)
    assert expected in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("airl_fast/policy.py", "import torch\nfrom airl_fast.types import Trace\nfrom airl_kernels import ppo_loss"),
        ("airl_fast/policy.py", "from airl_fast import pack\nfrom .models.load import LanguageModel"),
        ("airl_fast/train.py", "from airl_fast import discriminator, policy, sft"),
        ("airl_fast/data/task.py", "from airl_fast.data import verify\nfrom . import verify as v\nfrom .tags import x"),
        ("airl_fast/rollout/__init__.py", "from .builtin import sample\nfrom ..types import Trace"),
        ("kernels/airl_kernels/a.py", "import math\nfrom torch import nn\ndef f():\n    from . import a_triton"),
        ("kernels/airl_kernels/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        ("kernels/airl_kernels/a_triton.py", "import triton\nfrom .b_triton import helper"),
        ("kernels/airl_kernels/integrations/trl.py", "import trl\nfrom airl_kernels import linear_logprob"),
        ("tests/airl_fast/test_policy.py", "from airl_fast import policy, sft\nfrom bench import ops"),
    ],
)
def test_the_checker_accepts_the_right_direction(path: str, source: str) -> None:
    assert import_violations({path: source}) == []


def test_the_checker_counts_lines() -> None:
    files = {"airl_fast/train.py": "x = 1\n" * 151, "airl_fast/policy.py": "x = 1\n" * 501, "bench/a.py": "x\n" * 500}
    assert size_violations(files) == [
        "airl_fast/train.py: 151 lines, more than 150",
        "airl_fast/policy.py: 501 lines, more than 500",
    ]
    assert size_violations({"airl_fast/train.py": "x = 1\n" * 150}) == []


def test_no_module_lies_in_two_layers() -> None:
    assert len(RANK) == sum(map(len, LAYERS.values()))
