"""What the README shows runs as it stands."""

import pathlib
import re
from typing import Any

import jax
import pytest


README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_what_it_shows_runs(capsys):
    names: dict[str, Any] = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
            assert block is not BLOCKS[0] or names["history"][-1]["val_accuracy"] > 0.9
    printed = capsys.readouterr().out
    assert "val_accuracy" in printed and "the run begins" in printed


def test_the_first_example_is_about_fifteen_lines():
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 18


@pytest.mark.parametrize("command", ['pip install ".[examples]" && python examples/01_digits.py', "pytest"])
def test_the_two_commands_are_there(command):
    assert re.search(rf"^.*{re.escape(command)}$", README, re.MULTILINE)
