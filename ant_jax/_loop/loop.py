"""The host loop of ``fit``: the hooks in their order, and between them launches of the compiled step.

The loop, in the one place where it is written down (``tests/loop/test_loop.py`` holds it)::

    on_train_begin
    for epoch in range(state.epoch, num_epochs):
        on_epoch_begin                                       # not when going on inside an epoch
        for batch_idx, batch in enumerate(train_loader):     # from state.batch_idx on
            on_batch_begin
            [compiled]  forward, loss, backward              # the gradient of this batch: unscaled, in float32
            [compiled]  on_backward_end                      # in list order
            [compiled]  accumulate; when the window closes:
            [compiled]      on_before_update -> max_grad_norm clip -> optax -> on_before_apply -> new parameters
            on_batch_end; on_checkpoint
        on_evaluate_begin; [compiled] evaluation; on_evaluate_end     # when there is a val_loader
        on_epoch_end; on_checkpoint
    on_train_end

A request to stop ends the batches, when the accumulation window that is open has closed, and at the beginning of an
epoch not before its first batch; evaluation, ``on_epoch_end`` and ``on_train_end`` still come, and the epoch counts as
done. After an exception ``on_exception`` comes, and nothing else. Of the batch hooks, those of host callbacks come
around launches, ``every`` so many batches, and those of traced callbacks inside the step, at every batch.
``on_checkpoint`` comes where the state is whole, so that a run could go on from it: after all ``on_batch_end`` of a
look, for the callbacks that looked, unless the epoch's batches end there; and after all ``on_epoch_end``, when the
epoch counts as done. Ctrl-C and SIGTERM act where the state is whole, too: between launches, in an evaluation, and
between epochs.

Batches are read ahead: while those of a launch are trained on, the next ones are read, and one more, to see whether
one follows. An iterator that cannot be put back is read to the next batch after which a host callback looks, and on
after that look. With ``prefetch=0`` a batch is read after the hooks of the one before. Where a loader is read so, and
``steps_per_epoch`` does not tell whether a batch follows, it is read before the ``on_checkpoint`` of the one before.

A batch size that a callback asks for begins at its batch, in the order of the examples that the epoch has.

What is published when a scope opens is still in the logs when it closes.

The batch hooks of observers are called when a launch is done, and before any other hook runs on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax

from ant_jax._data.array_loader import ArrayLoader
from ant_jax._data.batches import BatchError, NoBatches
from ant_jax._data.epoch_batches import EpochBatches, Loaders
from ant_jax._data.loaders import description_of
from ant_jax._data.prefetcher import Prefetcher
from ant_jax._data.reader import Place, Reader
from ant_jax._engine.buffers import Buffers
from ant_jax._engine.chunks import rows_of
from ant_jax._engine.compile_cache import CompileCache
from ant_jax._engine.launch import Cursor, Launch
from ant_jax._engine.launch_size import LAUNCH_SECONDS, LaunchSizer
from ant_jax._engine.programs import TrainProgram, checks_numbers
from ant_jax._hooks.callback_list import CallbackList
from ant_jax._interrupt import TERMINATED, Interrupts
from ant_jax._logs.logs import join_logs
from ant_jax._logs.packing import Unpacked
from ant_jax._logs.sums import mean, means
from ant_jax._loop.batch_hooks import BatchHooks
from ant_jax._loop.evaluation import evaluate, prefix, preparation
from ant_jax._loop.hook_windows import HookWindow
from ant_jax._loop.read_ahead import read_ahead
from ant_jax._loop.run_info import RunInfo
from ant_jax._state.host_fields import HostFields, StateMismatch
from ant_jax._state.leaves import refuse_mismatch
from ant_jax._state.train_state import TrainState
from ant_jax._trees import in_lines


class Loop:
    """One call of ``fit``.

    Args:
        trainer: what host hooks are given.
        events: its callbacks.
        programs: its compiled programs.
        state: to begin with; inside an epoch that has been asked to stop, what is open is closed, and no more.
        loaders: what to read, and how much of it.
        run: the run's facts, of which it keeps those that change.
    """

    def __init__(
        self,
        trainer: Any,
        events: CallbackList,
        programs: CompileCache,
        state: TrainState,
        loaders: Loaders,
        run: RunInfo,
    ):
        self._trainer, self._events, self._programs = trainer, events, programs
        self._loaders, self._train_loader, self._run = loaders, loaders.train, run
        self._window: int = trainer.gradient_accumulation_steps
        host = state.on_host()
        # What the first epoch takes up, where the run goes on.
        self._open_windows = host.windows
        self._place: Place | None = host.loader
        self._reader: Reader | None = None
        if not isinstance(loaders.train, ArrayLoader):
            # An iterator's length may be what is left of it, and so says nothing of its data.
            is_same = host.batch_idx > 0 or isinstance(loaders.train, Iterator)
            place = host.loader if is_same or host.data == description_of(loaders.train) else None
            self._reader = Reader(loaders.train, "train_loader", loaders.steps_per_epoch, place)
        self._rows: dict[Any, int | None] = {}  # of every program's chunks: kept, since others would compile
        self._live = Buffers(state.replace(host=_without_places(host)), events.device_names)
        self._batch_hooks = BatchHooks(events, trainer, self._live, run, at_once=loaders.prefetch == 0)
        self._observers = self._batch_hooks.observers
        self._interrupts = Interrupts()
        self._deferred: tuple[Mapping[str, Any], Container[str]] | None = None
        self._paces: dict[TrainProgram, LaunchSizer] = {}

    def run(self) -> TrainState:
        """Train to the end."""
        with self._interrupts.installed(), self._run.costs.told_when_slow(), self._observers.installed():
            try:
                self._train()
                self._observers.flush()
            except BaseException as error:
                self._observers.flush_at(error)
                state = self._state()
                try:
                    self._events.tell(error, self._trainer, state)
                finally:
                    if not self._live.lost:
                        _hand_over(error, state)
                if self._interrupts.terminating and not isinstance(error, SystemExit):
                    raise SystemExit(TERMINATED) from error
                raise
            state = self._state()
            try:
                self._interrupts.check()
            except BaseException as error:  # a signal that came in on_train_end; everything is closed by then
                _hand_over(error, state)
                raise
            return state

    def _train(self) -> None:
        live = self._live
        opening = self._hook("on_train_begin", None, {})
        closing: Mapping[str, Any] = {}
        while live.host.epoch < self._run.num_epochs and (not live.stop or live.host.batch_idx > 0):
            closing = self._epoch(live.host.epoch)
        self._hook("on_train_end", None, join_logs(opening, closing))

    def _epoch(self, epoch: int) -> Mapping[str, Any]:
        live = self._live
        if live.host.batch_idx > 0:
            refuse_other_data(live.host, self._train_loader)
        live.move(data=description_of(self._train_loader))
        if live.host.batch_idx == 0:
            live.move(opened=self._hook("on_epoch_begin", epoch, {}))
            self._run.whole = False
        trained, evaluated = self._batches(epoch), {}
        if self._loaders.val is not None:
            self._observers.flush_before("on_evaluate_begin")
            self._observers.flush_before("on_evaluate_end")
            state, evaluated = evaluate(
                self._trainer,
                self._events,
                self._programs,
                live.get(),
                self._loaders.val,
                "val_loader",
                self._loaders.validation_steps,
                self._interrupts.check,
                self._rows,
            )
            self._run.whole = False
            live.put(state)
            del state  # so that the next launch can donate its arrays, because nothing else refers to them
        closing = self._hook("on_epoch_end", epoch, join_logs(live.host.opened, trained, evaluated))
        live.update(log_sums=None)
        history = live.host.history.appended(closing)
        waiting = tuple((0, size) for start, size in live.host.batch_sizes if start <= live.host.batch_idx)
        position = {"epoch": epoch + 1, "batch_idx": 0, "examples": 0, "batch_sizes": waiting[-1:]}
        live.move(**position, history=history, published={}, opened={})
        if self._loaders.steps_per_epoch is None and not isinstance(self._train_loader, Iterator):
            self._place = None  # it begins anew
        self._batch_hooks.end_epoch()
        self._reach_whole(closing)
        return closing

    def _reach_whole(self, logs: Mapping[str, Any], only: Container[str] | None = None) -> None:
        """The run could go on from here: let callbacks save, and signals act."""
        self._run.whole = True
        self._hook("on_checkpoint", None, logs, only)
        self._interrupts.check()

    def _state(self) -> TrainState:
        """The state with everything in it that a run which goes on from here needs."""
        state = self._live.get()
        if not self._run.whole:
            return state
        windows = {look.callback.name: look.window for look in self._batch_hooks.all_windows if look.open}
        return state.replace(host=state.on_host()._replace(windows=windows, loader=self._place))

    def _batches(self, epoch: int) -> Unpacked:
        """Train on the batches of an epoch; returns their means as ``train_`` logs."""
        live = self._live
        self._batch_hooks.begin_epoch()
        program = None
        done = live.host.batch_idx
        if live.stop and done > 0 and done % self._window == 0:  # the run goes on where its batches were over
            self._run.whole = True
            return self._epoch_means()
        while True:  # over stretches of batches of one size
            self._resize()
            try:
                feed = self._feed(epoch)
            except NoBatches:
                if live.host.batch_idx == 0:
                    raise
                self._run.whole = True
                break  # the run goes on after the last batch of an epoch
            with feed.putting_back(lambda: (live.host.batch_idx, self._place)):
                begun = program is not None
                program = self._programs.train(live.part(), live.key, feed.first, live.host.fused)
                live.move(fused=(jax.default_backend(), program.fused))
                self._open(program, begun)
                over = self._train_on(feed, program)
            if over:
                break
        return self._epoch_means()

    def _feed(self, epoch: int) -> EpochBatches:
        host, limit = self._live.host, self._loaders.steps_per_epoch
        place = epoch, host.batch_idx, host.examples
        with self._run.costs.waiting_for_data():
            feed = EpochBatches(self._loader(), "train_loader", *place, limit, reader=self._reader)
        self._place = feed.place
        self._run.steps_per_epoch = feed.epoch_length
        return feed

    def _loader(self) -> Any:
        size = self._live.host.batch_size
        return self._train_loader if size is None else self._train_loader.with_batch_size(size)

    def _resize(self) -> bool:
        """Take up the batch size that is asked for by now, if the epoch has a batch of it left; whether it has."""
        host, loader = self._live.host, self._train_loader
        due = [size for start, size in host.batch_sizes if start <= host.batch_idx]
        if not due:
            return False
        if not isinstance(loader, ArrayLoader):
            raise BatchError(
                f"a callback asked for batches of {due[-1]} examples, and train_loader is a {type(loader).__name__}, "
                f"whose batches are as they are; use an ArrayLoader"
            )
        if loader.with_batch_size(due[-1]).left(host.examples) == (0, 0):
            return False
        self._live.move(batch_size=due[-1], batch_sizes=host.batch_sizes[len(due) :])
        return True

    def _train_on(self, feed: EpochBatches, program: TrainProgram) -> bool:
        """Train on batches of one size; returns whether the epoch is over, and not only their size."""
        live, costs, looks = self._live, self._run.costs, self._batch_hooks.windows
        costs.runs(program)
        pace = self._paces.get(program) or self._paces.setdefault(program, program.begin_pace())
        intervals = [look.every for look in looks if look.every is not None and not isinstance(look.every, range)]
        # The last batch of an epoch closes the accumulation window, so it must be known.
        must_peek = self._window > 1 and self._loaders.steps_per_epoch is None
        ahead = read_ahead(self._loaders.prefetch, looks, feed.is_read_once, self._stops_at, must_peek)
        rows = self._rows.setdefault(program, rows_of(feed, program.fused, intervals, ahead.most))
        launches = 1 if rows is None else rows // min([rows, *intervals])
        place = "train_loader", live.host.epoch, live.host.batch_idx
        prepare = preparation(self._trainer, self._programs, live.part(), feed, place, rows is not None, launches)
        read = feed.chunks(rows, LAUNCH_SECONDS, peek=ahead.peek, pauses=ahead.pauses)
        chunks = Prefetcher(read, prepare, costs.waiting_for_data)
        launch = None
        for chunk in chunks:
            self._reach_deferred()
            cursor = Cursor(chunk, live.host.batch_idx, self._window)
            while cursor.remaining:
                if self._resize():
                    return False
                self._run.whole = False
                self._batch_hooks.begin(cursor.batch_idx, chunk.examples)
                if self._resize():  # the looks that have begun stay open
                    return False
                if checks_numbers():
                    launch = program.launch_checked(live, cursor)
                else:
                    launch = program.launch(live, cursor, self._length(looks, program, pace, cursor))
                if not cursor.remaining and not ahead.pauses(cursor.batch_idx):
                    chunks.fetch()
                pace.launched(launch.steps, launch.latest["loss"])
                self._place = None if chunk.places is None else chunk.places[cursor.row]
                if self._end_looks(cursor, launch):
                    self._run.whole = True
                    return True
        if launch is None:
            raise RuntimeError("there were no chunks")  # cannot be: a feed has a first batch
        # Nothing had told that the last batch was the last, because no batch is read before it is needed.
        self._deferred = None
        self._batch_hooks.end_open(live.host.batch_idx, launch)
        return True

    def _open(self, program: TrainProgram, begun: bool) -> None:
        """Begin the sums and the accumulation window of an epoch, or take up those that the state is in.

        Args:
            program: that runs first, or next.
            begun: whether this run has trained on batches of this epoch before.
        """
        live, part, start = self._live, self._live.part(), self._live.host.batch_idx
        if start == 0:
            sums, window = program.begin_epoch(part.accumulator)
            live.update(log_sums=sums, accumulator=window)
            return
        expected, _ = jax.eval_shape(program.begin_epoch, part.accumulator)
        refuse_mismatch("host.log_sums", expected, part.log_sums, "this trainer, going on inside an epoch,")
        for look in [] if begun else self._batch_hooks.all_windows:
            look.resume(start, self._open_windows)

    def _is_over(self, cursor: Cursor) -> bool:
        """Whether the epoch's batches end here: with the last, or as asked, but not inside an accumulation window."""
        return bool(cursor.chunk.last and not cursor.remaining) or self._stops_at(cursor.batch_idx)

    def _stops_at(self, done: int) -> bool:
        return self._live.stop and done % self._window == 0

    def _length(self, looks: list[HookWindow], program: TrainProgram, pace: LaunchSizer, cursor: Cursor) -> int:
        """How many batches to launch: to the next look or the end of the chunk, and no longer than the pace allows."""
        length = min(cursor.remaining, pace.steps if program.fused else 1, self._live.steps_left)
        for look in looks:
            length = min(length, look.until_border(cursor.batch_idx) or length)
        for start, _ in self._live.host.batch_sizes:
            if start > cursor.batch_idx:
                length = min(length, start - cursor.batch_idx)
        if self._live.stop:
            length = min(length, self._window - cursor.batch_idx % self._window)
        return length

    def _end_looks(self, cursor: Cursor, launch: Launch) -> bool:
        """Run the batch hooks after a launch; returns whether no more batches follow."""
        over, logs, ended = self._batch_hooks.end(cursor.batch_idx, launch, lambda: self._is_over(cursor))
        if not over:
            self._run.whole = True
            self._deferred = logs, ended
            if cursor.remaining or cursor.chunk.last is not None:
                self._reach_deferred()
        return over

    def _reach_deferred(self) -> None:
        """Come to the place that is whole after a batch, where it is known that another one follows."""
        if self._deferred is not None:
            reached, self._deferred = self._deferred, None
            self._reach_whole(*reached)

    def _epoch_means(self) -> Unpacked:
        sums, host = self._live.part().log_sums, self._live.host
        values = {} if sums is None else means(sums, host.examples)
        published = {name: mean(total, weight) for name, (total, weight) in host.published.items()}
        return prefix("train_", join_logs(values, published))

    def _hook(
        self, name: str, lead: Any, logs: Mapping[str, Any], only: Container[str] | None = None
    ) -> Mapping[str, Any]:
        if self._events.has(name) and (only is None or only):
            self._observers.flush_before(name, only)
            given = self._state()
            state, logs = self._events.host_hook(name, lead, self._trainer, given, logs, only)
            if state is not given:
                self._live.put(state.replace(host=_without_places(state.on_host())))
        return logs


def _without_places(host: HostFields) -> HostFields:
    """Host fields without what holds only at one place of the run."""
    return host._replace(windows=None, loader=None)


def _hand_over(error: BaseException, state: TrainState) -> None:
    with contextlib.suppress(AttributeError):  # an exception without room for attributes
        setattr(error, "train_state", state)  # noqa: B010  # it is no declared attribute
        error.add_note("the state of the run as it was then is this exception's attribute train_state")


def refuse_other_data(host: HostFields, loader: Any) -> None:
    """Raise StateMismatch if the training loader has other data than the run has had so far."""
    expected, got = host.data, description_of(loader)
    known = {name: value for name, value in (expected or {}).items() if value is not None and name in got}
    lines = [f"{name}: expected {value!r}, got {got[name]!r}" for name, value in known.items() if got[name] != value]
    if lines:
        raise StateMismatch(
            f"the run is at batch {host.batch_idx} of epoch {host.epoch}, and train_loader has other data than it has "
            f"had so far. To go on with other data, restore a checkpoint of the end of an epoch with trainer.restore, "
            f"and give it to fit:{in_lines(lines)}"
        )
