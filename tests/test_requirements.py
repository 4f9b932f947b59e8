"""What is missing or too old is named, with the command that mends it."""

import importlib.metadata
import pathlib
import tomllib

import pytest

from ant_jax._requirements import REQUIRED, require_versions


def test_they_are_those_of_the_package():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    stated = dict(line.split(">=") for line in project["dependencies"])
    assert REQUIRED == {package: stated[package] for package in REQUIRED}


@pytest.mark.parametrize(("package", "found"), [("jax", "0.4.30"), ("orbax-checkpoint", "0.11.5"), ("optax", None)])
def test_what_is_too_old_is_named(package, found, monkeypatch):
    require_versions()
    version = importlib.metadata.version

    def old(name: str) -> str:
        if name == package and found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(found) if name == package else version(name)

    monkeypatch.setattr(importlib.metadata, "version", old)
    message = f'needs {package} .* or newer, and {found or "none"} is installed; pip install -U "{package}>='
    with pytest.raises(ImportError, match=message):
        require_versions()
