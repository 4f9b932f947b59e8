"""How fast a run is, and what memory it takes, as logs."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ant_jax._arguments import check_function, check_positive
from ant_jax._hooks.callback import Callback
from ant_jax.callbacks._compile_time import CompileTime
from ant_jax.callbacks._runs import PerRun


# Dense bfloat16 operations per second (float16, of V100 and T4) of one JAX device, from the makers' data sheets; of a
# TPU v2 or v3 that is one of a chip's two cores. The first that occurs in a device's kind counts.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p?": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
    "TPU v2": 22.5e12,
}


def throughput(
    *,
    peak_flops: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "throughput",
) -> Callback:
    """Log how many examples a second an epoch has trained on, and how much of the device's arithmetic that is.

    On the host, at the ends of epochs; it waits for the device there and nowhere else. The time is that of the epoch's
    batches, waiting for data included, compilation and evaluation not.

    ``logs["examples_per_second"]``, and ``logs["mfu"]``, the model-FLOP utilisation: operations a second over the most
    that the devices are made for. The operations are those that XLA counts in the step: what ``jax.checkpoint``
    computes again counts again, and the body of a loop over layers once.

    Args:
        peak_flops: operations a second of one device; ``None``: bfloat16 without sparsity, from a table of common GPUs
            and TPUs. For a device that is not in it, such as a CPU, there is no ``mfu``.
        clock: returns seconds.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback.

    Raises:
        ValueError: ``peak_flops`` is not positive.
        TypeError: ``clock`` is not a function without arguments.

    References:
        Chowdhery et al., PaLM: scaling language modeling with pathways, 2022, appendix B,
        https://arxiv.org/abs/2204.02311

    >>> throughput()
    Callback(name='throughput', hooks=on_train_begin, on_epoch_begin, on_evaluate_begin, on_epoch_end, on_train_end, \
on_exception)
    """
    if peak_flops is not None:
        check_positive("throughput", "peak_flops", peak_flops)
    check_function("throughput", "clock", clock)
    meters: PerRun[_Meter] = PerRun(lambda meter: meter.compiling.stop())

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        meters.close(trainer)
        meters.open(trainer, _Meter(clock, state))
        return state, logs

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch
        meter = meters.of(trainer)
        if meter is not None:
            meter.begin(state)
        else:  # a combinator has left out the beginning of the run
            meters.open(trainer, _Meter(clock, state))
        return state, logs

    def of_epoch(trainer: Any, state: Any) -> _Meter | None:
        """The meter, unless it has not seen this epoch begin."""
        meter = meters.of(trainer)
        return meter if meter is not None and meter.epoch == state.epoch else None

    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> Any:
        meter = of_epoch(trainer, state)
        if meter is not None:
            meter.end(state)
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch
        meter = of_epoch(trainer, state)
        if meter is not None:
            meter.end(state)
            jax.block_until_ready([*logs.values()])  # or what is left of the evaluation would count in the next epoch
            logs = {**logs, "examples_per_second": meter.rate}
            devices = state.step.devices()
            peak = len(devices) * (peak_flops or _peak_flops_of(next(iter(devices)).device_kind) or 0.0)
            flops = trainer.costs.flops_per_example
            if peak and flops is not None:
                logs["mfu"] = meter.rate * flops / peak
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        meters.close(trainer)
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del exception
        meters.close(trainer)
        return state, logs

    return Callback(
        name=name,
        on_train_begin=on_train_begin,
        on_epoch_begin=on_epoch_begin,
        on_evaluate_begin=on_evaluate_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
    )


class _Meter:
    """Times the batches of epochs."""

    def __init__(self, clock: Callable[[], float], state: Any):
        self._clock = clock
        self.compiling = CompileTime()
        self.begin(state)

    def begin(self, state: Any) -> None:
        self._began, self._compiled, self._examples = self._clock(), self.compiling.seconds, state.examples
        self.epoch, self._ended = state.epoch, False

    def end(self, state: Any) -> None:
        if self._ended:  # before the evaluation
            return
        jax.block_until_ready(state.params)
        seconds = self._clock() - self._began - (self.compiling.seconds - self._compiled)
        # Infinite by a clock that has not moved, so that it does not depend on where in its epoch a run began.
        self.rate = (state.examples - self._examples) / seconds if seconds > 0 else math.inf
        self._ended = True


def _peak_flops_of(kind: str) -> float | None:
    return next((flops for key, flops in _PEAK_FLOPS.items() if re.search(rf"\b{key}\b", kind, re.IGNORECASE)), None)


def memory(*, reader: Callable[[Any], Mapping[str, int]] | None = None, name: str = "memory") -> Callback:
    """Log the memory of the fullest device at the end of every epoch.

    On the host. ``logs["memory"]`` is what is in use and ``logs["memory_peak"]`` the most that ever was, both in GiB. A
    CPU has no memory of its own: there they are the arrays that are alive and the most that the process ever took.

    Args:
        reader: returns ``{"bytes_in_use": ..., "peak_bytes_in_use": ...}`` of a device; by default,
            ``device.memory_stats()``.
        name: of the callback; it keeps no memory of its own.

    Returns:
        A host callback.

    Raises:
        TypeError: ``reader`` is not a function of a device.

    >>> memory()
    Callback(name='memory', hooks=on_epoch_end)
    """
    check_function("memory", "reader", reader, "device", optional=True)

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch, trainer
        in_use, peak = memory_in_gib(reader)
        return state, {**logs, "memory": in_use, "memory_peak": peak}

    return Callback(name=name, on_epoch_end=on_epoch_end)


def memory_in_gib(reader: Callable[[Any], Mapping[str, int]] | None = None) -> tuple[float, float]:
    """What the fullest device of this process has in use and has ever had, in GiB; arguments as for ``memory``."""
    stats = [(reader or _stats_of)(device) for device in jax.local_devices()]
    in_use, peak = (max(of_device[key] for of_device in stats) for key in ("bytes_in_use", "peak_bytes_in_use"))
    return in_use / 2**30, peak / 2**30


def _stats_of(device: Any) -> Mapping[str, int]:
    stats = device.memory_stats()
    if stats is not None:
        return stats
    alive = sum(array.nbytes for array in jax.live_arrays(device.platform) if device in array.devices())
    return {"bytes_in_use": alive, "peak_bytes_in_use": _peak_of_process()}


def _peak_of_process() -> int:
    """Bytes; 0 on Windows, whose Python has no module to ask."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
