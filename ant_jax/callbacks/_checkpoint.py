"""Save the run while it goes on."""

from __future__ import annotations

import os
from typing import Any, Literal

from ant_jax._callback import Callback
from ant_jax.callbacks._arguments import check_choice, check_count


def checkpoint(
    directory: str | os.PathLike[str],
    *,
    every: int | None = None,
    keep: int = 3,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    save_last: bool = True,
    name: str = "checkpoint",
) -> Callback:
    """Save the run at the end of every epoch, and every so many batches.

    On the host, in ``on_checkpoint``, when all callbacks of that moment have run, so that what they remember is saved
    as it then is. Orbax writes in the background: training waits only while the state is copied, and, with a
    ``monitor``, until the epoch's metric is there. What is under way is finished on every way out of ``fit``. Restore
    with ``trainer.restore(directory)``; ``fit`` then goes on, bit for bit. After the run,
    ``with trainer.checkpointer(directory, mode="min") as saved: saved.best_step`` is the step of the best checkpoint.

    Args:
        directory: where to; it is made. It may hold checkpoints of this run up to where it goes on, and no later ones.
        every: also save every so many batches; ``None``: at the ends of epochs only.
        keep: how many checkpoints to keep: the newest, or the best.
        monitor: a log of ``on_epoch_end``: keep the best epochs by it, instead of the newest checkpoints. What is not
            finite is never the best. With callbacks that evaluate averages, such as ``ema(evaluate=True)``, it judges
            these.
        mode: ``"min"`` if a smaller value of ``monitor`` is better, ``"max"`` if a larger is.
        save_last: with a ``monitor``, whether to keep the newest checkpoint beside the best ones, to go on from.
        name: of the callback. It keeps no memory: what is best stands in the directory.

    Returns:
        A callback that saves the state.

    Raises:
        ValueError: an argument out of range.
        FileExistsError: when the run begins, if the directory holds later checkpoints than the state's step.
        RuntimeError: when the run begins, if another callback saves into the directory, too.
        NotADirectoryError: when the run begins, if it is a file.
        KeyError: at the end of the first epoch, if there is no log named ``monitor``; the message lists those there
            are.

    >>> checkpoint("runs/digits", monitor="val_loss")
    Callback(name='checkpoint', hooks=on_train_begin, on_checkpoint, on_train_end, on_exception)
    """
    check_count("checkpoint", "every", every, unit="batches", optional=True)
    check_count("checkpoint", "keep", keep, unit="checkpoints")
    check_choice("checkpoint", "mode", mode, "min", "max")
    opened: list[Any] = []  # the checkpointer of the run under way: a resource of the host, no part of the run's state

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        close()
        checkpointer = trainer.checkpointer(
            directory, keep=keep, mode=None if monitor is None else mode, save_last=save_last
        )
        opened.append(checkpointer)
        later = [step for step in checkpointer.steps if step > int(state.step)]
        if later:
            close()
            raise FileExistsError(
                f"checkpoint: {os.fspath(directory)!r} holds checkpoints of steps {', '.join(map(str, later))}, and "
                f"this run is at step {int(state.step)}; go on from them with trainer.restore, or choose another "
                f"directory"
            )
        return state, logs

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        if int(state.step) == opened[0].latest_step:  # the run went on after the last batch of an epoch, from there
            return state, logs
        at_epoch_end = state.batch_idx == 0
        opened[0].save(state, float(logs[monitor]) if monitor is not None and at_epoch_end else None)
        return state, logs

    def close() -> None:
        while opened:
            opened.pop().close()

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        close()
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del exception, trainer
        close()
        return state, logs

    # A callback looks at batches when it has a batch hook, and on_checkpoint follows its looks.
    looks: dict[str, Any] = {}
    if every is not None:
        looks = {"every": every, "on_batch_end": lambda batch_idx, trainer, state, logs: (state, logs)}
    return Callback(
        name=name,
        on_train_begin=on_train_begin,
        on_checkpoint=on_checkpoint,
        on_train_end=on_train_end,
        on_exception=on_exception,
        **looks,
    )
