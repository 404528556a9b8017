"""The list of private names against the sources, and how the preflight tells what failed."""

import ast
from pathlib import Path

import pytest

from bench import preflight
from bench.private_api import EXEMPT, LISTED, Operator, Thing, problems

ROOT = Path(__file__).parents[2]
SOURCES = [path for top in ("airl_fast", "kernels/airl_kernels", "bench", "tests/gpu")
           for path in sorted((ROOT / top).rglob("*.py"))]  # fmt: skip


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_in(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def foreign_names(tree: ast.AST, ours: set[str]) -> set[str]:
    """Private attributes that no source of ours defines, private modules that are imported, and torch.ops."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if private(node.attr) and node.attr not in ours and not of_self:
                found.add(node.attr)
            chain = ast.unparse(node)
            if chain.startswith("torch.ops.") and chain.count(".") == 3:
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("torch", "transformers", "triton"):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if private(part)}
    return found


def test_every_private_name_in_the_sources_is_listed():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    ours = set().union(*map(defined_in, trees))
    used = set().union(*(foreign_names(tree, ours) for tree in trees))
    listed = {part for entry in LISTED for part in entry.path.split(".")} | EXEMPT
    assert {"_flash_attention_backward", "_sleep", "_python_dispatch", "_can_set_attn_implementation"} <= used
    assert used - listed - {"load_library"} == set()


def test_a_new_private_name_is_noticed():
    tree = ast.parse("torch.ops.aten._new_one(x)\nfrom torch._inner import y\nmodel._secret\nself._own\n_aten._mine")
    assert foreign_names(tree, {"_mine"}) == {"_new_one", "_inner", "_secret"}


def test_the_installed_versions_hold_to_the_list():
    assert problems() == []


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (Operator(path="torch.ops.aten.addmm", positional=("mat1",)), "torch.ops.aten.addmm takes self, mat1, mat2"),
        (
            Operator(path="torch.ops.aten.mm", positional=(), named=("scale",)),
            "mm has no argument scale",
        ),
        (Operator(path="torch.ops.aten.mm", positional=(), overload="x"), "torch.ops.aten.mm has no overload x"),
        (Operator(path="torch.ops.aten._gone", positional=()), "torch.ops.aten._gone has no overload default"),
        (Thing(path="torch._gone"), "torch._gone is not there"),
        (Thing(path="torch.cuda._sleep.x"), "torch.cuda._sleep.x is not there"),
        (Thing(path="bench.errors.run_command", named=("nope",)), "run_command has no parameter nope"),
    ],
)
def test_what_changed_is_said(entry, sentence):
    assert sentence in entry.problem()


def test_a_check_that_breaks_fails_and_the_table_says_why():
    def breaks():
        raise OSError("no such thing")

    results = [preflight.run("imports", breaks), preflight.run("private", lambda: ("3 entries", [], ["a note"]))]
    text = preflight.render(results)
    assert "FAILED imports: OSError: no such thing" in text
    assert "private: a note" in text
    assert [bool(result.problems) for result in results] == [True, False]


def test_exit_codes(monkeypatch, capsys):
    monkeypatch.setitem(preflight.CHECKS, "private", lambda jobs: ("1", ["wrong"], []))
    assert preflight.main(["--only", "private"]) == 1
    monkeypatch.setitem(preflight.CHECKS, "private", lambda jobs: ("1", [], []))
    assert preflight.main(["--only", "private"]) == 0
    assert preflight.main(["--only", "nope"]) == 2
    assert "--only nope: give some of environment, imports" in capsys.readouterr().err


def test_every_module_of_a_visit_is_among_those_that_are_imported():
    names = preflight.modules()
    assert {"bench.ops", "bench.peers.liger", "airl_kernels.logprob_triton", "airl_fast.train",
            "tests.gpu.test_ops_on_gpu"} <= set(names)  # fmt: skip


def test_the_pins_name_the_machines_versions():
    text = preflight.PINS.read_text()
    for pin in ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy==2.5.2", "tokenizers==0.23.2"):
        assert f"\n{pin}\n" in text
    lines = {line.split("==")[0].lower() for line in text.splitlines()}
    assert not {"pydantic", "datasets", "dill", "trl", "bitsandbytes", "liger_kernel"} & lines
