"""The versions that the package needs, said where an import would fail otherwise."""

from __future__ import annotations

import importlib.metadata
import re


# As in pyproject.toml; a test holds them together.
REQUIRED = {"jax": "0.10", "flax": "0.12", "optax": "0.2.6", "orbax-checkpoint": "0.11.36"}


def require_versions() -> None:
    """Raise ImportError, with the command that mends it, if a package is missing or too old.

    pip holds to what a package asks for only while it installs that package; what is installed afterwards may undo it.
    """
    for package, least in REQUIRED.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or _numbers(found) < _numbers(least):
            raise ImportError(
                f"ant_jax needs {package} {least} or newer, and {found or 'none'} is installed; "
                f'pip install -U "{package}>={least}"'
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version as numbers.

    >>> _numbers("0.11.36.dev0")
    (0, 11, 36)
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


require_versions()  # before the imports that would fail without a word about versions
