"""The chunked program: any number of steps in one launch."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from ant_jax._data.batches import batch_size_of
from ant_jax._data.epoch_batches import Chunk
from ant_jax._engine.buffers import Buffers, DeviceState, device_state
from ant_jax._engine.chunks import _bytes_of
from ant_jax._engine.launch import Cursor, Launch
from ant_jax._engine.launch_size import LaunchSizer
from ant_jax._finite import NonFiniteError
from ant_jax._logs.packing import PackedLogs, unpack
from ant_jax._logs.sums import LogSums, zero_sums
from ant_jax._state.host_fields import CYCLE
from ant_jax._state.leaves import key_of_cycle, scalar
from ant_jax._state.train_state import Accumulator
from ant_jax._step.step import Step
from ant_jax._trees import PyTree


Fuse = Literal["auto"] | bool

# The operations for which a low precision is chosen.
PRODUCTS = ("dot_general", "conv_general_dilated")


class TrainProgram:
    """The compiled train step for batches of one form: one step a launch, or any number in one loop.

    Args:
        step: what to compile.
        part: of a state that it will run on, without sums.
        key: that state's.
        batch: a batch like those to come.
        fuse: whether many steps run in one launch; ``"auto"``: by ``slow_in_loops``.

    Attributes:
        may_stop: whether a traced hook can end a launch early.
        fused: see ``fuse``.
        pace: how many steps a launch should have, in the run that began last.
    """

    def __init__(self, step: Step, part: DeviceState, key: jax.Array, batch: PyTree, fuse: Fuse):
        self._step = jax.jit(step.train_step)
        state, batch = _avals(part.state(key)), _avals(batch)
        # The one time that the step is traced: the programs below call `_step`, and meet the trace in jit's cache.
        traced = self._step.trace(state, batch, _aval(jnp.int32), _aval(jnp.bool_))
        if step.precision.compute_dtype is not None:
            _notice_idle_precision(step.precision.compute_dtype, traced.jaxpr)
        self._traced, self._examples = traced, batch_size_of(batch)
        self._logs: PackedLogs = traced.out_info.logs
        self.may_stop = traced.out_info.stop is not None
        # A loop goes over the rows of a batch's leaves, so there is none without leaves.
        self.fused = bool(jax.tree.leaves(batch)) and _is_fused(fuse, traced.jaxpr)
        self.pace = LaunchSizer(_bytes_of(batch))
        self._structure_between_epochs = jax.tree.structure(part)
        self._structure = jax.tree.structure(part._replace(log_sums=jax.eval_shape(zero_sums, self._logs)))
        self._key_impl = jax.random.key_impl(key)
        self._window_steps = step.accumulation_steps
        self._by_hand = jax.jit(self._run_by_hand)
        self._one = jax.jit(self._run_alone, donate_argnums=0)
        self._many = jax.jit(self._run_many, donate_argnums=0)

    def begin_pace(self) -> LaunchSizer:
        """Return the pace of a run that begins, which other runs at the same time do not disturb."""
        self.pace = pace = self.pace.of_next_run()
        return pace

    def begin_epoch(self, window: Accumulator | None) -> tuple[LogSums, Accumulator | None]:
        """Return the sums and, made of any, the accumulation window that an epoch begins with."""
        return _zeros(*_hashable(self._logs), window)

    @functools.cached_property
    def flops_per_example(self) -> float | None:
        """Floating-point operations of a step for each of its examples; ``None`` where XLA does not tell."""
        analysis = self._traced.lower().cost_analysis()
        flops = None if analysis is None else analysis.get("flops")
        return None if flops is None else flops / self._examples

    def launch(self, live: Buffers, cursor: Cursor, count: int) -> Launch:
        """Train on the next ``count`` batches of the cursor's chunk, and move the cursor on.

        Does not wait for the device, unless a traced hook can end the launch early.
        """
        chunk, start = cursor.chunk, cursor.row
        ends = bool(chunk.last) and self._window_steps > 1
        if not self.fused:
            ends = scalar(ends)
            with _taking_batches():
                leaves, stop, few, logs = self._one(live.take(), live.key_data, chunk.batches, cursor.offset, ends)
            live.give(leaves)
            steps, last, first = 1, None, None
        else:
            rows = scalar(start), scalar(start + count), scalar(chunk.filled - 1 if ends else -1)
            with _taking_batches():
                leaves, stop, done, few, logs = self._many(
                    live.take(), live.key_data, chunk.batches, cursor.offset, *rows
                )
            live.give(leaves)
            steps, first = count if done is None else int(done) - start, start
            last = start + steps - 1
        latest = unpack(few, logs, last, {"batch_size": chunk.examples})
        launch = Launch(steps, chunk.examples, latest, logs, first)
        if stop is not None:
            live.stop = live.stop or bool(stop)
        cursor.row += launch.steps
        live.advance(launch.steps, chunk.examples)
        return launch

    def launch_checked(self, live: Buffers, cursor: Cursor) -> Launch:
        """Train on the next batch where ``jax_debug_nans`` or ``jax_debug_infs`` is set.

        Raises:
            NonFiniteError: a number is not finite; the message says which operation of which step has computed it, and
                ``live`` is as it was before that step.
        """
        before = live.part()  # which keeps the launch from overwriting it
        try:
            return self.launch(live, cursor, 1)
        except (FloatingPointError, RuntimeError) as error:  # the latter where JAX looks for the operation too late
            live.give(jax.tree.leaves(before))
            found = self._nonfinite_operation(live, cursor) or error
            if not isinstance(found, FloatingPointError):
                raise
            where = f"at batch {cursor.batch_idx} of epoch {live.host.epoch} (step {int(before.step)})"
            raise NonFiniteError(f"{found}, {where}; the train_state of this exception is the state before") from error

    def _nonfinite_operation(self, live: Buffers, cursor: Cursor) -> FloatingPointError | None:
        """Do the next step outside of the loop, in which JAX cannot name an operation."""
        chunk, row = cursor.chunk, cursor.row
        last = chunk.last and self._window_steps > 1 and row == chunk.filled - 1
        batch = _row_of(chunk.batches, row) if self.fused else chunk.batches
        step = jax.jit(self._run_alone)  # unlike `_one`, it leaves its arguments to JAX for a second look
        try:
            step(jax.tree.leaves(live.part()), live.key_data, batch, scalar(cursor.batch_idx), scalar(last))
        except FloatingPointError as error:
            return error
        return None

    def step_by_hand(
        self, part: DeviceState, key_data: jax.Array, cycle: Any, batch: PyTree
    ) -> tuple[DeviceState, Any, Any, Any]:
        """Train on one batch and leave ``part`` intact; ``batch_idx`` is the step's number.

        Returns:
            The part and the cycle after the step, whether a traced hook asked to stop (``None`` when none can), and
            the logs.
        """
        leaves, structure = jax.tree.flatten(part)
        leaves, cycle, stop, few, logs = self._by_hand(leaves, key_data, cycle, batch)
        latest = unpack(few, logs, more={"batch_size": batch_size_of(batch)})
        return jax.tree.unflatten(structure, leaves), cycle, stop, latest

    def _run_by_hand(self, leaves: list[Any], key_data: Any, cycle: Any, batch: PyTree) -> tuple[Any, ...]:
        part: DeviceState = jax.tree.unflatten(self._structure_between_epochs, leaves)
        key = key_of_cycle(jax.random.wrap_key_data(key_data, impl=self._key_impl), cycle)
        state, stop, logs = self._step(part.state(key), batch, part.step, jnp.bool_(False))
        cycle += jnp.int32(part.step == CYCLE - 1)
        return jax.tree.leaves(device_state(state)), cycle, stop, logs.few(), logs

    def _run_one(self, leaves: list[Any], key_data: Any, batch: PyTree, batch_idx: Any, last: Any) -> tuple[Any, ...]:
        part: DeviceState = jax.tree.unflatten(self._structure, leaves)
        state = part.state(jax.random.wrap_key_data(key_data, impl=self._key_impl))
        state, stop, logs = self._step(state, batch, batch_idx, last)
        log_sums = part.log_sums.add(logs, batch_size_of(batch))
        return jax.tree.leaves(device_state(state, log_sums=log_sums)), stop, logs

    def _run_alone(self, *arguments: Any) -> tuple[Any, ...]:
        leaves, stop, logs = self._run_one(*arguments)
        return leaves, stop, logs.few(), logs

    def _run_many(
        self, leaves: list[Any], key_data: Any, batches: PyTree, offset: Any, start: Any, end: Any, last_row: Any
    ) -> tuple[Any, ...]:
        """Train on rows ``start`` to ``end``. The trip count is dynamic: one program serves launches of any length."""
        rows = jax.tree.leaves(batches)[0].shape[0]
        latest = jax.tree.map(lambda log: jnp.zeros(log.shape, log.dtype), self._logs)
        buffers = jax.tree.map(lambda log: jnp.zeros((rows, *log.shape), log.dtype), latest)

        def goes_on(carry: tuple[Any, ...]) -> Any:
            _, stop, row, _, _ = carry
            if stop is None:
                return row < end
            # An accumulation window that is open is finished first.
            return (row < end) & ~(stop & ((offset + row) % self._window_steps == 0))

        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            leaves, asked, row, _, buffers = carry
            batch = _row_of(batches, row)
            leaves, stop, latest = self._run_one(leaves, key_data, batch, offset + row, row == last_row)
            stop = None if asked is None else stop | asked
            buffers = jax.tree.map(lambda buffer, log: _with_row(buffer, log, row), buffers, latest)
            return leaves, stop, row + 1, latest, buffers

        stop = jnp.bool_(False) if self.may_stop else None
        leaves, stop, row, latest, buffers = lax.while_loop(goes_on, body, (leaves, stop, start, latest, buffers))
        return leaves, stop, row if self.may_stop else None, latest.few(), buffers


class EvaluationProgram:
    """The compiled evaluation for batches of one form; arguments as those of ``TrainProgram``.

    Attributes:
        fused: whether all batches of a chunk run in one launch.
    """

    def __init__(self, step: Step, params: PyTree, model_state: PyTree, batch: Any, fuse: Fuse):
        self._step = jax.jit(step.evaluation_step)
        traced = self._step.trace(_avals(params), _avals(model_state), _avals(batch))
        self._logs: PackedLogs = traced.out_info
        self.fused = _is_fused(fuse, traced.jaxpr)
        self._one = jax.jit(self._add_one)
        self._many = jax.jit(self._add_many)

    def zero_sums(self) -> LogSums:
        """Return the sums of no batch."""
        return _zeros(*_hashable(self._logs), None)[0]

    def add(self, params: PyTree, model_state: PyTree, chunk: Chunk, sums: LogSums) -> LogSums:
        """Add the logs of a chunk's batches, weighted by examples, to ``sums``."""
        arguments = params, model_state, chunk.batches, sums
        with _taking_batches():
            return self._many(*arguments, scalar(chunk.filled)) if self.fused else self._one(*arguments)

    def _add_one(self, params: Any, model_state: Any, batch: Any, sums: LogSums) -> LogSums:
        return sums.add(self._step(params, model_state, batch), batch_size_of(batch))

    def _add_many(self, params: Any, model_state: Any, batches: Any, sums: LogSums, count: Any) -> LogSums:
        def body(row: Any, sums: LogSums) -> LogSums:
            batch = _row_of(batches, row)
            return self._add_one(params, model_state, batch, sums)

        return lax.fori_loop(0, count, body, sums)


