"""Whether an optional package is there, and which version."""

import importlib
from importlib.metadata import PackageNotFoundError, version


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def why_absent(distribution: str, module: str) -> str | None:
    """None when `module` can be imported, otherwise the reason in one sentence."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that fails at import must not end the measurements of the others
        if installed(distribution) is None:
            return f"{distribution} is not installed (`make peers` installs it)."
        return f"{distribution} cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None
