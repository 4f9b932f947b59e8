"""Kill a run twice, start the same command each time, and end with the bits of a run that nobody killed.

    python examples/06_resume.py

`fit(..., resume=directory)` begins if the directory is empty, and goes on from its newest checkpoint if it is not. The
example trains in a process of its own, kills that once as the kernel does when memory is short (SIGKILL) and once as a
cluster does (SIGTERM), and lets the third finish. At last it fine-tunes what that has learned for another task.
"""

import hashlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ant_jax as ant


class MLP(nn.Module):
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="encoder")(x))
        return nn.Dense(self.classes, name="head")(x)


def make_trainer(model: MLP, *callbacks: ant.Callback) -> ant.Trainer:
    return ant.Trainer(
        model,
        optax.adam(1e-3),
        optax.softmax_cross_entropy_with_integer_labels,
        metrics={"accuracy": ant.metrics.accuracy},
        callbacks=[ant.callbacks.clip_by_global_norm(1.0), ant.callbacks.gradient_noise(0.01), *callbacks],
        progress_bar=False,
    )


def load_data():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)


def train(epochs: int, directory: Path | None = None) -> ant.TrainState:
    """Train; with a directory, save into it as the run goes on, and begin with what is in it already."""
    x_train, x_val, y_train, y_val = load_data()
    saving = [] if directory is None else [ant.callbacks.checkpoint(directory, every=20)]
    trainer = make_trainer(MLP(), *saving)
    state, _ = trainer.fit(
        trainer.init((x_train, y_train), seed=0),
        ant.ArrayLoader((x_train, y_train), batch_size=32),
        epochs,
        ant.ArrayLoader((x_val, y_val), batch_size=128, shuffle=False),
        resume=directory,
    )
    return state


def start(command: list[str], directory: Path, end: signal.Signals | None, step: int) -> int:
    """Run a command, end it by a signal as soon as there is a checkpoint of a step; return its exit code."""
    with subprocess.Popen(command) as process:
        while end is not None and process.poll() is None:
            if any(int(path.name[5:]) >= step for path in directory.glob("step_*") if path.name[5:].isdecimal()):
                process.send_signal(end)
                break
            time.sleep(0.01)
        return process.wait()


def bits(state: ant.TrainState) -> str:
    """A hash of all arrays (parameters, optimizer, random keys, the callbacks' memories) and the logs of all epochs."""
    digest = hashlib.sha256(repr(state.history.to_dict()).encode())
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.key, state.callback_states)):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return digest.hexdigest()[:16]


def fine_tune(directory: Path, examples: int = 96, epochs: int = 20) -> dict[str, float]:
    """Learn from few examples which digits have a loop, once from scratch and once with the encoder that was saved."""
    x_train, x_val, y_train, y_val = load_data()
    has_loop = np.isin(np.arange(10), [0, 6, 8, 9]).astype(np.int32)
    train_loader = ant.ArrayLoader((x_train[:examples], has_loop[y_train[:examples]]), batch_size=16)
    val_loader = ant.ArrayLoader((x_val, has_loop[y_val]), batch_size=128, shuffle=False)
    trainer = make_trainer(MLP(classes=2))
    fresh = trainer.init((x_train, y_train), seed=1)
    # The head is of another shape and stays fresh; without only=..., that would be refused, and named.
    tuned = trainer.restore_params(directory, fresh, only=["encoder/*"])
    accuracies = {}
    for name, state in {"from scratch": fresh, "fine-tuned": tuned}.items():
        state, _ = trainer.fit(state, train_loader, epochs)
        accuracies[name] = trainer.evaluate(state, val_loader)["val_accuracy"]
    return accuracies


def main(epochs: int = 15):
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "digits"
        warnings = [f"-W{option}" for option in sys.warnoptions]
        command = [sys.executable, *warnings, __file__, str(epochs), str(directory)]
        for end, step in ((signal.SIGKILL, 120), (signal.SIGTERM, 280), (None, 0)):
            code = start(command, directory, end, step)
            print(f"  {end.name if end else 'finished'}, exit code {code}", flush=True)
            assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, None: 0}[end]

        resumed = make_trainer(MLP()).restore(directory)
        straight = train(epochs)
        print(f"killed twice      step {int(resumed.step)}, {bits(resumed)}")
        print(f"never interrupted step {int(straight.step)}, {bits(straight)}")
        if bits(resumed) != bits(straight):
            raise SystemExit("the two runs differ")

        print("Is there a loop in the digit? Learned from 96 of them:")
        accuracies = fine_tune(directory)
        for name, accuracy in accuracies.items():
            print(f"  {name:12} {accuracy:.2%}")
        return accuracies


if __name__ == "__main__":
    if len(sys.argv) == 3:
        train(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
