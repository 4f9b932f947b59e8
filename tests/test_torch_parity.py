"""The same training in torch and here: the losses of 200 steps, the hooks and their logs, and what ends a run.

The torch side is ``benchmarks/torch_trainer.py``. Both sides have the same initial weights, batches and settings, and
what remains between them is rounding. Over 200 steps the losses come to differ by a few 1e-6 with SGD, and by up to
3e-5 with Adam, most of which is optax's ``1 - 0.999**count`` in float32: in the first steps it is off by 1e-5.

The models are smooth, since with ReLU no bound holds but by chance: of a hundred thousand activations one may be closer
to zero than the rounding, and then has a gradient on one side alone. After such a step torch's float32 and its own
float64 part, too, by 1e-2 within 100 steps of Adam.

Where ``ant_jax`` differs on purpose, a test shows how, and turns the original's behaviour on.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from problems import host, standard_promotion
from torch_models import PAIRS, Batch, Pair

import ant_jax as ant
from ant_jax import testing
from benchmarks import torch_trainer
from benchmarks.torch_trainer import Callback as TorchCallback


BATCH, BATCHES, EPOCHS = 8, 10, 20  # 200 steps
RAGGED = 3  # examples in the last batch of an epoch
ONCE_AN_EPOCH = 10**6


@pytest.fixture(autouse=True, scope="module")
def quiet_torch():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def standard_rules():
    # Flax's own layers promote dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(-1) == targets).float().mean()


# Data


def batches(pair: Pair, count: int = BATCHES, last: int = BATCH, seed: int = 0) -> list[Batch]:
    """So many batches, the last of another size."""
    rng = np.random.default_rng(seed)
    return [pair.data(rng, BATCH) for _ in range(count - 1)] + [pair.data(rng, last)]


def in_torch(loader: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same batches as tensors, images with their channels first."""
    moved = [(np.moveaxis(inputs, -1, 1) if inputs.ndim == 4 else inputs, targets) for inputs, targets in loader]
    return [(torch.from_numpy(inputs.copy()), torch.from_numpy(targets).long()) for inputs, targets in moved]


# The torch side


class TorchLosses(TorchCallback):
    def __init__(self):
        self.losses: list[float] = []

    def on_batch_end(self, batch_idx, trainer, logs=None):
        assert logs is not None
        self.losses.append(logs["loss"])


def closes_window(trainer: torch_trainer.Trainer, batch_idx: int) -> bool:
    return (batch_idx + 1) % trainer.gradient_accumulation_steps == 0 or batch_idx + 1 == BATCHES


