"""Who launches kernels on a GPU visit: the tests of tests/gpu, the smoke cases, the benchmark, a step's updates.

Each runs here as it will there, on a GPU that is not there (`pretend.py`), while its launches are noted
(`recording.py`). As no number is true there, nothing is compared: assertions are evaluated and their outcome ignored.
"""

import ast
import contextlib
import importlib.abc
import importlib.machinery
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

from bench.pretend import pretend_gpu
from bench.recording import Recorder, Specialisation, compiling, recording

ROOT = Path(__file__).resolve().parents[1]
_JUDGES = ("tests.gpu.", "airl_kernels.testing", "bench.visit.")  # modules whose assertions are about numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one caller launched. runs: how many cases it ran. broken: those that did not run to their end, and why."""

    caller: str
    found: tuple[Specialisation, ...]
    launches: int
    runs: int
    broken: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class _Log:
    recorder: Recorder
    runs: int = 0
    broken: list[str] = field(default_factory=list)

    def case(self, name: str, call: Callable[[], object]) -> None:
        self.runs += 1
        with self.recorder.named(name):
            try:
                call()
            except Exception as error:
                self.broken.append(_said(name, error))


def _said(name: str, error: Exception) -> str:
    return f"{name}: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def record(caller: str, arch: int) -> Recording:
    """Run one of CALLERS, noting its launches. Call it in a process that has not imported the tests yet."""
    with recording(arch) as recorder:
        log = _run(caller, arch, recorder)
    return Recording(
        caller=caller, found=tuple(recorder.found), launches=recorder.launches, runs=log.runs, broken=tuple(log.broken)
    )


def compile_all(caller: str, arch: int) -> list[bool]:
    """Run one of CALLERS, compiling what it launches: per distinct kernel, whether the cache on disk had it."""
    with compiling(arch) as hits:
        _run(caller, arch, Recorder())
    return hits


def _run(caller: str, arch: int, recorder: Recorder) -> _Log:
    kind, _, part = caller.partition(" ")
    log = _Log(recorder=recorder)
    with _without_outcome(), pretend_gpu(arch), patch("torch.compile", _as_it_is):
        try:
            _KINDS[kind](log, *(map(int, part.split("/")) if part else ()))
        except Exception as error:
            log.broken.append(_said(caller, error))
    return log


def _as_it_is(function: Callable | None = None, **_: object) -> Callable:
    """In the place of torch.compile, whose own kernels are none of ours."""
    return function if function is not None else lambda function: function


# ---- the callers -----------------------------------------------------------------------------------------------


def _tests(log: _Log, shard: int, shards: int) -> None:
    import pytest

    class Shard:
        @staticmethod
        def pytest_collection_modifyitems(items: list) -> None:
            items[:] = items[shard::shards]

        @staticmethod
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(item) -> Iterator[None]:
            _without_references()
            _few_tokens()
            with log.recorder.named(item.nodeid.removeprefix("tests/gpu/")):
                return (yield)

        @staticmethod
        def pytest_runtest_logreport(report) -> None:
            log.runs += report.when == "call" and not report.skipped
            if report.failed:
                line = report.longrepr.reprcrash.message.splitlines()[0] if report.longrepr else ""
                log.broken.append(f"{report.nodeid.removeprefix('tests/gpu/')}: {line}")

    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*_on_gpu.py"))
    flags = ["-c", "tests/gpu/pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider", "--assert=plain", "--tb=short"]
    lenient = patch("torch.testing.assert_close", lambda *a, **k: None), patch("pytest.raises", _Raises)
    with lenient[0], lenient[1], contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main([*flags, *files], plugins=[Shard])
    if code not in (0, 1) or not (log.runs or log.broken):
        log.broken.append(f"pytest ended with code {int(code)}: {printed.getvalue().strip()[-300:]}")


