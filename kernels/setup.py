"""Builds the C++ kernels of ../csrc beside the Python package, when it can.

They are optional: without a compiler, without torch in the build environment (pip's isolated builds have none) or
with AIRL_KERNELS_NATIVE=0 the package installs without them, says so, and runs its plain-torch bodies on the CPU.
To have them: pip install --no-build-isolation ./kernels, or the source distribution in place of ./kernels.

A wheel built with AIRL_KERNELS_NATIVE=0 is pure Python and fits every torch; that is the one to publish. The library
is tied to the torch it was compiled against, so it is compiled where it is used, from the source distribution.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError, CCompilerError

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc" if (HERE / "csrc").is_dir() else HERE.parent / "csrc"  # in a source distribution: beside us
SOURCES = sorted(CSRC.glob("*.cpp"))
NATIVE = os.environ.get("AIRL_KERNELS_NATIVE") != "0"


class BuildNative(build_ext):
    """Compiles csrc into airl_kernels/_native.so with torch's own flags; a failure is a message, not an error."""

    def run(self) -> None:
        reason = self._reason_to_skip()
        if reason is None:
            try:
                super().run()
                return
            except (BaseError, CCompilerError, OSError) as error:
                reason = f"the build failed: {error}"
        for extension in self.extensions:  # an earlier build's library must not be taken for this one's
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        sys.stderr.write(f"airl-kernels: installed without its C++ CPU kernels, because {reason}\n")

    @staticmethod
    def _reason_to_skip() -> str | None:
        if not SOURCES:
            return "the csrc directory is not beside the package."
        try:
            import torch  # noqa: F401
        except ImportError:
            return "torch is not in the build environment; use pip install --no-build-isolation."
        return None

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        openmp = "-fopenmp" if sys.platform == "linux" else "-fopenmp-simd"  # at::parallel_for runs serially without
        objects = self.compiler.compile(
            [os.path.relpath(source) for source in SOURCES],
            output_dir=str(Path(self.build_temp).resolve()),
            include_dirs=include_paths(),
            extra_postargs=["-O3", "-g0", "-std=c++20", "-fPIC", openmp, "-fno-math-errno", "-fno-trapping-math"],
        )
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["c10", "torch_cpu"],
            library_dirs=library_paths(),
            runtime_library_dirs=library_paths(),
            extra_postargs=[openmp],
            target_lang="c++",
        )

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in the name: it does not use Python


class SourceDistribution(sdist):
    """Takes along csrc and the licence, which the repository keeps outside this directory."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(CSRC, Path(base_dir) / "csrc", dirs_exist_ok=True)
        shutil.copy(CSRC.parent / "LICENSE", base_dir)


setup(
    ext_modules=[Extension("airl_kernels._native", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": BuildNative, "sdist": SourceDistribution},
)
