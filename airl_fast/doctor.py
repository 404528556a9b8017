"""`airl-fast doctor`: what this machine has, what it lacks, and what to do about it.

Versions come from package metadata; torch alone is imported, because only it can say whether it sees the GPU.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from airl_fast.processor import libraries, model_name

GIB = 2**30
Status = Literal["ok", "note", "fail"]

# What each package is for. The first group must be there; the accepted versions are those of the project's metadata.
REQUIRED = {
    "torch": "everything",
    "transformers": "models and tokenizers",
    "tokenizers": "tokenizers",
    "safetensors": "weights and checkpoints",
    "numpy": "evaluation",
    "pydantic": "configuration",
    "PyYAML": "configuration",
    "rich": "progress and tables",
    "psutil": "memory figures",
    "tensorboard": "logs/, unless tensorboard=false",
}
OPTIONAL = {
    "triton": "the kernels on a GPU",
    "peft": "LoRA",
    "bitsandbytes": "QLoRA and 8-bit optimisers",
    "vllm": "fast sampling on a GPU",
    "flash-attn": "attention by that package; torch's own runs without it",
    "trl": "the kernels inside TRL trainers",
    "wandb": "wandb=true",
    "matplotlib": "figures",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line. ok: as it should be. note: something optional is missing or tight. fail: a run cannot work."""

    section: str
    name: str
    value: str
    status: Status = "ok"
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """0 when a run can work here, 1 when something required is missing or broken."""
        return int(any(check.status == "fail" for check in self.checks))

    def as_dicts(self) -> list[dict[str, str]]:
        """The checks as plain records, for `--json`."""
        return [asdict(check) for check in self.checks]


def collect(directory: Path = Path()) -> Report:
    """Look at this machine. directory: where runs will be written; it need not exist yet."""
    torch, torch_check = _import_torch()
    checks = [
        *_packages(_accepted_versions()),
        torch_check,
        *_processors(torch),
        *_gpus(torch),
        _disk(directory),
        *_toolchain(),
        *_backends(torch),
    ]
    return Report(tuple(checks))


def render(report: Report) -> str:
    """The report as text: one line a check, its advice below it, and a verdict at the end."""
    lines: list[str] = []
    width = max(len(check.name) for check in report.checks)
    section = None
    for check in report.checks:
        if check.section != section:
            section = check.section
            lines += ["", section] if lines else [section]
        mark = {"ok": " ", "note": "-", "fail": "!"}[check.status]
        lines.append(f" {mark} {check.name:<{width}}  {check.value}")
        if check.advice:
            lines.append(f"   {'':<{width}}  -> {check.advice}")
    failed = [check.name for check in report.checks if check.status == "fail"]
    lines += ["", f"Fix first: {', '.join(failed)}." if failed else "Ready: nothing required is missing."]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- packages


def _accepted_versions() -> dict[str, SpecifierSet]:
    """The version ranges that the installed project declares; empty in a checkout that is not installed."""
    try:
        declared = importlib.metadata.requires("airl-fast") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {_canonical(r.name): r.specifier for r in map(Requirement, declared)}


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def _packages(accepted: Mapping[str, SpecifierSet]) -> Iterator[Check]:
    yield Check(section="Software", name="python", value=platform.python_version())
    for name, purpose in (REQUIRED | OPTIONAL).items():
        missing: Status = "fail" if name in REQUIRED else "note"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            value = f"not installed (needed for {purpose})"
            advice = f"pip install {name}, with the project's constraints.txt" if name in REQUIRED else ""
            yield Check(section="Software", name=name, value=value, status=missing, advice=advice)
            continue
        wanted = accepted.get(_canonical(name), SpecifierSet())
        if wanted.contains(version, prereleases=True):
            yield Check(section="Software", name=name, value=version)
        else:
            advice = f'pip install "{name}{wanted}"'
            yield Check(
                section="Software", name=name, value=f"{version} (supported: {wanted})", status=missing, advice=advice
            )