class _Raises(contextlib.suppress):
    """`pytest.raises`, of which nothing need come: no value is wrong on a GPU that is not there."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(Exception)


def _without_references() -> None:
    """The formulas that operations are compared with launch nothing, and loop over tokens in Python."""
    module = sys.modules.get("tests.gpu.operations")
    for name, operation in () if module is None else tuple(module.OPERATIONS.items()):
        if operation.plain is not operation.ours:
            module.OPERATIONS[name] = replace(operation, plain=operation.ours)


def _few_tokens() -> None:
    """A sample of a hundred tokens launches what one of a few does, and here none ends by itself."""
    builtin = sys.modules.get("airl_fast.rollout.builtin")
    if builtin is not None and builtin.sample.__module__ != __name__:
        builtin.sample = _short(builtin.sample)


def _short(sample: Callable) -> Callable:
    def few(lm, prompts, per_prompt, params, static=None):
        return sample(lm, prompts, per_prompt, replace(params, max_new_tokens=min(params.max_new_tokens, 6)), static)

    return few


def _smoke(log: _Log) -> None:
    from airl_fast.models import load
    from bench.visit.smoke import cases

    with contextlib.ExitStack() as stack:
        for name in filter(lambda name: name.startswith("_check"), dir(load)):  # of a model's numbers, when it loads
            stack.enter_context(patch.object(load, name, lambda *args, **kwargs: None))
        for name, call in cases("cuda").items():
            log.case(f"smoke: {name}", call)


def _benchmark(log: _Log, shard: int, shards: int) -> None:
    """Every problem of the visit's headline and benchmark: verified and run as `bench.measure` does it."""
    import torch

    from bench.inputs import make_inputs
    from bench.peers import airl
    from bench.verify import Yardstick
    from bench.visit.benchmark import _problems

    device, dtype = torch.device("cuda"), torch.bfloat16

    def run(problem) -> None:
        call, full = airl.prepare(problem.case, problem.shape), make_inputs(problem.case, problem.shape, dtype, device)
        Yardstick(problem.case, problem.shape, dtype, device).check(call, full, ours=True)
        call(full)

    todo = dict.fromkeys((*_problems("headline", False), *_problems("benchmark", False)))
    with patch("bench.verify._one_step_at_a_time", lambda case, inputs: _nothing()):
        for problem in list(todo)[shard::shards]:
            log.case(f"{problem.case.op} {problem.case.mode} {problem.shape.name}", lambda p=problem: run(p))


def _nothing():
    from bench.cases import Result

    return Result(outputs=(), gradients=())


def _updates(log: _Log) -> None:
    """The updates of a step at real widths; and at token counts that are odd, for other specialisations of integers.
    Of a model's layers, which are alike, two."""
    import torch

    from bench import updates
    from bench.visit.updates import DISCRIMINATOR, POLICIES, SHAPE

    few = replace(SHAPE, prompts=2, group=4)
    for shape in (few, replace(few, completion_tokens=few.completion_tokens + 1)):
        setting = updates.setting_of(
            shape=shape, discriminator=DISCRIMINATOR, variants=("shared", "packed", "padded"), repeats=1, budget=None,
            device=torch.device("cuda"),
        )  # fmt: skip
        name = f"updates of {shape.completion_tokens} tokens a completion"
        shallow = {name: size | {"num_hidden_layers": 2} for name, size in updates.MODELS.items()}
        with patch.object(updates, "_time", _once), patch.object(updates, "MODELS", shallow):
            log.case(name, lambda s=setting: list(updates.measure(POLICIES, s)))


def _once(phase: Callable[[], object], device: object, repeats: int) -> tuple[float, float | None]:
    """The place of a measurement: every repetition launches the same."""
    phase()
    return 1.0, None


_KINDS = {"tests": _tests, "smoke": _smoke, "benchmark": _benchmark, "updates": _updates}
CALLERS = ("updates", "smoke", *(f"tests {n}/5" for n in range(5)), *(f"benchmark {n}/4" for n in range(4)))


# ---- assertions ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_outcome() -> Iterator[None]:
    """Modules of _JUDGES that are imported inside evaluate what they assert, and go on."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path, target=None):
        if not f"{name}.".startswith(_JUDGES):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str):
        tree = _Evaluate().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class _Evaluate(ast.NodeTransformer):
    """`assert x, y` becomes `try: x` and `except Exception: pass`."""

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        ignore = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
        return ast.copy_location(ast.Try([ast.Expr(node.test)], [ignore], [], []), node)