class TorchClip(TorchCallback):
    """Gradient clipping in ``on_backward_end``, as the page proposes it, where the window closes.

    There ``p.grad`` is the window's gradient. This side's ``on_backward_end`` sees that of its batch, so the
    counterpart of this clip is ``clip_by_global_norm``, which runs in ``on_before_update``, on the window's gradient.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.norms: list[float] = []

    def on_backward_end(self, batch_idx, trainer, logs=None):
        if closes_window(trainer, batch_idx):
            norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), self.max_norm)
            self.norms.append(norm.item())


class TorchSchedule(TorchCallback):
    """A learning rate for every update."""

    def __init__(self, factor):
        self.factor = factor

    def on_train_begin(self, trainer, logs=None):
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, self.factor)

    def on_batch_end(self, batch_idx, trainer, logs=None):
        if closes_window(trainer, batch_idx):
            self.scheduler.step()


def fit_torch(
    pair: Pair, make_optimizer: Any, train: list[Batch], epochs: int, *callbacks: Any, val: Any = None, **options: Any
) -> torch_trainer.Trainer:
    model = pair.torch_model()
    trainer = torch_trainer.Trainer(model, make_optimizer(model.parameters()), cross_entropy, callbacks, **options)
    trainer.fit(in_torch(train), epochs, None if val is None else in_torch(val))
    return trainer


# This side


def trainer_of(pair: Pair, optimizer: Any, *callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    criterion = optax.softmax_cross_entropy_with_integer_labels
    return ant.Trainer(
        pair.jax, standard_promotion(optimizer), criterion, callbacks=callbacks, progress_bar=False, **options
    )


def fit(trainer: ant.Trainer, train: list[Batch], epochs: int, val: Any = None) -> Any:
    return trainer.fit(trainer.init(train[0]), train, epochs, val)


def losses_into(losses: list[float]) -> ant.Callback:
    """Note the loss of every batch, with one look an epoch."""

    def on_batch_end(batch_idx, trainer, state, logs):
        losses.extend(logs.window["loss"].tolist())
        return state, logs

    return host("losses", every=ONCE_AN_EPOCH, on_batch_end=on_batch_end)


# 200 steps: model x optimizer x clipping x accumulation x last batch


def sgd(updates: int) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9), [], optax.sgd(0.03, momentum=0.9)


def adam(updates: int) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=0.003), [], optax.adam(0.003)


def adamw(updates: int) -> Any:
    """AdamW, whose learning rate goes up for some updates and then down, along a cosine, to a tenth."""
    warmup = updates // 10

    def factor(update: int) -> float:
        if update < warmup:
            return update / warmup
        return 0.1 + 0.9 * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup))) / 2

    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.005, warmup, updates, end_value=0.0005)
    made = functools.partial(torch.optim.AdamW, lr=0.005, weight_decay=0.05)
    return made, [TorchSchedule(factor)], optax.adamw(schedule, weight_decay=0.05)


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw}


def max_norm_of(pair: Pair, accumulation: int) -> float:
    """To which gradients are clipped: some are longer, some shorter. Means over more examples are shorter."""
    return pair.norm / math.sqrt(accumulation)


@functools.lru_cache(maxsize=1)  # the tests with even and with ragged batches follow each other
def compiled(model: str, optimizer: str, clipping: str, accumulation: int) -> tuple[Any, list[Any], ant.Trainer, Any]:
    """Torch's optimizer and callbacks, and a trainer of this side with the list of its losses."""
    *in_torch, ours = OPTIMIZERS[optimizer](EPOCHS * math.ceil(BATCHES / accumulation))
    pair, max_norm, losses = PAIRS[model], max_norm_of(PAIRS[model], accumulation), list[float]()
    trainer = trainer_of(
        pair,
        ours,
        *([ant.callbacks.clip_by_global_norm(max_norm)] if clipping == "callback" else []),
        losses_into(losses),
        max_grad_norm=max_norm if clipping == "max_grad_norm" else None,
        gradient_accumulation_steps=accumulation,
        accumulation_mean="steps",  # 10 batches are two windows of 4, and one of 2
    )
    return *in_torch, trainer, losses


