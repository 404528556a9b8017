"""The two wheels, built by `make dist` and used in an empty environment outside the checkout; the cost of an import."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_SECONDS = 0.3
IMPORT_COST = """
import json, sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import airl_kernels
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
ONE_OP = """
import json, torch, airl_kernels
torch.manual_seed(0)
hidden, weight, ids = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
value = airl_kernels.linear_logprob(hidden, weight, ids)
expected = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(5), ids]
status = airl_kernels.native.status()
print(json.dumps([airl_kernels.__file__, torch.allclose(value, expected, atol=1e-6), status.available]))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """What `make dist` puts into its folder."""
    folder = tmp_path_factory.mktemp("dist")
    tools = [f"DIST={folder}", f"BIN={Path(sys.executable).parent}"]
    subprocess.run(["make", "-o", "setup", "dist", *tools], cwd=ROOT, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def empty(dist, tmp_path_factory) -> Path:
    """The bin folder of a new environment with our wheels; torch and the other requirements are this one's."""
    home = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    Path(site, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q", "--no-deps"]
    wheels = sorted(map(str, dist.glob("*.whl")))
    subprocess.run([*install, "--no-index", "--ignore-installed", *wheels], check=True)
    return home / "bin"


def run(empty: Path, *command: str, **settings) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "AIRL_KERNELS_NATIVE")}
    return subprocess.run(
        [str(empty / command[0]), *command[1:]],
        capture_output=True, text=True, cwd=empty, env=environment, check=False, **settings,
    )  # fmt: skip


def requirements(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    required = (line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: "))
    return {line.split(">")[0].split("<")[0].split(";")[0].strip() for line in required if "extra ==" not in line}


def test_the_wheels_are_pure_and_name_their_requirements(dist):
    (kernels,), (trainer,) = dist.glob("airl_kernels-*-py3-none-any.whl"), dist.glob("airl_fast-*-py3-none-any.whl")
    assert requirements(kernels) == {"torch", "triton"}
    assert {"airl-kernels", "torch", "transformers"} <= requirements(trainer)
    names = zipfile.ZipFile(kernels).namelist()
    assert "airl_kernels/py.typed" in names and "airl_kernels/integrations/liger.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
    assert {name.split("/")[0] for name in names} == {"airl_kernels", kernels.name.split("-py3")[0] + ".dist-info"}
    shipped = {Path(name).name for name in zipfile.ZipFile(trainer).namelist() if "/presets/" in name}
    assert {path.name for path in (ROOT / "airl_fast" / "presets").glob("*.yaml")} <= shipped


def test_the_source_distribution_has_the_cpp_sources_and_no_library(dist):
    (archive,) = dist.glob("airl_kernels-*.tar.gz")
    with tarfile.open(archive) as source:
        names = {name.split("/", 1)[1] for name in source.getnames() if "/" in name}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {"LICENSE", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_an_op_of_the_installed_wheel_outside_the_checkout(empty):
    result = run(empty, "python", "-c", ONE_OP)
    assert result.returncode == 0, result.stderr
    file, right, native = json.loads(result.stdout)
    assert Path(file).is_relative_to(empty.parent) and right and not native


def test_the_installed_commands_outside_the_checkout(empty):
    presets = run(empty, "airl-fast", "presets")
    assert presets.returncode == 0, presets.stderr
    assert "llama3.1-8b" in presets.stdout and "tiny-grpo" in presets.stdout
    bench = run(empty, "airl-fast", "bench", "ops")
    sentence = bench.stderr.strip()
    assert bench.returncode == 2 and "bench" in sentence and "Traceback" not in sentence
    assert len(sentence.splitlines()) == 1, sentence


def test_importing_the_library_is_cheap_and_leaves_triton_and_transformers_alone():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    fastest, modules = float("inf"), set()
    for _ in range(2):
        command = [sys.executable, "-c", IMPORT_COST]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        seconds, loaded = json.loads(output)
        fastest, modules = min(fastest, seconds), modules | set(loaded)
    assert fastest < IMPORT_SECONDS
    assert "airl_kernels" in modules and not modules & {"triton", "transformers", "trl", "verl", "liger_kernel"}


def test_every_adapter_imports_without_the_trainer_it_is_for():
    """The module itself needs torch only; the trainer is needed by patch()."""
    names = ("verl", "openrlhf", "liger")
    code = "import sys" + "".join(f", airl_kernels.integrations.{name}" for name in names)
    code += f"; print([m for m in ({', '.join(map(repr, names))}, 'liger_kernel', 'triton') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