def _import_torch() -> tuple[ModuleType | None, Check]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken build raises ImportError, OSError or RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "install torch again, with the project's constraints.txt"
        return None, Check(
            section="Software", name="import torch", value=f"fails: {reason}", status="fail", advice=advice
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return torch, Check(section="Software", name="torch build", value=build)


# ---------------------------------------------------------------------------------------------- machine


def _processors(torch: ModuleType | None) -> Iterator[Check]:
    value = model_name()
    if torch is not None:
        value += f"; torch uses {torch.backends.cpu.get_cpu_capability()}"
    yield Check(section="Machine", name="processor", value=value)
    if torch is not None:  # with the processor and the threads, they decide in which order a product's terms add up
        found = libraries(torch.__config__.show())
        named = ", ".join(f"{name} {version}".strip() for name, version in found.items())
        yield Check(section="Machine", name="BLAS", value=named or "none that torch names")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    value = f"{usable} usable of {os.cpu_count()}"
    if (quota := cpu_quota()) is not None:
        value += f", limited to {quota:g} by the container"
    if torch is not None:
        value += f"; torch uses {torch.get_num_threads()} threads"
    yield Check(section="Machine", name="cores", value=value)
    memory = psutil.virtual_memory()
    limit = memory_limit()
    total = memory.total if limit is None else min(limit, memory.total)
    few: Status = "note" if min(memory.available, total) < 2 * GIB else "ok"
    yield Check(
        section="Machine",
        name="memory",
        value=f"{total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free",
        status=few,
        advice="the demo needs 2 GiB; close other programs" if few == "note" else "",
    )


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores that a container may use; None without a limit."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that a container may use; None without a limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gpus(torch: ModuleType | None) -> Iterator[Check]:
    if torch is None:
        return
    if not torch.cuda.is_available():
        present = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
        if not present:
            yield Check(section="Machine", name="GPU", value="none; runs use the CPU")
            return
        if torch.version.cuda is None:
            advice = "this torch is a CPU build; install the CUDA build from pytorch.org"
        else:
            advice = f"the driver is older than CUDA {torch.version.cuda} needs, or hidden; see nvidia-smi"
        value = "present, but torch cannot use it"
        yield Check(section="Machine", name="GPU", value=value, status="note", advice=advice)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        old = gpu.major < 8
        yield Check(
            section="Machine",
            name=f"GPU {index}",
            value=f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{total / GIB:.0f} GiB, {free / GIB:.0f} GiB free",
            status="note" if old else "ok",
            advice="below 8.0 there is no fast bfloat16; set model.dtype=float32" if old else "",
        )


def _disk(directory: Path) -> Check:
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    value = f"{free / GIB:.1f} GiB free for {directory.absolute()}"
    try:  # rights say too little: a read-only or virtual file system refuses root as well
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        advice = "choose another output directory"
        return Check(section="Machine", name="disk", value=f"{existing} is not writable", status="fail", advice=advice)
    if free < 2 * GIB:
        advice = "checkpoints of anything but the tiny preset will not fit"
        return Check(section="Machine", name="disk", value=value, status="note", advice=advice)
    return Check(section="Machine", name="disk", value=value)


# ---------------------------------------------------------------------------------------------- compilers, kernels


def _toolchain() -> Iterator[Check]:
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        yield Check(
            section="Kernels",
            name="C++ compiler",
            value="not found (needed for the C++ kernels, and by Triton on a GPU)",
            status="note",
            advice="install g++ or clang++, or set CXX",
        )
    else:
        yield Check(section="Kernels", name="C++ compiler", value=_first_line_of([compiler, "--version"]))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        yield Check(
            section="Kernels",
            name="Python.h",
            value="not found (needed by Triton on a GPU)",
            status="note",
            advice=f"install the headers of Python {platform.python_version()} (python3-dev)",
        )


def _first_line_of(command: list[str]) -> str:
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return out.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"{command[0]} does not run ({type(error).__name__})"


def _backends(torch: ModuleType | None) -> Iterator[Check]:
    """Which implementation would run here, for the operations and for attention."""
    if torch is None:
        return
    yield _native()
    cuda = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    if cuda and not triton:
        yield Check(
            section="Kernels",
            name="CUDA operations",
            value="none, because Triton is not installed",
            status="fail",
            advice="pip install triton, with the project's constraints.txt",
        )
    elif cuda:
        yield Check(section="Kernels", name="CUDA operations", value="Triton")
    attention = "torch SDPA"
    if cuda and torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability()[0] >= 8:
        attention += ", flash kernels"
    yield Check(section="Kernels", name="attention", value=attention)


def _native() -> Check:
    """Whether the operations run in C++ or in plain torch on the CPU, and why."""
    try:
        native = importlib.import_module("airl_kernels.native")
    except Exception as error:
        advice = "install the project again (make setup)"
        value = f"airl_kernels does not import: {error}"
        return Check(section="Kernels", name="CPU operations", value=value, status="fail", advice=advice)
    state = native.status()
    if state.available:
        return Check(section="Kernels", name="CPU operations", value="C++")
    return Check(
        section="Kernels",
        name="CPU operations",
        value=f"plain torch: {state.reason}",
        status="note",
        advice="correct but slower; with a C++ compiler, make setup builds them",
    )
