"""What a memory with an average looks like, for those that keep one and those that must know."""

from __future__ import annotations

from typing import Any


def evaluated(memory: Any) -> bool:
    """Whether a memory has an average that takes the place of the parameters in evaluations.

    >>> evaluated({"average": {}, "swapped": False}), evaluated({"average": {}})
    (True, False)
    """
    return isinstance(memory, dict) and memory.keys() >= {"average", "swapped"}