def _hashable(logs: PackedLogs) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    leaves, structure = jax.tree.flatten(logs)
    return structure, tuple(leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(structure: Any, logs: tuple[jax.ShapeDtypeStruct, ...], window: Any) -> tuple[LogSums, Any]:
    # One program for all of a kind, whatever the size of their batches.
    return zero_sums(jax.tree.unflatten(structure, logs)), jax.tree.map(jnp.zeros_like, window)


def checks_numbers() -> bool:
    """Whether JAX is to look at every number that a program returns."""
    config: Any = jax.config  # has its options as attributes that are not declared
    return config.jax_debug_nans or config.jax_debug_infs


def _taking_batches() -> contextlib.AbstractContextManager[Any]:
    """The context of a launch, in which a batch may come from the host even where implicit transfers are an error."""
    return jax.transfer_guard_host_to_device("allow")


def slow_in_loops(jaxpr: Any) -> bool:
    """Whether a step must not run inside an XLA loop, by a rule that always gives the same answer.

    XLA's CPU backend runs a convolution inside a loop or a branch several times slower than outside;
    ``python -m benchmarks.compare --workloads cnn`` measures it.
    """
    return jax.default_backend() == "cpu" and any(
        equation.primitive.name == "conv_general_dilated" for equation in _equations(jaxpr)
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, and of those that its equations hold."""
    for equation in getattr(jaxpr, "eqns", ()):
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                yield from _equations(inner)


def _notice_idle_precision(dtype: Any, jaxpr: Any) -> None:
    """Warn where a step computes none of its products in the low precision that the trainer is to compute in."""
    products = [equation for equation in _equations(jaxpr) if equation.primitive.name in PRODUCTS]
    operands = {variable.aval.dtype for product in products for variable in product.invars}
    if jnp.dtype(dtype) in operands or not any(jnp.issubdtype(operand, jnp.floating) for operand in operands):
        return
    name = jnp.dtype(dtype).name
    warnings.warn(
        f"precision={name!r} has no effect: no product of matrices in the step has an operand of {name}. A loss_fn is "
        f"given its batch as it is; cast what goes into the model, inputs.astype(jnp.{name})",
        stacklevel=2,
    )


def _is_fused(fuse: Fuse, jaxpr: Any) -> bool:
    return fuse if isinstance(fuse, bool) else not slow_in_loops(jaxpr)


def _row_of(batches: PyTree, row: Any) -> PyTree:
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, row, 0, False, allow_negative_indices=False), batches
    )


def _with_row(buffer: jax.Array, log: jax.Array, row: Any) -> jax.Array:
    # Not buffer.at[row].set(log): that is a scatter, which checks bounds, and costs a small step dearly.
    return lax.dynamic_update_index_in_dim(buffer, log, row, 0, allow_negative_indices=False)


def signature_of(tree: Any) -> Any:
    """Structure, shapes and dtypes of a tree of arrays, and whether there are 64 bits: a key for a dictionary.

    The dtype of a random key tells its kind.
    """
    leaves, treedef = jax.tree.flatten(tree)
    # What a step computes from the same dtypes depends on this setting, which may differ from call to call.
    wide: bool = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    return treedef, tuple([leaf.shape for leaf in leaves]), tuple([leaf.dtype for leaf in leaves]), wide


def _aval(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)


def _avals(tree: PyTree) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
