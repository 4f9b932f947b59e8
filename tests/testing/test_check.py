"""Every kind of wrong callback is caught, and its fault is named."""

import contextlib
import dataclasses
import gzip
import io
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import numbers

import ant_jax as ant
from ant_jax import testing
from ant_jax.testing._compare import difference


def gradient_hook(change: Callable[[Any, Any, Any], Any]) -> Callable[[], ant.Callback]:
    """A callback whose on_backward_end returns ``change(state, grads, logs)``."""
    hook = lambda batch_idx, trainer, state, grads, logs: change(state, grads, logs)  # noqa: E731
    return lambda: ant.Callback(name="bad", on_backward_end=hook)


def epoch_hook(change: Callable[[Any, Any], Any], init: Any = None, **options: Any) -> Callable[[], ant.Callback]:
    """A host callback whose on_epoch_end returns ``change(state, logs)``."""
    hook = lambda epoch, trainer, state, logs: change(state, logs)  # noqa: E731
    return lambda: ant.Callback(name="bad", init=init and (lambda state: init()), on_epoch_end=hook, **options)


def scaled(grads: Any, factor: Any) -> Any:
    return jax.tree.map(lambda grad: grad * factor, grads)


def counter_in_the_closure() -> ant.Callback:
    calls = [0]

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        calls[0] += 1
        return state, scaled(grads, float(calls[0])), logs

    return ant.Callback(name="bad", on_backward_end=on_backward_end)


def tracer_in_a_list() -> ant.Callback:
    seen: list[Any] = []

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        seen.append(logs["loss"])
        return state, grads, logs

    return ant.Callback(name="bad", on_backward_end=on_backward_end)


def memory_in_the_closure() -> ant.Callback:
    best = [np.inf]

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        best[0] = min(best[0], float(epoch))
        scale = 1.0 if best[0] == 0 else 0.5  # a run that goes on has not seen epoch 0
        return state.replace(params=scaled(state.params, np.float32(scale))), logs

    return ant.Callback(name="bad", on_epoch_end=on_epoch_end)


def kept_between_runs() -> ant.Callback:
    runs = [0]

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        runs[0] += 1
        return state.replace(params=scaled(state.params, np.float32(runs[0]))), logs

    return ant.Callback(name="bad", on_train_begin=on_train_begin)


def publishing_a_count() -> ant.Callback:
    """Nothing but the history tells."""
    epochs = [0]

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        epochs[0] += 1
        return state, {**logs, "epochs": epochs[0]}

    return ant.Callback(name="bad", on_epoch_end=on_epoch_end)


def another_program_every_epoch() -> ant.Callback:
    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        total = jax.jit(lambda x: jnp.sum(x) + epoch)(jnp.ones(3 + 7 * epoch))
        return state, {**logs, "total": float(total) * 0}

    return ant.Callback(name="bad", on_epoch_end=on_epoch_end)


def depends_on_the_launch() -> ant.Callback:
    """Looks whenever the host has control, and counts these looks into the parameters."""

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        shrink = np.float32(0.9 if len(logs.window["loss"]) == 1 else 0.8)
        return state.replace(params=scaled(state.params, shrink)), logs

    return ant.Callback(name="bad", every=None, on_batch_end=on_batch_end)


def in_place(state: Any, logs: Any) -> Any:
    state.callback_states["bad"]["losses"].append(1.0)
    return state, logs


def array_in_place(state: Any, logs: Any) -> Any:
    state.callback_states["bad"]["count"] += 1
    return state.with_callback_state("bad", dict(state.callback_states["bad"])), logs


def replace_in_place(state: Any, logs: Any) -> Any:
    state.params["dense"]["bias"] = state.params["dense"]["bias"] + 1
    return state, logs


def printing(state: Any, grads: Any, logs: Any) -> Any:
    print("loss", logs["loss"].dtype)
    return state, grads, logs


def debugging(state: Any, grads: Any, logs: Any) -> Any:
    jax.debug.print("{}", logs["loss"])
    return state, grads, logs


def silent_counter_in_the_closure() -> ant.Callback:
    calls = 0

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        nonlocal calls
        calls += 1
        return state, grads, logs

    return ant.Callback(name="bad", on_backward_end=on_backward_end)


