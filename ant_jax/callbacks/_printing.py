"""Print lines where a progress bar may be on the screen."""

from __future__ import annotations


def print_beside_bars(line: str) -> None:
    """Print a line and leave tqdm's bars intact."""
    from tqdm import tqdm

    tqdm.write(line)
