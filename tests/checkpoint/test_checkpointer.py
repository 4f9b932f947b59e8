"""A run that was saved goes on from every moment, bit for bit; what a directory holds is known."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import BATCH, adam, assert_bit_equal, batches, data, host, leaves_of, numbers, trainer

import ant_jax as ant
from ant_jax._checkpoint.manifest import read_manifest, write_manifest
from ant_jax._state.host_fields import HostFields


def remember(name: str = "remember") -> ant.Callback:
    """A host callback with a memory of every kind that can be saved."""

    def on_epoch_end(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        memory = {
            "seen": [*state.callback_states[name]["seen"], epoch],
            "best": float("inf"),
            "text": "é",
            "kinds": {3: (1.5, None, np.arange(3, dtype=np.int16), jnp.ones(2, jnp.bfloat16))},
        }
        return state.with_callback_state(name, memory), {**logs, "vector": np.array([0.1, 0.2], np.float32)}

    return host(name, init=lambda state: {"seen": []}, on_epoch_end=on_epoch_end)


def publish() -> ant.Callback:
    return host("publish", on_batch_end=lambda i, trainer, state, logs: (state, {**logs, "twice": 2 * logs["loss"]}))


def grab(states: list[ant.TrainState], every: int | None = 1) -> ant.Callback:
    """Keeps the state of every moment at which a run may be saved."""

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        states.append(state)
        return state, logs

    identity = lambda i, trainer, state, logs: (state, logs)  # noqa: E731
    return host("grab", every=every, on_batch_end=identity, on_checkpoint=on_checkpoint)


OPTIONS = {
    "plain": {},
    "accumulating": {"gradient_accumulation_steps": 3, "optimizer": adam()},
    "bfloat16": {"precision": "bfloat16", "optimizer": adam()},
    "float16": {"precision": "float16", "gradient_accumulation_steps": 3, "optimizer": adam()},
}
RESUMED = (1, 4, 8)  # in the first epoch, with an open window if gradients accumulate; between epochs; in the second


def form(leaf: Any) -> Any:
    """What decides, beside shape and dtype, whether a leaf fits the program that was compiled for another."""
    return getattr(leaf, "weak_type", None), getattr(leaf, "sharding", None), getattr(leaf, "committed", None)


def comparable(host: HostFields) -> HostFields:
    """Host fields with lists in the place of the arrays that sums are, but for those that `leaves_of` has."""
    published = {name: (total.tolist(), n) for name, (total, n) in host.published.items()}
    return host._replace(published=published, log_sums=None)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_goes_on_from_every_moment_in_a_new_trainer_bit_for_bit(options, tmp_path):
    states: list[ant.TrainState] = []
    observers = (ant.callbacks.gradient_noise(0.01), ant.callbacks.early_stopping("train_loss"), remember(), publish())

    def new(*more: ant.Callback) -> ant.Trainer:
        return trainer(*observers, *more, **options)

    loader = ant.ArrayLoader(data(4 * BATCH + 3), BATCH)
    first = new(grab(states))
    whole, history = first.fit(first.init(batches()[0]), loader, 2, batches(1))
    assert len({b"".join(leaf.tobytes() for leaf in leaves_of(state)) for state in states}) == 10  # all differ
    second = new(grab([]))
    for place, state in enumerate(states):
        directory = tmp_path / str(place)
        first.save(directory, state)
        restored = second.restore(directory)
        for old, got in zip(leaves_of(state), leaves_of(restored), strict=True):
            np.testing.assert_array_equal(old, got, strict=True)
        assert comparable(restored.on_host()) == comparable(state.on_host())
        assert restored.stop == state.stop
        assert [form(leaf) for leaf in jax.tree.leaves(restored)] == [form(leaf) for leaf in jax.tree.leaves(state)]
        if place in RESUMED:
            assert bool(state.window_open) == ("gradient_accumulation_steps" in options and state.batch_idx > 0)
            resumed, resumed_history = second.fit(restored, loader, 2, batches(1))
            assert_bit_equal(whole, resumed)
            assert_bit_equal(whole, resumed, "loss_scale", "key")
            assert resumed_history == history
            memory = resumed.callback_states["remember"]
            assert memory["seen"] == [0, 1]
            assert [type(item) for item in memory["kinds"][3][:2]] == [float, type(None)]


def test_restoring_compiles_nothing_anew(tmp_path, compilations):
    a_trainer = trainer(ant.callbacks.ema(0.9))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    a_trainer.save(tmp_path, state)
    state = a_trainer.restore(tmp_path)
    a_trainer.fit(state, batches(2), 2)
    compilations.reset()
    a_trainer.fit(a_trainer.restore(tmp_path), batches(2), 2)
    assert compilations.count == 0


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax says so of any tree that it reads so
@pytest.mark.parametrize("reader", ["StandardCheckpointer", "PyTreeCheckpointer"])
def test_orbax_and_json_alone_read_all_of_a_checkpoint(reader, tmp_path):
    import orbax.checkpoint as ocp

    a_trainer = trainer(ant.callbacks.ema(0.9), remember(), optimizer=adam(), gradient_accumulation_steps=3)
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(), 1)
    state, _ = a_trainer.train_step(state, batches()[0])
    assert bool(state.window_open)
    a_trainer.save(tmp_path, state)
    (saved,) = tmp_path.glob("step_*")

    def by_path(tree: Any) -> dict[str, np.ndarray]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path, simple=True, separator="/"): numbers(leaf) for path, leaf in leaves}

    with getattr(ocp, reader)() as opened:
        arrays = by_path(opened.restore(saved / "arrays"))
    fields = ("step", "cycle", "params", "model_state", "opt_state", "key", "accumulator")
    there = {field: getattr(state, field) for field in fields}
    expected = by_path({**there, "callback_states": {"ema": state.callback_states["ema"]}})
    assert arrays.keys() == expected.keys()
    for name, leaf in arrays.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name, strict=True)

    host_part = json.loads((saved / "host" / "metadata").read_text())
    rows = {"/".join(keys): (dtype, shape, crc32) for keys, dtype, shape, crc32 in host_part["arrays"]}
    assert rows == {
        name: (leaf.dtype.name, list(leaf.shape), zlib.crc32(leaf.tobytes())) for name, leaf in arrays.items()
    }
    (row,) = host_part["history"]
    assert dict(row["dict"])["train_loss"] == history[0]["train_loss"]
    assert dict(host_part["fields"]["dict"])["epoch"] == 1
    assert dict(dict(host_part["memories"]["dict"])["remember"]["dict"])["seen"] == [0]


def test_newest_chosen_and_missing(tmp_path):
    a_trainer = trainer()
    states = [a_trainer.init(batches()[0])]
    for batch in batches(2):
        states.append(a_trainer.train_step(states[-1], batch)[0])
        a_trainer.save(tmp_path, states[-1])
    assert int(a_trainer.restore(tmp_path).step) == 2
    assert_bit_equal(a_trainer.restore(tmp_path, step=1), states[1])
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7; the steps there are: 1, 2"):
        a_trainer.restore(tmp_path, step=7)
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        a_trainer.restore(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="has checkpoints of steps 1, 2, and the state to save is at step 1"):
        a_trainer.save(tmp_path, states[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no checkpoint; the steps there are: none"):
        a_trainer.restore(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot save into .*file is no directory"):
        a_trainer.save(tmp_path / "file", states[1])


def test_what_a_checkpointer_knows_of_its_directory(tmp_path):
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    with a_trainer.checkpointer(tmp_path, keep=1, keep_best=3, mode="max") as checkpointer:
        assert (checkpointer.steps, checkpointer.latest_step, checkpointer.best_step) == ([], None, None)
        for metric, best in ((float("nan"), None), (0.5, 2), (None, 2), (float("inf"), 2), (0.75, 5), (0.5, 5)):
            state, _ = a_trainer.train_step(state, batches()[0])
            checkpointer.save(state, metric)
            assert (checkpointer.latest_step, checkpointer.best_step) == (int(state.step), best)
        with pytest.raises(RuntimeError, match="is in use by process .* on .* since .*; wait for it to end"):
            a_trainer.save(tmp_path, state)
    with a_trainer.checkpointer(tmp_path, keep=1, keep_best=3, mode="max") as checkpointer:  # read from the disk
        assert (checkpointer.steps, checkpointer.best_step) == ([2, 5, 6], 5)
    with a_trainer.checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="make the checkpointer with mode='min' or 'max'"):
            _ = checkpointer.best_step


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    a_trainer = trainer()
    a_trainer.save(tmp_path, a_trainer.init(batches()[0]))
    written = tmp_path / "step_0" / "host" / "metadata"
    host_part = read_manifest(written.read_text())
    written.write_text(write_manifest({**host_part, "format": host_part["format"] + 1}, {}))
    with pytest.raises(ant.StateMismatch, match=f"of format 3, written by ant_jax {ant.__version__}"):
        a_trainer.restore(tmp_path)