@pytest.mark.parametrize("last", [BATCH, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("accumulation", [1, 4], ids=lambda steps: f"accumulation{steps}")
@pytest.mark.parametrize("clipping", ["callback", "max_grad_norm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", PAIRS)
def test_the_loss_of_every_step(model, optimizer, clipping, accumulation, last):
    make_optimizer, callbacks, trainer, losses = compiled(model, optimizer, clipping, accumulation)
    pair, max_norm = PAIRS[model], max_norm_of(PAIRS[model], accumulation)
    train, clip, theirs = batches(pair, last=last), TorchClip(max_norm), TorchLosses()
    fit_torch(
        pair,
        make_optimizer,
        train,
        EPOCHS,
        *([clip] if clipping == "callback" else []),
        *callbacks,
        theirs,
        max_grad_norm=max_norm if clipping == "max_grad_norm" else None,
        gradient_accumulation_steps=accumulation,
    )
    losses.clear()
    trainer.fit(trainer.init(train[0]), train, EPOCHS)
    assert len(losses) == 200
    np.testing.assert_allclose(losses, theirs.losses, rtol=1e-4)
    assert clipping == "max_grad_norm" or min(clip.norms) < max_norm < max(clip.norms)


def test_with_full_windows_of_equal_batches_no_argument_is_needed():
    train, losses, theirs = batches(PAIRS["mlp"], count=8), list[float](), TorchLosses()
    make_optimizer, _, optimizer = adam(50)
    fit_torch(PAIRS["mlp"], make_optimizer, train, 25, theirs, gradient_accumulation_steps=4)
    fit(trainer_of(PAIRS["mlp"], optimizer, losses_into(losses), gradient_accumulation_steps=4), train, 25)
    assert len(losses) == 200
    np.testing.assert_allclose(losses, theirs.losses, rtol=1e-4)


def test_bfloat16_trains_as_amp_does():
    # Both round to 8 bits at the same places in the forward pass, but add up products in another order, and round
    # gradients elsewhere. So between the two are a few roundings of 2**-9 each, as there are between one and float32.
    train, (make_optimizer, _, optimizer) = batches(PAIRS["mlp"]), adam(200)
    losses: dict[str, list[float]] = {"bfloat16": []}
    for name, use_amp in ("float32", False), ("amp", True):
        noted = TorchLosses()
        fit_torch(PAIRS["mlp"], make_optimizer, train, EPOCHS, noted, use_amp=use_amp)
        losses[name] = noted.losses
    fit(trainer_of(PAIRS["mlp"], optimizer, losses_into(losses["bfloat16"]), precision="bfloat16"), train, EPOCHS)
    np.testing.assert_allclose(losses["bfloat16"], losses["amp"], rtol=1e-2)
    for low in "bfloat16", "amp":
        assert not np.allclose(losses[low], losses["float32"], rtol=1e-3)


# The hooks, and their logs

NINE = torch_trainer.HOOKS
SETTINGS: dict[str, dict[str, Any]] = {
    "even": {},
    "ragged": {"last": RAGGED},
    "without-evaluation": {"held_out": 0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation-ragged": {"gradient_accumulation_steps": 2, "last": RAGGED},
}


def torch_callback(**hooks: Any) -> Any:
    return type("Hooks", (TorchCallback,), {name: staticmethod(hook) for name, hook in hooks.items()})()


def torch_recorder(calls: list[Any], logged: list[Any]) -> Any:
    """Note every hook with what stands before ``trainer``, and the logs."""

    def recorded(hook: str) -> Any:
        def record(*arguments: Any) -> None:
            *lead, _, logs = arguments
            calls.append((hook, *lead))
            logged.append({name: float(value) for name, value in (logs or {}).items()})

        return record

    return torch_callback(**{hook: recorded(hook) for hook in NINE})


def logs_into(logged: list[Any]) -> ant.Callback:
    """Note the logs of the nine hooks, inside the step, too."""

    def note(logs: Any) -> None:
        logged.append({name: float(value) for name, value in logs.items()})

    def on_host(*arguments: Any) -> Any:
        jax.effects_barrier()  # what runs inside the step has been noted before
        note(arguments[-1])
        return arguments[-2:]

    def on_backward_end(batch_idx, trainer, state, grads, logs):
        jax.debug.callback(note, dict(logs), ordered=True)
        return state, grads, logs

    hooks: dict[str, Any] = {**dict.fromkeys(NINE, on_host), "on_backward_end": on_backward_end}
    return host("logs", **hooks)


@dataclasses.dataclass
class Recorded:
    """The calls of the nine hooks and their logs, on both sides."""

    calls: list[Any] = dataclasses.field(default_factory=list)
    logs: list[Any] = dataclasses.field(default_factory=list)
    torch_calls: list[Any] = dataclasses.field(default_factory=list)
    torch_logs: list[Any] = dataclasses.field(default_factory=list)


def recorded(
    *callbacks: ant.Callback, theirs: Any = None, last: int = BATCH, held_out: int = 2, **options: Any
) -> Recorded:
    """Record three epochs of five batches, of which accumulation makes windows of 2, 2 and 1."""
    pair, both, recorder = PAIRS["mlp"], Recorded(), testing.record_hooks()
    train, val = batches(pair, 5, last), batches(pair, held_out, seed=1) if held_out else None
    make_optimizer, _, optimizer = sgd(0)
    torch_callbacks = [torch_recorder(both.torch_calls, both.torch_logs), *([theirs] if theirs else [])]
    metrics = {"accuracy": accuracy}
    fit_torch(pair, make_optimizer, train, 3, *torch_callbacks, val=val, metrics=metrics, **options)
    callbacks = recorder, logs_into(both.logs), *callbacks
    metrics = {"accuracy": ant.metrics.accuracy}
    fit(trainer_of(pair, optimizer, *callbacks, metrics=metrics, accumulation_mean="steps", **options), train, 3, val)
    both.calls = [call for call in recorder.calls if call[0] in NINE]
    return both


@functools.lru_cache(maxsize=1)
def recorded_with(setting: str) -> Recorded:
    return recorded(**SETTINGS[setting])


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_hooks_come_in_the_same_order(setting):
    both = recorded_with(setting)
    called = {hook for hook in NINE if setting != "without-evaluation" or "evaluate" not in hook}
    assert {hook for hook, *_ in both.calls} == called
    assert both.calls == both.torch_calls


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_hook_has_the_same_logs(setting):
    both = recorded_with(setting)
    of_a_batch = "on_batch_begin", "on_backward_end", "on_batch_end"
    for call, ours, theirs in zip(both.torch_calls, both.logs, both.torch_logs, strict=True):
        assert ours.keys() == theirs.keys(), call
        if call[0] in of_a_batch or "last" not in SETTINGS[setting]:  # else they are other means, see below
            assert ours == pytest.approx(theirs, rel=1e-4), call


def test_a_stop_at_the_end_of_an_epoch_ends_both_alike():
    def ask(epoch, trainer, logs=None):
        trainer.stop_training = epoch == 1

    stop = host("ask", on_epoch_end=lambda epoch, trainer, state, logs: (state.request_stop(when=epoch == 1), logs))
    both = recorded(stop, theirs=torch_callback(on_epoch_end=ask))
    assert ("on_epoch_begin", 1) in both.calls and ("on_epoch_begin", 2) not in both.calls
    assert both.calls == both.torch_calls


def asked_in(batch: int) -> ant.Callback:
    """Ask in a batch to stop: at once."""
    return host("ask", on_batch_end=lambda at, trainer, state, logs: (state.request_stop(when=at == batch), logs))


@dataclasses.dataclass(frozen=True)
class AskedAsInTorch(ant.Callback):
    """Ask in a batch to stop, as in torch: at the end of the epoch."""

    batch: int

    def init(self, state):
        return {"asked": False}

    def on_batch_end(self, batch_idx, trainer, state, logs):
        asked = state.callback_states[self.name]["asked"] or batch_idx == self.batch
        return state.with_callback_state(self.name, {"asked": asked}), logs

    def on_epoch_end(self, epoch, trainer, state, logs):
        return state.request_stop(when=state.callback_states[self.name]["asked"]), logs


def test_a_stop_inside_an_epoch_skips_the_rest_of_it_or_waits_for_its_end_as_in_torch():
    def ask(batch_idx, trainer, logs=None):
        trainer.stop_training |= batch_idx == 1

    as_in_torch = recorded(AskedAsInTorch(1), theirs=torch_callback(on_batch_end=ask))
    assert as_in_torch.calls == as_in_torch.torch_calls
    at_once = recorded(asked_in(1))
    skipped = [call for call in as_in_torch.torch_calls if call[0].startswith(("on_batch", "on_back")) and call[1] > 1]
    assert len(skipped) == 3 * 3  # three hooks at three batches
    assert at_once.calls == [call for call in as_in_torch.torch_calls if call not in skipped]


@pytest.mark.parametrize("model", PAIRS)
def test_the_histories_are_alike(model):
    pair, (make_optimizer, _, optimizer) = PAIRS[model], adam(0)
    train, val = batches(pair), batches(pair, 3, seed=1)
    theirs = fit_torch(pair, make_optimizer, train, 5, val=val, metrics={"accuracy": accuracy}).history
    _, history = fit(trainer_of(pair, optimizer, metrics={"accuracy": ant.metrics.accuracy}), train, 5, val)
    assert len(history) == len(theirs) == 5
    for ours, epoch in zip(history, theirs, strict=True):
        assert ours.keys() == epoch.keys()
        # With batch norm evaluations differ a little more, by what the next test is about.
        assert dict(ours) == pytest.approx(epoch, rel=1e-3 if model == "cnn" else 1e-4)


def test_the_running_variance_of_batch_norm_is_flaxs_and_with_torchs_the_evaluation_is_torchs():
    # Flax adds the variance over n values to the running one, and torch n / (n - 1) times as much.
    pair, (make_optimizer, _, optimizer) = PAIRS["cnn"], adam(0)
    train, val = [(inputs[:2], targets[:2]) for inputs, targets in batches(pair)], batches(pair, 3, seed=1)
    theirs = fit_torch(pair, make_optimizer, train, 3, val=val)
    trainer = trainer_of(pair, optimizer)
    state, history = fit(trainer, train, 3, val)
    initial = 0.9**30  # the share of the initial variance, 1, after so many steps
    as_in_torch = {}
    for layer, n in ("norm1", 2 * 8 * 8), ("norm2", 2 * 4 * 4):
        statistics = state.model_state["batch_stats"][layer]
        expected = theirs.model.state_dict()[f"{layer}.running_var"]
        variance = initial + (statistics["var"] - initial) * n / (n - 1)
        np.testing.assert_allclose(variance, expected, rtol=1e-4)
        assert not np.allclose(statistics["var"], expected, rtol=0.5 / n)
        as_in_torch[layer] = {**statistics, "var": variance}
    expected = theirs.history[-1]["val_loss"]
    found = trainer.evaluate(state.replace(model_state={"batch_stats": as_in_torch}), val)["val_loss"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert history[-1]["val_loss"] != pytest.approx(expected, rel=1e-4)


# What ends a run, and what reduces the learning rate


class TorchEarlyStopping(TorchCallback):
    """As on the system's page."""

    def __init__(self, patience=5, min_delta=0.001, monitor="val_loss"):
        self.patience = patience
        self.min_delta = min_delta
        self.monitor = monitor
        self.best_value = float("inf")
        self.wait = 0

    def on_epoch_end(self, epoch, trainer, logs=None):
        assert logs is not None
        current_value = logs[self.monitor]
        if current_value < self.best_value - self.min_delta:
            self.best_value = current_value
            self.wait = 0
        else:
            self.wait += 1
            if self.wait >= self.patience:
                trainer.stop_training = True


def test_early_stopping_fires_at_the_same_epoch():
    pair, epochs = PAIRS["mlp"], 60
    train, val = batches(pair), batches(pair, 3, seed=1)
    make_optimizer, optimizer = functools.partial(torch.optim.Adam, lr=0.02), optax.adam(0.02)
    theirs = fit_torch(pair, make_optimizer, train, epochs, TorchEarlyStopping(patience=3), val=val)
    stopping = ant.callbacks.early_stopping("val_loss", patience=3, min_delta=0.001)
    state, history = fit(trainer_of(pair, optimizer, stopping), train, epochs, val)
    assert 3 < state.epoch == len(theirs.history) < epochs
    np.testing.assert_allclose(history.to_dict()["val_loss"], [e["val_loss"] for e in theirs.history], rtol=1e-4)


def test_the_learning_rate_is_reduced_at_the_same_epochs():
    pair, epochs, rates = PAIRS["mlp"], 12, list[float]()
    options: dict[str, Any] = {"factor": 0.5, "patience": 0, "threshold": 0.05}

    def on_train_begin(trainer, logs=None):
        trainer.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer, **options)

    def on_epoch_end(epoch, trainer, logs):
        trainer.scheduler.step(logs["train_loss"])
        rates.append(trainer.optimizer.param_groups[0]["lr"])

    theirs = torch_callback(on_train_begin=on_train_begin, on_epoch_end=on_epoch_end)
    make_optimizer = functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    fit_torch(pair, make_optimizer, batches(pair), epochs, theirs)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.3, momentum=0.9)
    ours = ant.callbacks.reduce_on_plateau("train_loss", **options)
    _, history = fit(trainer_of(pair, optimizer, ours), batches(pair), epochs)
    assert len(set(rates)) == 3  # it is reduced twice, with improvements before, between and after
    np.testing.assert_allclose(history.to_dict()["learning_rate"], rates, rtol=1e-6)


# What differs on purpose: means over examples


@dataclasses.dataclass(frozen=True)
class MeanOverBatches(ant.Callback):
    """As in torch: publish the mean of the batches' losses, which weighs a shorter last batch as much as the others."""

    every = ONCE_AN_EPOCH

    def on_batch_end(self, batch_idx, trainer, state, logs):
        return state, {**logs, "loss_over_batches": np.mean(logs.window["loss"])}


def test_means_are_over_examples_or_over_batches_as_in_torch():
    pair, (make_optimizer, _, optimizer) = PAIRS["mlp"], sgd(0)
    train, val, losses = batches(pair, last=RAGGED), batches(pair, 3, RAGGED, seed=1), list[float]()
    theirs = fit_torch(pair, make_optimizer, train, 2, val=val).history
    trainer = trainer_of(pair, optimizer, MeanOverBatches(), losses_into(losses))
    state, history = fit(trainer, train, 2, val)
    in_epochs = np.reshape(losses, (2, BATCHES))
    over_examples = np.average(in_epochs, axis=1, weights=[len(targets) for _, targets in train])
    np.testing.assert_allclose(history.to_dict()["train_loss"], over_examples, rtol=1e-6)
    over_batches = [epoch["train_loss"] for epoch in theirs]
    np.testing.assert_allclose(history.to_dict()["train_loss_over_batches"], over_batches, rtol=1e-4)
    assert not np.allclose(over_examples, over_batches, rtol=1e-3)
    val_over_batches = np.mean([trainer.evaluate(state, [batch])["val_loss"] for batch in val])
    np.testing.assert_allclose(val_over_batches, theirs[-1]["val_loss"], rtol=1e-4)
    assert not np.isclose(history[-1]["val_loss"], val_over_batches, rtol=1e-3)


# What differs on purpose: a hook sees the gradient of its batch


@dataclasses.dataclass(frozen=True)
class GradAsInTorch(ant.Callback):
    """Note what ``p.grad`` is in torch's ``on_backward_end``: the window's gradients so far, each over its length."""

    steps: int
    noted: list[Any]

    def init(self, state):
        return {"grad": jax.tree.map(jnp.zeros_like, state.params)}

    def on_backward_end(self, batch_idx, trainer, state, grads, logs):
        before = state.callback_states[self.name]["grad"]
        so_far = jax.tree.map(lambda old, grad: jnp.where(state.window_open, old, 0) + grad / self.steps, before, grads)
        note_into(self.noted, so_far)
        return state.with_callback_state(self.name, {"grad": so_far}), grads, logs


def note_into(noted: list[Any], tree: Any) -> None:
    """Note a tree of arrays when the step runs."""
    jax.debug.callback(lambda values: noted.append(jax.tree.map(np.asarray, values)), tree, ordered=True)


def noting(hook: str, noted: list[Any]) -> ant.Callback:
    """Note the gradients that a hook sees."""

    def note(batch_idx, trainer, state, grads, logs):
        note_into(noted, grads)
        return state, grads, logs

    hooks: dict[str, Any] = {hook: note}
    return host("noting", **hooks)


def noting_in_torch(pair: Pair, params: Any, noted: list[Any]) -> Any:
    """Note what ``p.grad`` is in ``on_backward_end``, in the form of the flax module's parameters."""

    def note(batch_idx, trainer, logs=None):
        grads = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        noted.append(jax.tree.map(np.array, pair.from_torch(grads, params)[0]))

    return torch_callback(on_backward_end=note)


def assert_close(ours: Any, theirs: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), ours, theirs)


def test_a_hook_sees_its_batchs_gradient_or_the_windows_so_far_as_in_torch():
    pair, steps, (make_optimizer, _, optimizer) = PAIRS["mlp"], 4, sgd(0)
    own, as_in_torch, theirs = list[Any](), list[Any](), list[Any]()
    options: dict[str, Any] = {"gradient_accumulation_steps": steps, "accumulation_mean": "steps"}
    trainer = trainer_of(pair, optimizer, noting("on_backward_end", own), GradAsInTorch(steps, as_in_torch), **options)
    train = batches(pair, last=RAGGED)  # windows of 4, 4 and 2
    fit(trainer, train, 1)
    jax.effects_barrier()
    noting_theirs = noting_in_torch(pair, trainer.init(train[0]).params, theirs)
    fit_torch(pair, make_optimizer, train, 1, noting_theirs, gradient_accumulation_steps=steps)
    assert len(own) == len(as_in_torch) == len(theirs) == BATCHES
    assert_close(as_in_torch, theirs)
    for batch_idx, grads in enumerate(own):
        before = theirs[batch_idx - 1] if batch_idx % steps else jax.tree.map(np.zeros_like, grads)
        assert_close(grads, jax.tree.map(lambda now, then: steps * (now - then), theirs[batch_idx], before))


def clipping_every_batch(max_norm: float) -> ant.Callback:
    """Clip the gradient of every batch, as ``TorchClip`` does where every batch is a window."""

    def on_backward_end(batch_idx, trainer, state, grads, logs):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
        return state, jax.tree.map(lambda grad: grad * factor, grads), logs

    return host("clip", on_backward_end=on_backward_end)


def test_a_hook_may_clip_its_batchs_gradient_as_in_torch():
    # Without accumulation p.grad is the batch's gradient, and the same code in the same hook does the same.
    pair, (make_optimizer, _, optimizer) = PAIRS["mlp"], sgd(0)
    train, clip, losses, theirs = batches(pair), TorchClip(pair.norm), list[float](), TorchLosses()
    fit_torch(pair, make_optimizer, train, 4, clip, theirs)
    fit(trainer_of(pair, optimizer, clipping_every_batch(pair.norm), losses_into(losses)), train, 4)
    assert len(losses) == 40 and min(clip.norms) < pair.norm < max(clip.norms)
    np.testing.assert_allclose(losses, theirs.losses, rtol=1e-4)


# What differs on purpose: the last window of an epoch


def test_the_last_windows_gradient_is_the_mean_over_its_examples_or_too_small_as_in_torch():
    pair, steps, (make_optimizer, _, optimizer) = PAIRS["mlp"], 4, sgd(0)
    train = batches(pair, 2, last=RAGGED)
    noted: dict[str, list[Any]] = {"examples": [], "steps": [], "torch": []}
    for mean in "examples", "steps":
        callback = noting("on_before_update", noted[mean])
        trainer = trainer_of(pair, optimizer, callback, gradient_accumulation_steps=steps, accumulation_mean=mean)
        fit(trainer, train, 1)
    jax.effects_barrier()
    trainer = trainer_of(pair, optimizer)
    state = trainer.init(train[0])
    noting_theirs = noting_in_torch(pair, state.params, noted["torch"])
    fit_torch(pair, make_optimizer, train, 1, noting_theirs, gradient_accumulation_steps=steps)
    assert_close(noted["steps"], noted["torch"][-1:])
    inputs, targets = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    of_all_examples, _ = trainer.grad_step(state, (inputs, targets))
    assert_close(noted["examples"], [of_all_examples])
    norms = {name: float(optax.tree.norm(grads[-1])) for name, grads in noted.items()}
    assert norms["steps"] < norms["examples"]
