"""Replacing functions of somebody else's package, in every module that already imported them, and back again."""

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any


def require_version(package: str, supported: tuple[str, ...]) -> str:
    """The installed version of a distribution.

    Raises RuntimeError when it is absent or its major.minor version is none of `supported`: the seam may have moved.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(f"{package} is not installed in this environment; nothing to patch.") from error
    if ".".join(version.split(".")[:2]) not in supported:
        raise RuntimeError(
            f"{package} {version} is not supported, only {', '.join(supported)}; install one of these or do not patch."
        )
    return version


class Swap:
    """Named attributes of a package's modules exchanged for ours, wherever the package's modules hold them.

    A module that wrote `from x import f` before keeps its own name for f. Hence every loaded module of the package is
    searched, not only the one that defines it; modules loaded later import the replacement.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._undo: list[tuple[Callable[[Any, Any, Any], None], Any, Any, Any]] = []

    def replace(self, module: str, name: str, ours: object) -> None:
        """Exchange module.name, under that name or another, in every loaded module of the package.

        Raises RuntimeError when module has no such name.
        """
        home = importlib.import_module(module)
        theirs = getattr(home, name, None)
        if theirs is None:
            raise RuntimeError(f"{module} has no {name}; this version of {self._package} is not supported.")
        prefix = self._package + "."
        for path, loaded in list(sys.modules.items()):
            if loaded is None or not (path == self._package or path.startswith(prefix)):
                continue
            for attribute, value in list(vars(loaded).items()):
                if value is theirs:
                    self._undo.append((setattr, loaded, attribute, theirs))
                    setattr(loaded, attribute, ours)

    def replace_item(self, registry: dict[str, object], key: str, ours: object) -> None:
        """Exchange one entry of a dictionary of the package."""
        self._undo.append((dict.__setitem__, registry, key, registry[key]))
        registry[key] = ours

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            put, holder, name, theirs = self._undo.pop()
            put(holder, name, theirs)


class Patch:
    """Swaps of one package that are in place or not. install: makes them, given the Swap to record them in."""

    def __init__(self, package: str, supported: tuple[str, ...], install: Callable[[Swap], None]) -> None:
        self._package, self.supported, self._install = package, supported, install
        self._active: Swap | None = None

    def apply(self) -> None:
        """Raises RuntimeError when the package is absent, of another version than `supported`, or patched already."""
        if self._active is not None:
            raise RuntimeError(f"{self._package} is patched already; call unpatch() first.")
        require_version(self._package, self.supported)
        swap = Swap(self._package)
        try:
            self._install(swap)
        except BaseException:  # a seam that is missing: leave the package as it was
            swap.undo()
            raise
        self._active = swap

    def undo(self) -> None:
        """Raises RuntimeError when nothing is patched."""
        if self._active is None:
            raise RuntimeError(f"{self._package} is not patched.")
        self._active.undo()
        self._active = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        self.apply()
        try:
            yield
        finally:
            self.undo()
