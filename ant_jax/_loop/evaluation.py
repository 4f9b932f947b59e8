"""Evaluate on a loader, with the hooks around it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ant_jax._data.batch_checks import BatchChecks
from ant_jax._data.epoch_batches import Chunk, EpochBatches
from ant_jax._engine.chunks import on_device, rows_of
from ant_jax._engine.compile_cache import CompileCache
from ant_jax._engine.launch_size import LAUNCH_SECONDS
from ant_jax._engine.programs import checks_numbers
from ant_jax._finite import NonFiniteError
from ant_jax._hooks.callback_list import CallbackList
from ant_jax._logs.logs import join_logs
from ant_jax._logs.packing import Unpacked
from ant_jax._logs.sums import means
from ant_jax._state.train_state import TrainState


_logger = logging.getLogger("ant_jax")


# An evaluation of so long on a loader that cannot tell its length is worth a line.
LONG_SECONDS = 5.0


def evaluate(
    trainer: Any,
    events: CallbackList,
    programs: CompileCache,
    state: TrainState,
    loader: Any,
    name: str,
    steps: int | None = None,
    between: Callable[[], None] = lambda: None,
    known_rows: dict[Any, int | None] | None = None,
) -> tuple[TrainState, Mapping[str, Any]]:
    """Run the evaluation hooks, and between them the evaluation of every batch.

    Args:
        trainer: what host hooks are given.
        events: its callbacks.
        programs: its compiled programs.
        state: to evaluate.
        loader: any iterable of batches.
        name: what errors call the loader.
        steps: batches to evaluate at most; ``None``: all.
        between: called between launches, and at the end.
        known_rows: of the chunks of programs in earlier evaluations of a run; those of this one are added.

    Returns:
        The state and the logs as the last ``on_evaluate_end`` left them.
    """
    state, opening = events.host_hook("on_evaluate_begin", None, trainer, state, {})
    known_rows = {} if known_rows is None else known_rows
    feed = EpochBatches(loader, name, limit=steps, may_end=True)
    program = programs.evaluation(state, feed.first)
    ended_before, fused = program in known_rows, program.fused
    sums, rows, examples, done = program.zero_sums(), known_rows.setdefault(program, rows_of(feed, fused)), 0, 0
    if rows is not None and checks_numbers():
        rows = 1
    prepare = preparation(trainer, programs, state, feed, (name, 0, 0), rows is not None)
    chunks, ended = feed.chunks(rows, LAUNCH_SECONDS), False
    # One that fails has used nothing, because it is done once more.
    with feed.putting_back(lambda: (feed.read if ended else 0, feed.place)):
        for chunk in chunks if ended_before else _telling_when_long(chunks, feed.length, name):
            before, chunk = sums, prepare(chunk)
            try:
                sums = program.add(state.params, state.model_state, chunk, before)
            except FloatingPointError as error:  # of jax_debug_nans
                raise NonFiniteError(f"{error}, in the evaluation of batch {done} of {name}") from error
            examples, done = examples + chunk.filled * chunk.examples, done + chunk.filled
            jax.block_until_ready(before)  # no more than two chunks under way
            between()
        ended = True
    logs = join_logs(opening, prefix("val_", means(sums, examples)))
    ended = events.host_hook("on_evaluate_end", None, trainer, state, logs)
    between()
    return ended


def _telling_when_long(chunks: Iterator[Chunk], length: int | None, name: str) -> Iterator[Chunk]:
    """Pass on the chunks of an evaluation; log a line where their number is unknown and they take long."""
    began, patience, batches = time.monotonic(), LONG_SECONDS, 0
    for chunk in chunks:
        yield chunk
        batches += chunk.filled
        elapsed = time.monotonic() - began
        if elapsed > patience and (length is None or batches > length):
            patience = 2 * elapsed
            _logger.warning(
                "the evaluation on %s has taken %.0f s and %d batches, and the loader cannot tell how many will come. "
                "If it has no end, give fit validation_steps, or evaluate steps",
                name,
                elapsed,
                batches,
            )


def preparation(
    trainer: Any,
    programs: CompileCache,
    state: Any,
    feed: EpochBatches,
    place: tuple[str, int, int],
    stacked: bool,
    launches: int = 1,
) -> Callable[[Chunk], Chunk]:
    """What to do with every chunk: put it on the device, after a look at its numbers where the trainer asks for one."""
    if not trainer.check_batches:
        return functools.partial(on_device, launches=launches)
    check = BatchChecks(*place, programs.classes_of(state.params, state.model_state, feed.first))

    def checked(chunk: Chunk) -> Chunk:
        check(chunk, stacked)
        return on_device(chunk, launches)

    return checked


def prefix(prefix: str, logs: Unpacked) -> Unpacked:
    """Put a prefix before the names of logs, and sort them, the loss before the others."""
    return logs.selected({prefix + name: name for name in sorted(logs, key=lambda name: (name != "loss", name))})
