"""Imports go one way, and `import ant_jax` brings nothing heavy with it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ant_jax


PACKAGE = pathlib.Path(ant_jax.__file__).parent

# Bottom to top: a module may import those above its own line.
LAYERS = [
    {"_background", "_broadcasts", "_finite", "_interrupt", "_memories", "_pace", "_requirements", "_resources",
     "_seal", "_trees", "writers._names", "writers._paths", "writers._values", "writers._writer"},
    {"_encoding", "_packing", "_precision", "_summary", "_windows"},
    {"_logs"},
    {
        "_history", "_hyperparams", "_lock", "_objective", "_sums", "_model_state", "_modes", "metrics",
    },
    {"_host_fields", "_linen", "_nnx"},
    {"_models"},
    {"_arguments", "_state", "data"},
    {"_reader"},
    {"_branches", "_feed", "_hook_types", "_snapshot"},
    {"_callback"},
    {"_checking"},
    {"_checkpoint", "_judging", "_live"},
    {"_observed"},
    {"_events"},
    {"_step"},
    {"_engine"},
    {"_beginning", "_looks", "_run"},
    {"_observers", "_resume"},
    {"writers._open_runs", "writers._run_writer", "writers._tensorboard", "writers._text_file"},
    {f"writers._{name}" for name in ("csv", "json_lines", "mlflow", "wandb")},
    {"writers"},
    {f"callbacks._{name}" for name in ("averages", "compile_time", "printing", "runs")},
    {"callbacks._log_to", "callbacks._measures"},
    {f"callbacks._{name}" for name in (
        "batch_size", "checkpoint", "combinators", "freeze", "gradients", "guards", "log_progress", "logs", "plot",
        "profiling", "progress_bar", "schedules", "statistics", "stopping", "weights",
    )},
    {"callbacks"},
    {"_loop"},
    {"_trainer"},
    {""},
    {"testing._problem", "testing._recorder", "testing._compare", "testing._effects"},
    {"testing._check", "testing._resume"},
    {"testing"},
    {"interop", "interop._layouts", "interop._tensors"},
    {"interop._sides"},
    {"interop._report", "interop._requests"},
    {"interop._pairing"},
    {"interop.torch"},
]  # fmt: skip


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imported_by(path: pathlib.Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ant_jax":
            base = node.module.removeprefix("ant_jax").lstrip(".")
            names |= {base} if base else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "ant_jax" for alias in node.names), path
    return names


def test_every_module_has_its_layer():
    assert set(FILES) == set().union(*LAYERS)


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_from_layers_below_its_own(name):
    height = {module: level for level, layer in enumerate(LAYERS) for module in layer}
    for imported in imported_by(FILES[name]):
        assert height[imported] < height[name], f"{name or '__init__'} imports {imported}"


FOR_CALLBACKS = {
    "_arguments", "_background", "_branches", "_callback", "_finite", "_history", "_hyperparams", "_judging", "_logs",
    "_memories", "_objective", "_observed", "_packing", "_resources", "_seal", "_trees", "_windows",
}  # fmt: skip


def test_callbacks_and_writers_know_neither_trainer_nor_engine():
    for name, path in FILES.items():
        rooms = ("callbacks", "writers") if name.startswith("callbacks") else ("writers",)
        if name.startswith(("callbacks", "writers")):
            assert all(i in FOR_CALLBACKS or i.split(".")[0] in rooms for i in imported_by(path)), name


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
