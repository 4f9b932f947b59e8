"""Strict JAX for every test: promotions raise, several CPU devices, one compilation counter."""

import functools
import os
import pathlib
import re
import signal


os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Iterator  # noqa: E402  # XLA reads its flags when it is imported

import jax  # noqa: E402
import pytest  # noqa: E402


# A shell starts what runs in its background with Ctrl-C ignored, and the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@functools.cache
def _imports_torch(path: pathlib.Path) -> bool:
    return re.search(r"^(import|from) torch", path.read_text(), re.MULTILINE) is not None


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """Leave out the modules that import torch, where what needs it is deselected."""
    deselected = config.getoption("markexpr") == "not torch" and collection_path.suffix == ".py"
    return True if deselected and _imports_torch(collection_path) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of modules that import torch."""
    if item.path.suffix == ".py" and _imports_torch(item.path):
        item.add_marker("torch")


_compilations: list[str] = []


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("backend_compile_duration"):
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_count)


class Compilations:
    """Counts what XLA has compiled since the fixture was made, or since `reset`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._before = len(_compilations)

    @property
    def count(self) -> int:
        return len(_compilations) - self._before


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    yield Compilations()


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """For callbacks that measure: so that only the clock counts."""
    monkeypatch.setattr("ant_jax.callbacks._compile_time.CompileTime._add", lambda *arguments, **named: None)
