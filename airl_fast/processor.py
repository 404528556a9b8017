"""The processor, and the libraries that compute on it: what the last bits of a result depend on, on the CPU."""

import platform
import re
from pathlib import Path
from types import ModuleType

# As `torch.__config__.show()` names them.
_LIBRARIES = {
    "MKL": r"oneAPI Math Kernel Library Version (\d[\w.]*)|Math Kernel Library Version (\d[\w.]*)",
    "OpenBLAS": r"OpenBLAS (\d[\w.]*)",
    "oneDNN": r"MKL-DNN v(\d[\w.]*)|oneDNN v(\d[\w.]*)",
}


def model_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """As the processor calls itself; its architecture where the system does not say."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def libraries(configuration: str) -> dict[str, str]:
    """Versions of the libraries that torch takes matrix products from, out of `torch.__config__.show()`.

    The BLAS's bare name, with an empty version, where torch says no more.
    """
    found = {}
    for name, pattern in _LIBRARIES.items():
        if match := re.search(pattern, configuration):
            found[name] = next(group for group in match.groups() if group)
    blas = re.search(r"BLAS_INFO=(\w+)", configuration)
    if blas and not {"MKL", "OpenBLAS"} & found.keys():
        found = {{"open": "OpenBLAS"}.get(blas[1], blas[1]): ""} | found
    return found


def processor(torch: ModuleType) -> dict[str, object]:
    """{model, capability, libraries}. capability: the instruction set of torch's own kernels."""
    return {
        "model": model_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "libraries": libraries(torch.__config__.show()),
    }
