"""The digits-sized MLP with callbacks that do next to nothing, so that what they cost is the calling."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import ant_jax as ant
from benchmarks.compare import by_trainer
from benchmarks.compare.peers import Train
from benchmarks.compare.workloads import Workload


def by_ant(workload: Workload, kind: str, count: int) -> Train:
    """So many callbacks of a kind."""
    make = {"traced": traced, "100": lambda name: on_host(name, 100), "each": lambda name: on_host(name, 1)}[kind]
    return by_trainer.trainer(workload, [make(f"callback_{i}") for i in range(count)])


def traced(name: str) -> ant.Callback:
    """Keeps a running mean of the loss, inside the step."""

    def on_batch_end(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        mean = 0.9 * state.callback_states[name] + 0.1 * logs["loss"]
        return state.with_callback_state(name, mean), logs

    return ant.Callback(name=name, init=lambda state: jnp.float32(0), traced=True, on_batch_end=on_batch_end)


def on_host(name: str, every: int) -> ant.Callback:
    """Looks, and does nothing."""
    return ant.Callback(name=name, every=every, on_batch_end=lambda batch_idx, trainer, state, logs: (state, logs))


def by_torch(workload: Workload, count: int, threads: int = 1) -> Train:
    """So many callbacks of the torch trainer, which do nothing at every batch."""
    from benchmarks.compare import by_torch as torch_side
    from benchmarks.torch_trainer import Callback

    class Idle(Callback):
        def on_batch_end(self, batch_idx: int, trainer: Any, logs: dict[str, Any] | None = None) -> None:
            pass

    return torch_side.trainer(workload, callbacks=[Idle() for _ in range(count)], threads=threads)
