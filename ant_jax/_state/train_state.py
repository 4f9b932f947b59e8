"""The state of a run: one immutable value."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.training.dynamic_scale import DynamicScale
from jax.core import Tracer
from jax.typing import ArrayLike

from ant_jax._state import hyperparams as _hyperparams
from ant_jax._state.history import History
from ant_jax._state.host_fields import CYCLE, Carried, HostFields, find_carried
from ant_jax._state.leaves import key_of_cycle, strong
from ant_jax._state.objective import Objective
from ant_jax._state.summary import summary_of_state
from ant_jax._trees import PyTree


# The fields of a state that are arrays, but for `stop` and the memories of callbacks, which are handled one by one.
DATA_FIELDS = ("step", "cycle", "params", "model_state", "opt_state", "key", "accumulator", "loss_scale")
# Those that are leaves of it as a pytree, `callback_states` with the memories that are on the device.
_CHILDREN = (*DATA_FIELDS, "stop", "skip", "objective", "callback_states")
_KEYS = (jax.tree_util.GetAttrKey("host"), *map(jax.tree_util.GetAttrKey, _CHILDREN))


class HostFieldError(RuntimeError):
    """A host field of the state was read inside the compiled step, where it has no value."""


@struct.dataclass
class Accumulator:
    """The gradients of an open accumulation window.

    Attributes:
        grads: float32, like the parameters: the sum so far.
        examples: int32 scalar, examples in the sum.
        micro_batches: int32 scalar, batches since the window opened.
        loss: float32 scalar at least, the sum of the losses so far, weighted as the gradients are.
    """

    grads: PyTree
    examples: jax.Array
    micro_batches: jax.Array
    loss: jax.Array


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainState:
    """Everything that decides the future of a run; made by ``Trainer.init``.

    Immutable: ``state.replace(params=...)`` returns another state. It is a pytree of arrays: a function of the state
    that ``jax.jit`` compiles is traced once for a whole run. What only the host knows (``epoch``, ``batch_idx``,
    ``examples``, ``batch_size``, ``history``, and the memories of host callbacks) is plain Python that reading never
    waits for. It travels along through ``jax.jit``, ``jax.tree.map``, ``jax.device_put``, ``copy`` and ``pickle``; in
    compiled code it has no value, but for ``epoch`` and ``batch_idx``.

    Attributes:
        step: int32 scalar, batches trained on since ``init``; the index of the batch that is under way. After 2**31
            batches it begins anew at 0; ``total_steps`` counts on.
        params: the model's parameters.
        model_state: whatever else the model carries, such as batch statistics; ``{}`` when it carries nothing.
        opt_state: the optax optimizer's state.
        key: a typed random key. It never changes in a run: the model draws from ``jax.random.fold_in(key, step)``, a
            callback from ``state.random_key(name)``. (Inside the compiled step it is another one in every cycle of
            2**31 batches.)
        accumulator: the open accumulation window; ``None`` when ``gradient_accumulation_steps`` is 1.
        loss_scale: flax's ``DynamicScale``; ``None`` unless the precision is float16.
        callback_states: each callback's own memory, by the callback's name; in compiled code only those on the device.
        stop: whether a callback has asked the run to end.
        host: the host fields, which are the trainer's own; ``None`` in compiled code.
        cycle: int32 scalar, how often ``step`` has begun anew; ``None`` inside the compiled step.
        skip: in ``on_backward_end``, whether the batch is to be skipped; ``None`` everywhere else.
        objective: in ``on_before_update`` and ``on_before_apply``, the loss that the update is to lower, with its
            ``value``, ``grad``, ``value_fn(params)`` and ``grad_fn(params)``; ``None`` everywhere else.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: jax.Array
    accumulator: Accumulator | None
    loss_scale: DynamicScale | None
    callback_states: Mapping[str, Any]
    stop: np.bool_ | jax.Array
    host: HostFields | None
    cycle: jax.Array | None = None
    skip: jax.Array | None = None
    objective: Objective | None = None

    def replace(self, **updates: Any) -> TrainState:
        """Return the state with some of its fields replaced.

        Raises:
            TypeError: there is no field of that name, or it is the trainer's own, such as ``epoch``.
        """
        unknown = updates.keys() - _FIELDS
        if unknown:
            raise TypeError(
                f"state.replace: a state has no field {min(unknown)!r} that can be replaced; those are "
                f"{', '.join(sorted(_FIELDS - {'host'}))}"
            )
        if not updates.keys().isdisjoint(_TRAVELLING):
            if "host" not in self.__dict__:
                self._arrive()
            fields = {name: value for name, value in self.__dict__.items() if name != "_travelling"}
            if self.host is None and updates.get("host") is None and "_travelling" in self.__dict__:
                # In compiled code, where host fields go along unseen.
                leaf, carried, _ = self.__dict__["_travelling"]
                fields["_travelling"] = leaf, carried, updates.get("callback_states", self.callback_states)
        else:
            fields = dict(self.__dict__)
        new = object.__new__(TrainState)
        new.__dict__.update(fields, **updates)
        return new

    def values(self) -> tuple[Any, ...]:
        """Return the fields that hooks may change, all memories of callbacks among them."""
        return *[getattr(self, field) for field in DATA_FIELDS], self.stop, self.skip, self.callback_states

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Carried]:
        children, carried = self.tree_flatten()
        return list(zip(_KEYS, children, strict=True)), carried

    def tree_flatten(self) -> tuple[list[Any], Carried]:
        leaf, carried, memories = self._departing()
        return [leaf, *[self.__dict__[field] for field in _CHILDREN[:-1]], memories], carried

    @classmethod
    def tree_unflatten(cls, carried: Carried, children: Any) -> TrainState:
        leaf, *values, memories = children
        state = object.__new__(cls)
        state.__dict__.update(zip(_CHILDREN[:-1], values, strict=True))
        if leaf is None:
            state.__dict__.update(host=None, callback_states=memories)
        else:
            state.__dict__["_travelling"] = leaf, carried, memories
        return state

    def __getstate__(self) -> dict[str, Any]:  # of copy and pickle
        self._departing()  # so that the copy has the same leaf
        if "_travelling" not in self.__dict__:  # without host fields
            return dict(self.__dict__)
        return {name: value for name, value in self.__dict__.items() if name not in _TRAVELLING}

    if not TYPE_CHECKING:  # which would take any attribute for one of a state's

        def __getattr__(self, name: str) -> Any:
            """Find the host fields of a state that has been through a function of JAX when they are first read."""
            if name not in _TRAVELLING or "_travelling" not in self.__dict__:
                raise AttributeError(f"a state has no attribute {name!r}")
            self._arrive()
            return self.__dict__[name]

    def _departing(self) -> tuple[Any, Carried, Any]:
        """The leaf, the static part and the memories on the device that this state has as a pytree."""
        if "_travelling" not in self.__dict__:
            if self.host is None:
                return None, _WITHOUT_HOST, self.callback_states
            on_device = self.host.device_names
            memories = {name: memory for name, memory in self.callback_states.items() if name in on_device}
            others = {name: memory for name, memory in self.callback_states.items() if name not in on_device}
            carried = Carried(self.host, others)
            self.__dict__["_travelling"] = carried.leaf, carried, memories
        leaf, carried, memories = self.__dict__["_travelling"]
        if leaf is carried.__dict__.get("leaf"):  # and not one that is still to be compared with its own
            carried.remember()
        return leaf, carried, memories

    def _arrive(self) -> None:
        leaf, carried, memories = self.__dict__["_travelling"]
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array | np.ndarray):
            self.__dict__.update(host=None, callback_states=memories)
            return
        known = find_carried(leaf, carried)
        self.__dict__.update(
            host=known.host, callback_states={**memories, **known.memories}, _travelling=(known.leaf, known, memories)
        )

    @property
    def total_steps(self) -> int:
        """Batches trained on since ``init``, however many; waits for the device."""
        self.on_host("total_steps")
        return CYCLE * (0 if self.cycle is None else int(self.cycle)) + int(self.step)

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one; counted from 0. In compiled code of the user's an int32 scalar."""
        return self.on_host("epoch").epoch if self._traced_place is None else self._traced_place[0]

    @property
    def batch_idx(self) -> int:
        """Batches of this epoch that are done. In compiled code of the user's an int32 scalar."""
        return self.on_host("batch_idx").batch_idx if self._traced_place is None else self._traced_place[1]

    @property
    def _traced_place(self) -> Any:
        """The leaf of a state in compiled code of the user's; ``None`` elsewhere."""
        leaf = self.__dict__.get("_travelling", (None,))[0]
        return leaf if isinstance(leaf, Tracer) else None

    @property
    def examples(self) -> int:
        """Examples in the batches of this epoch that are done."""
        return self.on_host("examples").examples

    @property
    def batch_size(self) -> int | None:
        """Examples in a batch, where a callback has asked for a size; ``None``: as the loader has it."""
        return self.on_host("batch_size").batch_size

    @property
    def history(self) -> History:
        """The logs of the epochs that are done."""
        return self.on_host("history").history

    @property
    def window_open(self) -> bool | jax.Array:
        """Whether gradients are waiting for their accumulation window to close; ``False`` without accumulation."""
        return False if self.accumulator is None else self.accumulator.micro_batches > 0

    def random_key(self, name: str) -> jax.Array:
        """Return a random key for this step and this name: another one at every step, for every name, and than the
        model's.

        >>> import ant_jax, optax
        >>> init = lambda key, inputs: (jnp.zeros(1), {})
        >>> apply = lambda params, model_state, inputs, key: (inputs, model_state)
        >>> optimizer, criterion = optax.sgd(0.1), optax.l2_loss
        >>> trainer = ant_jax.Trainer((init, apply), optimizer, criterion)
        >>> state = trainer.init((jnp.ones(1), jnp.ones(1)))
        >>> bool(state.random_key("noise") == state.random_key("mask"))
        False
        """
        key = self.key if self.cycle is None else key_of_cycle(self.key, self.cycle)
        return jax.random.fold_in(jax.random.fold_in(key, self.step), zlib.crc32(name.encode()))

    def request_stop(self, when: ArrayLike = True) -> TrainState:
        """Ask the run to end; scopes that are open still close in order.

        Between batches the run ends at once, in the middle of an accumulation window when the window has closed, and
        asked at the beginning of a batch or an epoch, after that batch or the epoch's first. The epoch counts as done.

        Args:
            when: whether to ask at all: a bool, or in a traced hook a boolean scalar (``wait >= patience``), since
                a Python ``if`` cannot read a traced value.

        Returns:
            The state with the request in it. A request cannot be taken back by a later callback's ``when=False``.
        """
        if self.host is None:
            return self.replace(stop=jnp.logical_or(self.stop, when))
        return self.replace(stop=np.bool_(bool(self.stop) or bool(when)))

    def request_batch_size(self, batch_size: int, from_batch: int | None = None) -> TrainState:
        """Ask, in a host hook, for another batch size; it stays until the next request.

        The training loader must be an :class:`ArrayLoader`. Its order of the examples stays as it is, so no example
        comes twice or is left out; with ``drop_last``, a size that the epoch has too few examples left for waits for
        the next epoch. Each size is a program of its own, compiled when it first comes.

        Args:
            batch_size: examples in a batch.
            from_batch: from which batch of this epoch on, as an index; it replaces the requests from that batch on.
                ``None``: the next one, which is, asked in ``on_batch_begin``, the one that begins.

        Returns:
            The state with the request in it.

        Raises:
            ValueError: ``batch_size`` is not positive, or the epoch is past ``from_batch``.
        """
        host = self.on_host("batch_size")
        start = host.batch_idx if from_batch is None else from_batch
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"request_batch_size: batch_size must be a positive whole number, got {batch_size!r}")
        if start < host.batch_idx:
            raise ValueError(f"request_batch_size: from_batch={start} is past; the next batch is {host.batch_idx}")
        sooner = tuple(item for item in host.batch_sizes if item[0] < start)
        return self.replace(host=host.asking((*sooner, (int(start), int(batch_size)))))

    def skip_batch(self, when: ArrayLike = True) -> TrainState:
        """Ask, in ``on_backward_end``, that this batch count for nothing.

        It joins no update, no accumulation window and no mean of an epoch; the model state is put back to what it was
        before the batch; ``logs["step_skipped"]`` is 1. What callbacks remember stays as they left it, and
        ``state.step`` counts the batch. (With ``precision="float16"`` the trainer does the same by itself when the loss
        scale was too large.)

        Args:
            when: whether to ask at all: a boolean scalar.

        Returns:
            The state with the request in it.

        Raises:
            RuntimeError: in any other hook.
        """
        if self.skip is None:
            raise RuntimeError(
                "state.skip_batch is for on_backward_end; elsewhere it is too late, or too early. To call such a hook "
                "by hand, give it state.replace(skip=False)"
            )
        return self.replace(skip=jnp.logical_or(self.skip, when))

    @property
    def hyperparams(self) -> _hyperparams.Hyperparams:
        """The numbers that can be changed while training, without compiling anything again.

        Those of an optimizer made with ``optax.inject_hyperparams`` are here under their own names, those that a
        callback was given as :class:`Hyperparam` under ``"<callback>/<name>"``.

        >>> import ant_jax, optax
        >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
        >>> init, apply = lambda key, x: (jnp.zeros(1), {}), lambda params, model_state, x, key: (x, model_state)
        >>> state = ant_jax.Trainer((init, apply), optimizer, optax.l2_loss).init((jnp.ones(1), jnp.ones(1)))
        >>> state.with_hyperparams(learning_rate=0.25).hyperparams
        {'learning_rate': Array(0.25, dtype=float32)}
        """
        return _hyperparams.read(self.opt_state, self.callback_states)

    def with_hyperparams(self, **values: ArrayLike) -> TrainState:
        """Return the state with other hyper-parameters.

        Args:
            **values: new values by their names in ``hyperparams``; a callback's may be named without its callback,
                ``max_norm`` for ``clip_by_global_norm/max_norm``, if there is only one of that name.

        Returns:
            The state in which they hold from the next batch on.

        Raises:
            HyperparamError: there is none of that name, or a schedule sets it.
        """
        opt_state, memories = _hyperparams.written(self.opt_state, self.callback_states, values, self._like)
        return self.replace(opt_state=opt_state, callback_states=memories)

    def _like(self, new: Any, old: Any) -> Any:
        if not isinstance(old, jax.Array):  # in the memory of a host callback
            return type(old)(new)
        return jnp.asarray(new, dtype=old.dtype) if self.host is None else strong(new, old)

    def with_callback_state(self, name: str, value: Any) -> TrainState:
        """Return the state in which the callback ``name`` remembers ``value``.

        Raises:
            KeyError: no callback of that name has a memory (a callback gets one by defining ``init``).
        """
        if name not in self.callback_states:
            known = ", ".join(map(repr, self.callback_states)) or "none"
            raise KeyError(
                f"no callback named {name!r} has a memory here (there are: {known}); a callback gets one by defining "
                f"init(state), and a host callback's memory is out of reach of traced hooks"
            )
        memories = {**self.callback_states, name: value}
        return self.replace(callback_states=memories)

    def on_host(self, field: str = "host") -> HostFields:
        """Return the host fields.

        Raises:
            HostFieldError: inside compiled code; the message names ``field``.
        """
        if self.host is None:
            raise HostFieldError(
                f"state.{field} is a host field and has no value inside a traced hook, nor in other compiled code. Use "
                f"state.step, or the epoch or batch_idx that the hook is given, or write a host callback (traced=False)"
            )
        return self.host

    def __repr__(self) -> str:
        return summary_of_state(self)


_FIELDS = frozenset(field.name for field in dataclasses.fields(TrainState))
# The fields that a state which has been through a function of JAX finds when they are first read.
_TRAVELLING = frozenset({"host", "callback_states"})
_WITHOUT_HOST = Carried(None)
