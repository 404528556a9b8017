"""The doctor: its facts are those of this machine, and each lack has its line and its advice."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from airl_kernels import native
from packaging.specifiers import SpecifierSet

from airl_fast import doctor
from airl_fast.doctor import Check, Report, collect, render
from airl_fast.processor import libraries, model_name

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"


def by_name(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


@pytest.fixture(scope="module")
def here() -> dict[str, Check]:
    return by_name(collect(ROOT))


def test_versions_are_those_installed(here: dict[str, Check]) -> None:
    for name in ("torch", "transformers", "safetensors"):
        assert here[name].value == importlib.metadata.version(name) and here[name].status == "ok"
    assert set(doctor.REQUIRED | doctor.OPTIONAL) <= set(here)


def test_machine_figures_are_true(here: dict[str, Check], tmp_path: Path) -> None:
    total = float(here["memory"].value.split(" GiB")[0])
    assert 0 < total <= psutil.virtual_memory().total / 2**30 + 0.05
    assert f"torch uses {torch.get_num_threads()} threads" in here["cores"].value
    disk = doctor._disk(tmp_path / "not" / "yet")
    free = float(disk.value.split(" GiB")[0])
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, abs=0.5)
    assert str(tmp_path / "not" / "yet") in disk.value and not (tmp_path / "not").exists()


def test_processor_and_blas_are_those_of_torch(here: dict[str, Check]) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    assert here["processor"].value == f"{model_name()}; torch uses {capability}"
    for name, version in libraries(torch.__config__.show()).items():
        assert f"{name} {version}".strip() in here["BLAS"].value and version in torch.__config__.show()
    code = "from airl_fast import doctor; print(doctor.render(doctor.collect()))"
    lowered = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=lowered, check=True)
    assert re.search(r"processor\s+.+; torch uses (DEFAULT|NO AVX)\b", shown.stdout), shown.stdout


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        (
            "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605\n"
            "  - Intel(R) MKL-DNN v3.12.0 (Git Hash 80afa)\n  - Build settings: BLAS_INFO=mkl",
            {"MKL": "2024.2", "oneDNN": "3.12.0"},
        ),
        ("PyTorch built with:\n  - Build settings: BLAS_INFO=open, LAPACK_INFO=open", {"OpenBLAS": ""}),
        ("  - Build settings: BLAS_INFO=accelerate", {"accelerate": ""}),
        ("PyTorch built with:", {}),
    ],
)
def test_libraries_that_torch_names(configuration: str, expected: dict[str, str]) -> None:
    assert libraries(configuration) == expected


def test_the_processor_names_itself_or_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9V74\nmodel name\t: second\n")
    assert model_name(tmp_path / "cpuinfo") == "AMD EPYC 9V74"
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 50\n")
    for path in (tmp_path / "arm", tmp_path / "absent"):
        assert platform.machine() in model_name(path) or model_name(path) == platform.processor()


def test_gpu_lines_agree_with_torch(here: dict[str, Check]) -> None:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        assert torch.cuda.get_device_name(0) in here["GPU 0"].value
        assert f"compute capability {major}.{minor}" in here["GPU 0"].value
        assert here["CUDA operations"].value == "Triton"
    else:
        assert "CUDA operations" not in here and ("GPU" in here)


def test_kernels_line_is_what_runs(here: dict[str, Check]) -> None:
    line = here["CPU operations"]
    assert line.value.startswith(("plain torch", "C++")) and line.status != "fail"


def test_a_missing_required_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("transformers", "peft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = collect(ROOT)
    checks = by_name(report)
    assert checks["transformers"].status == "fail" and "pip install transformers" in checks["transformers"].advice
    assert checks["peft"].status == "note" and checks["peft"].value == "not installed (needed for LoRA)"
    assert report.exit_status == 1
    assert render(report).endswith("Fix first: transformers.")


@pytest.mark.parametrize(("wanted", "status"), [(">=2.0", "ok"), ("<2.0", "fail")])
def test_versions_are_held_against_the_declared_range(wanted: str, status: str) -> None:
    checks = {c.name: c for c in doctor._packages({"torch": SpecifierSet(wanted)})}
    assert checks["torch"].status == status
    if status == "fail":
        assert checks["torch"].value.endswith("(supported: <2.0)")
        assert checks["torch"].advice == 'pip install "torch<2.0"'


def test_a_torch_that_does_not_import_is_reported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    code = (
        "from airl_fast.doctor import collect, render; r = collect(); print(render(r)); raise SystemExit(r.exit_status)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 1 and "fails: libcudart.so.13: cannot open shared object file" in out.stdout, out.stderr
    assert out.stdout.strip().endswith("Fix first: import torch.")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    compiler = next(iter(doctor._toolchain()))
    assert (compiler.status, compiler.advice) == ("note", "install g++ or clang++, or set CXX")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiler_is_named_with_its_version() -> None:
    line = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    assert next(iter(doctor._toolchain())).value == line


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)])
def test_container_limits(tmp_path: Path, text: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert doctor.cpu_quota(tmp_path / "cpu.max") == cores
    assert doctor.cpu_quota(tmp_path / "absent") is None
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert doctor.memory_limit(tmp_path / "memory.max") == 2**31
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory_limit(tmp_path / "memory.max") is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody may create files")
def test_unwritable_directory() -> None:
    check = doctor._disk(Path("/proc/runs"))
    assert (check.status, check.value) == ("fail", "/proc is not writable")


def test_a_nearly_full_disk_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    check = doctor._disk(tmp_path)
    assert check.status == "note" and check.value.startswith("1.0 GiB free")


def test_render_shows_each_check_with_its_advice() -> None:
    checks = (
        Check(section="A", name="one", value="1"),
        Check(section="A", name="longer", value="2", status="note", advice="do this"),
        Check(section="B", name="two", value="3"),
    )
    assert render(Report(checks)).splitlines() == [
        "A",
        "   one     1",
        " - longer  2",
        "           -> do this",
        "",
        "B",
        "   two     3",
        "",
        "Ready: nothing required is missing.",
    ]
    assert json.loads(json.dumps(Report(checks).as_dicts()))[1]["advice"] == "do this"


def test_only_torch_is_imported() -> None:
    code = (
        "import sys; from airl_fast import doctor\n"
        "assert 'torch' not in sys.modules\n"
        "doctor.collect()\n"
        "print([m for m in ('transformers', 'peft', 'bitsandbytes', 'vllm', 'trl', 'wandb') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{KERNELS}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "[]", out.stderr


def test_says_whether_the_native_operations_run(tmp_path):
    """Against what the library itself says, in a process with and in one without them."""
    code = "from airl_fast import doctor; print(doctor.render(doctor.collect()))"
    switched_off = os.environ | {"AIRL_KERNELS_NATIVE": "0"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=switched_off, check=True)
    assert "plain torch: AIRL_KERNELS_NATIVE=0 is set." in shown.stdout
    if native.status().available:
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert re.search(r"CPU operations\s+C\+\+", shown.stdout)
