"""The runs of trackers that this process has open."""

from __future__ import annotations

import threading

from ant_jax.writers._writer import Start


OPEN_IDS: set[str] = set()
OPENING = threading.Lock()


def known_id(start: Start) -> str | None:
    """Return the id of the run to go on with.

    ``None`` while another run has it open, whose state this one was given.
    """
    return None if start.run_id in OPEN_IDS else start.run_id
