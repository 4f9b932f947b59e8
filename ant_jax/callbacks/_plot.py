"""The history as a picture that grows."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from ant_jax._callback import Callback
from ant_jax._history import History
from ant_jax.callbacks._background import Writer


def plot_history(path: str | os.PathLike[str], *names: str, name: str = "plot_history") -> Callback:
    """Draw the history after every epoch, as a file that can be watched.

    On the host, drawn in the background by matplotlib (the extra ``plot``); the file is replaced at once, so that a
    viewer never sees half of it.

    Args:
        path: of the picture; the suffix says which format. Its directory is made.
        *names: the logs to draw, as in ``history.plot``; without any, every scalar.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback.

    Raises:
        KeyError: after the first epoch, if there is no scalar of a name; the message lists those there are.

    >>> plot_history("runs/digits.png", "train_loss", "val_loss")
    Callback(name='plot_history', hooks=on_checkpoint, on_train_end, on_exception)
    """
    target, writer = pathlib.Path(path), Writer()

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        writer.submit(_draw, state.history, names, target)
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        writer.drain()
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del exception, trainer
        writer.drain()
        return state, logs

    return Callback(name=name, on_checkpoint=on_checkpoint, on_train_end=on_train_end, on_exception=on_exception)


def _draw(history: History, names: tuple[str, ...], target: pathlib.Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which belongs to the main thread

    figure = Figure()
    history.plot(*names, ax=figure.subplots())
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".new.{target.name}")
    figure.savefig(beside)
    beside.replace(target)
