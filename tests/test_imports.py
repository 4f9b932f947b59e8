"""Imports go one way, and `import ant_jax` brings nothing heavy with it."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import ant_jax


PACKAGE = pathlib.Path(ant_jax.__file__).parent

# Bottom to top: a module may import from the rooms above its own row, and from its own room.
ROOMS = [
    {"_background", "_finite", "_interrupt", "_requirements", "_resources", "_trees", "metrics"},
    {"_logs"},
    {"_data", "_models", "_state"},
    {"_arguments"},
    {"_hooks"},
    {"_step"},
    {"_engine"},
    {"_checkpoint"},
    {"writers"},
    {"callbacks"},
    {"_loop"},
    {"_trainer"},
    {""},
    {"interop", "testing"},
]
# What callbacks may import: neither the trainer nor the engine, as a callback from outside of the package.
FOR_CALLBACKS = {
    "_arguments", "_background", "_finite", "_hooks", "_logs", "_resources", "_state", "_trees", "callbacks", "writers",
}  # fmt: skip
MODULES_FOR_CALLBACKS = {"_checkpoint.manifest", "_step.branches"}


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imported_by(path: pathlib.Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ant_jax":
            base = node.module.removeprefix("ant_jax").lstrip(".")
            inner = {".".join(filter(None, (base, alias.name))) for alias in node.names}
            names |= {name if name in FILES else base for name in inner}
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "ant_jax" for alias in node.names), path
    return names


def room_of(name: str) -> str:
    return name.partition(".")[0]


HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}


def test_every_module_has_its_room():
    assert {room_of(name) for name in FILES} == HEIGHT.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_from_its_room_and_those_below(name):
    for imported in imported_by(FILES[name]):
        below = HEIGHT[room_of(imported)] < HEIGHT[room_of(name)]
        assert below or room_of(imported) == room_of(name), f"{name or '__init__'} imports {imported}"


def test_there_is_no_import_cycle():
    graph = {name: imported_by(path) for name, path in FILES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_a_room_has_nothing_in_its_init():
    for name, path in FILES.items():
        if path.name == "__init__.py" and name.startswith("_"):
            (docstring,) = ast.parse(path.read_text()).body
            assert isinstance(docstring, ast.Expr), name


def test_callbacks_and_writers_know_neither_trainer_nor_engine():
    for name, path in FILES.items():
        if room_of(name) in ("callbacks", "writers"):
            others = imported_by(path) - MODULES_FOR_CALLBACKS
            assert {room_of(other) for other in others} <= FOR_CALLBACKS, name


def test_a_file_fits_in_the_head():
    """At most 400 lines a file and 60 a function, without its docstring and the functions in it."""
    long = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name for name, lines in long.items() if lines > 400} == set()
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                own = node.body[1 if ast.get_docstring(node) else 0 :]
                own = [part for part in own if not isinstance(part, ast.FunctionDef)]
                lines = sum((part.end_lineno or 0) - part.lineno + 1 for part in own)
                assert lines <= 60, f"{name}.{node.name}"


def test_no_private_jax():
    for path in FILES.values():
        assert "jax._src" not in path.read_text()


def test_importing_the_package_brings_nothing_heavy_with_it():
    heavy = [
        "orbax",
        "torch",
        "matplotlib",
        "tensorboard",
        "wandb",
        "mlflow",
        "sklearn",
        "flax.nnx.nn",
        "tqdm.auto",
        "grain",
    ]
    code = (
        "import sys, jax, flax, optax; before = set(sys.modules); import ant_jax; "
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_has_a_version():
    assert ant_jax.__version__.count(".") >= 2
