"""Code on the pages of `docs/` runs as it stands, and the reference has every public name.

A block marked `python` is `ant_jax`'s side: those of a page run in their order, in one namespace. One marked `py` is
another library's side, and runs in a namespace of its own where that library is installed.
"""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
import types
import warnings
from typing import Any

import jax
import pytest

import ant_jax as ant
from ant_jax import testing
from ant_jax.interop import torch as ant_torch


DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


SET_UP = blocks("tutorial.md", "python")[0]
WITH_CODE = [page for page in PAGES if blocks(page, "python")]
OTHER_SIDES = [page for page in PAGES if blocks(page, "py")]


def run(code: list[str], page: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """Run blocks one after the other in a module of their own, which classes look up."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(given)
    for block in code:
        exec(compile(block, page, "exec"), vars(module))
    return vars(module)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Run in a directory of its own, under the promotion rules that users have, and compile without optimizing."""
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_disable_most_optimizations", True)  # a page compiles for longer than it trains
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # because other tests compare bits with what is compiled


def needs_torch(page: str) -> bool:
    return "torch" in "".join(blocks(page, "python"))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.torch if needs_torch(page) else ()) for page in WITH_CODE]
)
@pytest.mark.usefixtures("quick")
def test_a_page_runs(page, monkeypatch):
    code = blocks(page, "python")
    run([SET_UP, *code] if page.startswith("how-to/") else code, page, monkeypatch)


@pytest.mark.parametrize("page", OTHER_SIDES)
def test_the_other_side_can_be_parsed(page):
    for block in blocks(page, "py"):
        ast.parse(block)


@pytest.mark.torch
@pytest.mark.usefixtures("quick")
def test_the_torch_side_runs(monkeypatch):
    from benchmarks import torch_trainer

    run(blocks("guides/torch.md", "py"), "guides/torch.md", monkeypatch, **vars(torch_trainer))


@pytest.mark.torch
@pytest.mark.usefixtures("quick")
def test_the_lightning_side_runs(monkeypatch):
    pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(blocks("guides/lightning.md", "py"), "guides/lightning.md", monkeypatch)


@pytest.mark.usefixtures("quick")
def test_the_side_by_hand_runs(monkeypatch):
    run(blocks("guides/loop.md", "py"), "guides/loop.md", monkeypatch)


def test_the_keras_side_runs(tmp_path):
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    # A process of its own, because Keras reads its backend from the environment when it is imported.
    code = "\n".join(["import os", "os.environ['KERAS_BACKEND'] = 'jax'", *blocks("guides/keras.md", "py")])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def public_names(module: types.ModuleType) -> set[str]:
    there = {name: value for name, value in vars(module).items() if name[0] != "_"}
    return {name for name, value in there.items() if not isinstance(value, types.ModuleType)}


def defined_in(module: types.ModuleType) -> set[str]:
    return {name for name in public_names(module) if getattr(module, name).__module__ == module.__name__}


PUBLIC = {
    "ant_jax": public_names(ant),
    "ant_jax.callbacks": public_names(ant.callbacks) - public_names(ant),
    "ant_jax.metrics": defined_in(ant.metrics),
    "ant_jax.writers": public_names(ant.writers),
    "ant_jax.testing": public_names(testing),
    "ant_jax.interop.torch": defined_in(ant_torch),
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module):
    """A new public name needs its line in `docs/reference/`."""
    text = "".join(path.read_text() for path in DOCS.glob("reference/*.rst"))
    there = set(re.findall(rf"^\.\. (?:auto\w+|py:data):: {re.escape(module)}\.(\w+)$", text, re.MULTILINE))
    assert there == PUBLIC[module]


def test_the_files_that_the_architecture_names_exist():
    package = pathlib.Path(ant.__file__).parent
    names = re.findall(r"`(_[a-z_/]+)(?:\.py)?`", PAGES["architecture.md"])
    assert len(names) > 15
    for name in names:
        assert (package / f"{name}.py").exists() or (package / name).is_dir(), name


def test_the_table_of_hooks_has_every_hook_with_its_arguments():
    rows = re.findall(r"^\| (`on_.*?) \| `(.*?)` \|", PAGES["how-to/callbacks.md"], re.MULTILINE)
    shown = {name: arguments.split(", ") for names, arguments in rows for name in re.findall(r"on_\w+", names)}
    called = {name: [*([hook.lead] if hook.lead else []), "trainer", *hook.values] for name, hook in ant.HOOKS.items()}
    assert shown == called


def test_the_loop_is_shown_with_the_same_hooks_in_both_places():
    readme = (DOCS.parent / "README.md").read_text()
    loops = [
        re.findall(
            r"on_\w+", re.findall(r"^```(?:text)?\n(on_train_begin\n.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
        )
        for text in (readme, PAGES["architecture.md"])
    ]
    assert loops[0] == loops[1]
    assert {*loops[0], "on_exception"} == set(ant.HOOKS)
