"""The history as a picture that grows."""

from __future__ import annotations

import os
import pathlib
import threading
from typing import Any

from ant_jax._arguments import check_name, check_path, refuse, require
from ant_jax._background import Queue
from ant_jax._hooks.callback import Callback
from ant_jax._state.history import History
from ant_jax.callbacks._runs import PerRun
from ant_jax.writers._paths import Claim, replacing


_drawing = threading.Lock()  # matplotlib does not promise to draw in two threads at once


def plot_history(path: str | os.PathLike[str], *names: str, name: str = "plot_history") -> Callback:
    """Draw the history after every epoch, as a file that can be watched.

    Drawn in the background by matplotlib; the file is replaced at once, so that a viewer never sees half
    of it. Where epochs pass faster than they are drawn, some pictures are left out, never the last one. A run that
    begins while another one of this process draws the file draws another one beside it, ``digits-2.png`` for
    ``digits.png``, and says so (logger ``ant_jax``, a warning).

    Args:
        path: of the picture; the suffix says which format. Its directory is made.
        *names: the logs to draw, as in ``history.plot``; without any, every scalar.
        name: of the callback.

    Returns:
        An observer.

    Raises:
        ImportError: the package ``matplotlib`` is not installed (the extra ``plot``).
        ValueError: ``path`` is none of a file, or matplotlib writes no files with its suffix; a name is none.
        KeyError: after the first epoch, if there is no scalar of a name; the message lists those there are.

    >>> plot_history("runs/digits.png", "train_loss", "val_loss")
    Callback(name='plot_history', hooks=on_train_begin, on_checkpoint, on_train_end, on_exception)
    """
    require("plot_history", "matplotlib", "plot")
    check_path("plot_history", "path", path, file=True)
    for number, log in enumerate(names):
        check_name("plot_history", f"names[{number}]", log)
    target = pathlib.Path(path)
    _check_suffix(target)
    pictures: PerRun[_Picture] = PerRun(lambda picture: picture.close())

    def picture(trainer: Any) -> _Picture:
        return pictures.of(trainer) or pictures.open(trainer, _Picture(target, names))

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> None:
        picture(trainer)  # which claims the path, as files do, before a run beside this one can end and let go of it

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> None:
        picture(trainer).draw(state.history)

    def on_train_end(trainer: Any, state: Any, logs: Any) -> None:
        pictures.close(trainer)

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> None:
        del exception
        pictures.close(trainer)

    return Callback(
        name=name,
        observer=True,
        on_train_begin=on_train_begin,
        on_checkpoint=on_checkpoint,
        on_train_end=on_train_end,
        on_exception=on_exception,
    )


class _Picture:
    """The picture of one run."""

    def __init__(self, path: pathlib.Path, names: tuple[str, ...]):
        self._claim = Claim("plot_history", os.fspath(path), path.suffix)
        self._names, self._queue = names, Queue()

    def draw(self, history: History) -> None:
        self._queue.replace(_draw, history, self._names, pathlib.Path(self._claim.path))

    def close(self) -> None:
        try:
            self._queue.drain()
        finally:
            self._claim.release()


def _check_suffix(path: pathlib.Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    allowed = sorted(f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower() not in allowed:
        refuse("plot_history", "the suffix of path", f"one of {', '.join(allowed)}", path.suffix)


def _draw(history: History, names: tuple[str, ...], target: pathlib.Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which belongs to the main thread

    with _drawing:
        figure = Figure()
        history.plot(*names, ax=figure.subplots())
        with replacing(target) as beside:
            figure.savefig(beside)
