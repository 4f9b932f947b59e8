"""A batch size that changes while training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ant_jax._arguments import check_choice, check_count, refuse
from ant_jax._hooks.callback import Callback


def batch_size_schedule(
    sizes: Mapping[int, int], *, per: Literal["epoch", "batch"] = "epoch", name: str = "batch_size_schedule"
) -> Callback:
    """Change the batch size of the training loader, an :class:`ant_jax.ArrayLoader`, and log it.

    On the host, once an epoch: a size that begins inside an epoch is asked for beforehand, so the host need not look at
    the batches. Every size is a program of its own, compiled when it first comes; a last batch of an epoch that is
    shorter is one, too, unless the loader has ``drop_last``. ``logs["batch_size"]`` of ``on_epoch_end`` is the epoch's
    last one. The order of the examples stays as it is: none comes twice or is left out.

    Args:
        sizes: examples in a batch from an epoch (or batch) on: ``{0: 32, 10: 64}``. It must say from 0 on.
        per: what is counted, from 0: ``"epoch"``, or ``"batch"``, batches since ``init``.
        name: of the callback. Per batch its memory is ``{"batches": int}``, those before the epoch under way; per epoch
            it keeps none.

    Returns:
        A host callback.

    Raises:
        ValueError: ``sizes`` is not a mapping of whole numbers that begins at 0, or ``per`` is neither.
        BatchError: at the beginning of ``fit``, when the training loader is no ``ArrayLoader``.

    References:
        Smith et al., Don't decay the learning rate, increase the batch size, 2017, https://arxiv.org/abs/1711.00489

    >>> batch_size_schedule({0: 32, 10: 64, 20: 128})
    Callback(name='batch_size_schedule', hooks=on_epoch_begin, on_epoch_end)
    """
    check_choice("batch_size_schedule", "per", per, "epoch", "batch")
    if not isinstance(sizes, Mapping) or 0 not in sizes:
        refuse("batch_size_schedule", "sizes", f"a mapping {{{per}: batch size}} that has 0", sizes)
    for start, size in sizes.items():
        check_count("batch_size_schedule", f"the {per} from which {size!r} holds", start, least=0)
        check_count("batch_size_schedule", f"sizes[{start}]", size, unit="examples")
    plan = {int(start): int(size) for start, size in sorted(sizes.items())}

    def init(state: Any) -> Any:
        del state
        return {"batches": 0} if per == "batch" else None

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        now = epoch if per == "epoch" else state.callback_states[name]["batches"]
        size = [size for start, size in plan.items() if start <= now][-1]
        if size != state.batch_size:
            state = state.request_batch_size(size)
        if per == "batch":
            for start, size in plan.items():
                if start > now:
                    state = state.request_batch_size(size, from_batch=start - now)
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch, trainer
        logs = {**logs, "batch_size": state.batch_size}
        if per == "epoch":
            return state, logs
        batches = state.callback_states[name]["batches"] + state.batch_idx
        return state.with_callback_state(name, {"batches": batches}), logs

    return Callback(name=name, init=init, on_epoch_begin=on_epoch_begin, on_epoch_end=on_epoch_end)