@dataclasses.dataclass(frozen=True)
class ListInSelf(ant.Callback):
    name = "bad"
    names: list[str] = dataclasses.field(default_factory=list)

    def on_backward_end(self, batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        self.names.extend(logs)
        return state, grads, logs


TOTALS = {"traces": 0}


def counting_in_a_global(state: Any, grads: Any, logs: Any) -> Any:
    TOTALS["traces"] += 1
    return state, grads, logs


def writing_a_file(state: Any, grads: Any, logs: Any) -> Any:
    with open(f"{tempfile.gettempdir()}/traced.txt", "a"):
        return state, grads, logs


def writing_into_an_open_file() -> ant.Callback:
    file = io.StringIO()

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        file.write("a batch")
        return state, grads, logs

    return ant.Callback(name="bad", on_backward_end=on_backward_end)


def connecting(state: Any, grads: Any, logs: Any) -> Any:
    with socket.socket() as one, contextlib.suppress(OSError):
        one.connect(("127.0.0.1", 9))
    return state, grads, logs


def failing_at_the_exception() -> ant.Callback:
    return ant.Callback(name="bad", on_exception=lambda e, trainer, state, logs: None)  # pyright: ignore[reportArgumentType]


def counting_the_batches(stop: bool = False) -> Callable[[], ant.Callback]:
    """Counts the batches of an epoch outside of the state, into the parameters; perhaps it ends the run there."""

    def make() -> ant.Callback:
        count = [0]

        def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
            count[0] = 0
            return state, logs

        def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
            count[0] += 1
            return state, logs

        def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
            state = state.replace(params=scaled(state.params, np.float32(1 / (1 + count[0]))))
            return state.request_stop(when=stop), logs

        hooks = {"on_epoch_begin": on_epoch_begin, "on_batch_end": on_batch_end, "on_epoch_end": on_epoch_end}
        return ant.Callback(name="bad", **hooks)

    return make


def launches_of_a_run_that_stops() -> ant.Callback:
    """Asks the trainer how many steps a launch has, and ends the run in its first epoch."""

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state.replace(params=scaled(state.params, np.float32(0.5 if trainer.fuse else 1))).request_stop(), logs

    return ant.Callback(name="bad", on_epoch_end=on_epoch_end)


def needing_an_array(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
    return state, {**logs, "late": (epoch >= 1).astype(jnp.int32)}


def inverting(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
    count = jnp.where(~(epoch >= 1), 0, state.callback_states["bad"]["n"] + 1)
    return state.with_callback_state("bad", {"n": count}), logs


WRONG: dict[str, tuple[Callable[[], ant.Callback], str]] = {
    "a counter in the closure": (counter_in_the_closure, "on_backward_end: traced twice it gives two programs"),
    "a clock": (
        gradient_hook(lambda state, grads, logs: (state, scaled(grads, time.perf_counter_ns() % 10**6 / 10**6), logs)),
        "traced twice it gives two programs: .*a clock",
    ),
    "numpy's random numbers": (
        gradient_hook(lambda state, grads, logs: (state, scaled(grads, np.random.default_rng().random()), logs)),
        "traced twice it gives two programs: .*numpy's random numbers",
    ),
    "a leaked tracer": (tracer_in_a_list, "on_backward_end: it leaks a tracer"),
    "a silent counter in the closure": (
        silent_counter_in_the_closure,
        "on_backward_end: it changes calls while it is traced",
    ),
    "a list in self": (ListInSelf, "on_backward_end: it changes self.names while it is traced"),
    "a counter in a global": (
        gradient_hook(counting_in_a_global),
        r"on_backward_end: it changes TOTALS\['traces'\] while it is traced",
    ),
    "a file": (
        gradient_hook(writing_a_file),
        "on_backward_end: it opens '.*traced.txt' for writing while it is traced",
    ),
    "an open file": (writing_into_an_open_file, "on_backward_end: it changes file while it is traced"),
    "a connection": (gradient_hook(connecting), "on_backward_end: it connects to .'127.0.0.1', 9. while it is traced"),
    "a KeyError": (
        gradient_hook(lambda state, grads, logs: (state, {"dense": grads["dens"]}, logs)),
        "on_backward_end: KeyError.'dens'",
    ),
    "on_exception that returns nothing": (
        failing_at_the_exception,
        "on_exception: a run that fails ends with another failure: .*on_exception returned None",
    ),
    "batches counted in the closure": (
        counting_the_batches(),
        "a run that goes on from batch 3 of epoch 1 ends otherwise",
    ),
    "batches counted in the closure of a run that stops": (
        counting_the_batches(stop=True),
        "a run that goes on from batch 3 of epoch 0 ends otherwise",
    ),
    "launches of a run that stops": (launches_of_a_run_that_stops, "a run with a launch a step ends otherwise"),
    "a print": (gradient_hook(printing), "on_backward_end: it prints while it is traced"),
    "a side effect": (gradient_hook(debugging), "it has a side effect in compiled code"),
    "nothing returned": (gradient_hook(lambda state, grads, logs: None), "on_backward_end returned None"),
    "another structure": (
        gradient_hook(lambda state, grads, logs: (state, {"dense": {}}, logs)),
        "grads of another structure(.|\n)*dense/bias: missing",
    ),
    "another dtype": (
        gradient_hook(lambda state, grads, logs: (state, jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads), logs)),
        "expected float32.*, got bfloat16",
    ),
    "a dropped log": (gradient_hook(lambda state, grads, logs: (state, grads, {})), "dropped the log 'batch_size'"),
    "an exception": (epoch_hook(lambda state, logs: 1 / 0), "training with it fails: division by zero"),
    "an epoch that must be an array": (
        lambda: ant.Callback(name="bad", traced=True, on_epoch_end=needing_an_array),
        "on_epoch_end: called by hand with Python's numbers, it fails: .*'bool' object has no attribute 'astype'",
    ),
    "a Python bool inverted": (
        lambda: ant.Callback(name="bad", traced=True, init=lambda state: {"n": jnp.int32(0)}, on_epoch_end=inverting),
        # Since Python 3.12 the inversion of a bool warns.
        "on_epoch_end: called by hand(, it makes another thing of| with) Python's numbers",
    ),
    "a Python branch": (
        gradient_hook(lambda state, grads, logs: (state, scaled(grads, 2.0) if logs["loss"] > 1 else grads, logs)),
        "on_backward_end: Attempted boolean conversion of traced array",
    ),
    "a memory that cannot be saved": (
        epoch_hook(lambda state, logs: (state, logs), init=lambda: {"file": object()}),
        "its memory does not survive saving: the memory of callback 'bad'.*is object",
    ),
    "memory in the closure": (memory_in_the_closure, "ends otherwise than one that was not interrupted"),
    "memory kept between runs": (kept_between_runs, "a second run with the same trainer ends otherwise"),
    "a log that counts runs, too": (
        publishing_a_count,
        "a second run with the same trainer ends otherwise: the history",
    ),
    "another program every epoch": (another_program_every_epoch, "programs are compiled after the first epoch"),
    "a list changed in place": (
        epoch_hook(in_place, init=lambda: {"losses": []}),
        "changed the state or the gradients in place|changes its memory in place",
    ),
    "an array changed in place": (
        epoch_hook(array_in_place, init=lambda: {"count": np.zeros(2)}),
        "in place",
    ),
    "parameters changed in place": (epoch_hook(replace_in_place), "changed the state or the gradients in place"),
    "looks that count": (
        depends_on_the_launch,
        "it depends on how many steps a launch has|a second run with the same trainer",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_callback_is_caught_and_its_fault_is_named(fault):
    make, message = WRONG[fault]
    with pytest.raises(testing.CallbackFault, match=f"callback 'bad'.*(.|\n)*{message}"):
        testing.check_callback(make)


FLAGS = {
    "O_WRONLY": os.O_WRONLY,
    "O_RDWR": os.O_RDWR,
    "O_WRONLY, O_CREAT": os.O_WRONLY | os.O_CREAT,
    "O_WRONLY, O_CREAT, O_EXCL": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "O_RDWR, O_APPEND": os.O_RDWR | os.O_APPEND,
    "O_WRONLY, O_TRUNC": os.O_WRONLY | os.O_TRUNC,
}
TO_WRITE = [way + kind for way in ("w", "a", "x", "r+", "w+", "a+", "x+") for kind in ("", "t", "b")]
WRITING: dict[str, Callable[[pathlib.Path], Any]] = {
    **{mode: lambda path, mode=mode: open(path, mode).close() for mode in TO_WRITE},
    "unbuffered": lambda path: open(path, "wb", buffering=0).close(),
    "bytes": lambda path: open(os.fsencode(path), "w").close(),
    "io.FileIO": lambda path: io.FileIO(str(path), "x").close(),
    "gzip": lambda path: gzip.open(path, "w").close(),
    "numpy.save": lambda path: np.save(path, np.ones(1)),
    "write_text": lambda path: path.write_text("a batch"),
    "write_bytes": lambda path: path.write_bytes(b"a batch"),
    "path.open": lambda path: path.open("x").close(),
    "touch": lambda path: path.touch(),
    **{name: lambda path, flags=flags: os.close(os.open(path, flags)) for name, flags in FLAGS.items()},
    "os.open of a str": lambda path: os.close(os.open(str(path), os.O_WRONLY)),
    "os.open of bytes": lambda path: os.close(os.open(os.fsencode(path), os.O_RDWR)),
}
READING: dict[str, Callable[[pathlib.Path], Any]] = {
    **{mode: lambda path, mode=mode: open(path, mode).close() for mode in ("r", "rt", "rb")},
    "read_text": lambda path: path.read_text(),
    "O_RDONLY": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "a descriptor": lambda path: open(os.open(path, os.O_RDONLY)).close(),
}
CREATING = [*[mode for mode in TO_WRITE if "x" in mode], "io.FileIO", "path.open", "touch", "O_WRONLY, O_CREAT, O_EXCL"]


def test_a_file_that_is_opened_for_writing_is_noticed_in_every_mode(tmp_path):
    places = {way: tmp_path / f"{number}.npy" for number, way in enumerate([*WRITING, *READING])}

    def opening(state: Any, grads: Any, logs: Any) -> Any:
        for way, use in {**WRITING, **READING}.items():
            use(places[way])
            if way in CREATING:  # it is traced twice
                places[way].unlink()
        return state, grads, logs

    for way, path in places.items():
        if way not in CREATING:
            path.touch()
    with pytest.raises(testing.CallbackFault) as caught:
        testing.check_callback(gradient_hook(opening))
    said = {way for way, path in places.items() if f"opens {str(path)!r} for writing" in str(caught.value)}
    assert said == set(WRITING)


@dataclasses.dataclass(frozen=True)
class Best(ant.Callback):
    """A right one in the other style: host memory that changes its form, and a gradient hook elsewhere."""

    factor: float = 0.5

    def init(self, state: Any) -> Any:
        return {"seen": []}

    def on_epoch_end(self, epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen = [*state.callback_states[self.name]["seen"], float(logs["train_loss"]) * self.factor]
        return state.with_callback_state(self.name, {"seen": seen}), logs


RIGHT: dict[str, Callable[[], ant.Callback]] = {
    "a dataclass": Best,
    "a gradient hook": gradient_hook(lambda state, grads, logs: (state, scaled(grads, 0.5), logs)),
    "a host hook with output": epoch_hook(lambda state, logs: (print("epoch"), (state, logs))[1]),
    "one that stops": epoch_hook(lambda state, logs: (state.request_stop(), logs)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_callback_passes(kind):
    testing.check_callback(RIGHT[kind])


def test_it_asks_for_a_function_that_makes_the_callback():
    with pytest.raises(TypeError, match=r"check_callback\(lambda: callback\)"):
        testing.check_callback(Best())  # pyright: ignore[reportArgumentType]  # the mistake


# --- what two states differ in


@pytest.fixture(scope="module")
def trained() -> ant.TrainState:
    """A state in which every field has numbers."""
    host = ant.Callback(name="host", init=lambda state: {"seen": [0.5, 1], "array": np.ones(2)})
    nan = ant.Callback(name="nan", on_epoch_end=lambda epoch, trainer, state, logs: (state, {**logs, "nan": np.nan}))
    tiny = testing.problem(
        ant.callbacks.ema(0.9),
        host,
        nan,
        model=(lambda key, inputs: ({"kernel": jnp.ones((4, 3))}, {"seen": jnp.zeros(2)}), _outputs),
        optimizer=optax.sgd(0.1, momentum=0.9),
        gradient_accumulation_steps=2,
        precision="float16",
    )
    return tiny.trainer.fit(tiny.state, tiny.train_loader, 1, tiny.val_loader)[0]


def _outputs(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    return inputs @ params["kernel"], model_state


def with_another_bit(leaf: Any) -> Any:
    data = bytearray(numbers(leaf).tobytes())
    data[0] ^= 1
    array = jnp.asarray(np.frombuffer(data, numbers(leaf).dtype).reshape(numbers(leaf).shape))
    return jax.random.wrap_key_data(array) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else array


def copied(state: ant.TrainState) -> ant.TrainState:
    state = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, state)
    return state.replace(host=state.on_host()._replace(history=ant.History(list(state.history))))


def test_equal_states_differ_in_nothing(trained):
    spoilt = trained.replace(params={"kernel": jnp.full((4, 3), np.nan)})
    for state in (trained, spoilt):
        assert difference(state, state) == difference(state, copied(state)) == ""


def test_a_bit_of_any_array_of_a_state_is_a_difference_that_is_named(trained):
    leaves, structure = jax.tree_util.tree_flatten_with_path(trained)
    fields: set[str] = set()
    for position, (path, leaf) in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            others = [with_another_bit(value) if i == position else value for i, (_, value) in enumerate(leaves)]
            named = difference(trained, jax.tree.unflatten(structure, others))
            place = jax.tree_util.keystr(path, simple=True, separator="/")
            assert named == f"state.{place} differs"
            fields.add(place.partition("/")[0])
    compared = {"step", "cycle", "params", "model_state", "opt_state", "key", "accumulator", "loss_scale"}
    assert fields == {*compared, "callback_states"}


def remembering(value: Any) -> Callable[[ant.TrainState], ant.TrainState]:
    return lambda state: state.with_callback_state("host", value)


def recording(change: Callable[[dict[str, Any]], list[Any]]) -> Callable[[ant.TrainState], ant.TrainState]:
    return lambda state: state.replace(host=state.on_host()._replace(history=ant.History(change(state.history[0]))))


KERNEL, MEMORY = "state.params/kernel differs", "state.callback_states/host differs"
DIFFERENCES: dict[str, tuple[Callable[[ant.TrainState], ant.TrainState], str]] = {
    "a sign of zero": (
        lambda state: state.replace(model_state={"seen": -state.model_state["seen"]}),
        "model_state/seen",
    ),
    "a shape": (lambda state: state.replace(params={"kernel": state.params["kernel"].reshape(2, 6)}), KERNEL),
    "a dtype": (
        lambda state: state.replace(params={"kernel": jax.lax.bitcast_convert_type(state.params["kernel"], jnp.int32)}),
        KERNEL,
    ),
    "no parameter": (lambda state: state.replace(params={}), KERNEL),
    "one more parameter": (
        lambda state: state.replace(params={**state.params, "bias": jnp.zeros(3)}),
        "state.params/bias differs",
    ),
    "no window": (lambda state: state.replace(accumulator=None), "state.accumulator/"),
    "a memory's number": (remembering({"seen": [0.25, 1], "array": np.ones(2)}), MEMORY),
    "a memory's kind of number": (remembering({"seen": [0.5, 1.0], "array": np.ones(2)}), MEMORY),
    "a memory's container": (remembering({"seen": (0.5, 1), "array": np.ones(2)}), MEMORY),
    "a memory's array": (remembering({"seen": [0.5, 1], "array": np.ones(2, np.float32)}), MEMORY),
    "no memory": (lambda state: state.replace(callback_states={"ema": state.callback_states["ema"]}), MEMORY),
    "a log": (recording(lambda logs: [{**logs, "val_loss": 0.5}]), "the history differs:\nepoch"),
    "a log that was not a number": (recording(lambda logs: [{**logs, "nan": 0.5}]), "the history differs:\nepoch"),
    "one more log": (recording(lambda logs: [{**logs, "more": 0.5}]), "the history differs:\nepoch"),
    "no epoch": (recording(lambda logs: []), "the history differs:\nepoch"),
    "one more epoch": (recording(lambda logs: [logs, logs]), "the history differs:\nepoch"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_every_kind_of_difference_of_two_states_is_named(what, trained):
    change, named = DIFFERENCES[what]
    other = change(copied(trained))
    for one, two in ((trained, other), (other, trained)):
        assert named in difference(one, two)
