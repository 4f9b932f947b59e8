"""The torch side: a trainer with nine callback hooks, as a good engineer would write it from the system's own page.

It is what ``ant_jax`` ports, and what the benchmarks and the parity tests compare it with. Hooks, their arguments and
their order are those of the page; where the page is silent, it does what torch users expect: the loss is divided by
``gradient_accumulation_steps``, windows begin anew with every epoch, the last window is stepped however many batches it
has, and a mean over an epoch is the mean over its batches. A hook that a callback does not define is never called, and
nothing waits for the device but the reading of the loss.

    trainer = Trainer(model, torch.optim.Adam(model.parameters()), torch.nn.functional.cross_entropy)
    history = trainer.fit(train_loader, num_epochs=3, val_loader=val_loader)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch


HOOKS = (
    "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_batch_begin", "on_batch_end",
    "on_backward_end", "on_evaluate_begin", "on_evaluate_end",
)  # fmt: skip


class Loader(Protocol):
    """Gives the batches of an epoch, and says how many they are: a ``DataLoader``, or a list."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


class Callback:
    """The base of callbacks: define any of the nine hooks."""

    def on_train_begin(self, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_train_end(self, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_epoch_begin(self, epoch: int, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_epoch_end(self, epoch: int, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_batch_begin(self, batch_idx: int, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_batch_end(self, batch_idx: int, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_backward_end(self, batch_idx: int, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_evaluate_begin(self, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...
    def on_evaluate_end(self, trainer: Trainer, logs: dict[str, Any] | None = None) -> None: ...


class Trainer:
    """Trains a torch module.

    Args:
        model: to train, in place.
        optimizer: of its parameters.
        criterion: ``criterion(outputs, targets)`` returns the mean loss of a batch.
        callbacks: in the order in which their hooks run.
        metrics: ``{name: metric(outputs, targets)}``, each a mean over the batch.
        gradient_accumulation_steps: batches whose gradients make one update.
        max_grad_norm: clip the gradient to this norm before an update.
        use_amp: whether the forward pass runs under autocast to bfloat16.
        read_every_batch: whether the loss and the metrics are read at every batch, as the page's logs of Python numbers
            imply; otherwise they stay tensors, which are read when an epoch ends.

    Attributes:
        history: one dict of means for every epoch.
        stop_training: callbacks set it to end the run when the epoch ends.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[[Any, Any], torch.Tensor],
        callbacks: Sequence[Callback] = (),
        metrics: Mapping[str, Callable[[Any, Any], torch.Tensor]] | None = None,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        use_amp: bool = False,
        read_every_batch: bool = True,
    ):
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.callbacks, self.metrics = list(callbacks), dict(metrics or {})
        self.gradient_accumulation_steps, self.max_grad_norm = gradient_accumulation_steps, max_grad_norm
        self.use_amp, self.read_every_batch = use_amp, read_every_batch
        self.history: list[dict[str, float]] = []
        self.num_epochs = 0
        self.stop_training = False
        self._parameters = list(model.parameters())
        # Only the hooks that somebody has defined, looked up once.
        self._hooks = {
            name: [getattr(each, name) for each in self.callbacks if getattr(type(each), name) is not _nothing[name]]
            for name in HOOKS
        }

    def fit(self, train_loader: Loader, num_epochs: int, val_loader: Iterable[Any] | None = None):
        """Train; returns the history.

        Loaders give pairs of tensors on the model's device: nothing is moved there. That for training has a length.
        """
        self.num_epochs, self.stop_training = num_epochs, False
        self._call("on_train_begin", logs=None)
        logs: dict[str, Any] = {}
        for epoch in range(num_epochs):
            self._call("on_epoch_begin", epoch, logs=None)
            logs = self._train_epoch(train_loader)
            if val_loader is not None:
                logs |= self.evaluate(val_loader)
            self.history.append(logs)
            self._call("on_epoch_end", epoch, logs=logs)
            if self.stop_training:
                break
        self._call("on_train_end", logs=logs)
        return self.history

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """The means over a loader's batches, as ``val_<name>``."""
        self._call("on_evaluate_begin", logs=None)
        self.model.eval()
        sums, batches = dict.fromkeys(("loss", *self.metrics), 0.0), 0
        with torch.inference_mode():
            for inputs, targets in loader:
                outputs, loss = self._forward(inputs, targets)
                _add(sums, self._values(outputs, targets, loss))
                batches += 1
        logs = {f"val_{name}": float(total) / batches for name, total in sums.items()}
        self._call("on_evaluate_end", logs=logs)
        return logs

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write the model, the optimizer and the history to a file."""
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "history": self.history}, path)  # fmt: skip

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Take up what ``save_checkpoint`` wrote."""
        saved = torch.load(path)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history = saved["history"]

    def _train_epoch(self, loader: Loader) -> dict[str, float]:
        self.model.train()
        window, batches = self.gradient_accumulation_steps, len(loader)
        sums: dict[str, Any] = dict.fromkeys(("loss", *self.metrics), 0.0)
        self.optimizer.zero_grad()
        for batch_idx, (inputs, targets) in enumerate(loader):
            logs: dict[str, Any] = {"batch_size": len(targets)}
            self._call("on_batch_begin", batch_idx, logs=logs)
            outputs, loss = self._forward(inputs, targets)
            (loss / window if window > 1 else loss).backward()
            values = self._values(outputs, targets, loss)
            logs |= values
            self._call("on_backward_end", batch_idx, logs=logs)
            if (batch_idx + 1) % window == 0 or batch_idx + 1 == batches:
                self._update()
            _add(sums, values)
            self._call("on_batch_end", batch_idx, logs=logs)
        return {f"train_{name}": float(total) / batches for name, total in sums.items()}

    def _forward(self, inputs: Any, targets: Any) -> tuple[Any, torch.Tensor]:
        device = self._parameters[0].device.type
        with torch.autocast(device, torch.bfloat16) if self.use_amp else contextlib.nullcontext():
            outputs = self.model(inputs)
            return outputs, self.criterion(outputs, targets)

    def _values(self, outputs: Any, targets: Any, loss: torch.Tensor) -> dict[str, Any]:
        with torch.no_grad():
            found = {"loss": loss.detach(), **{name: fn(outputs, targets) for name, fn in self.metrics.items()}}
        return {name: value.item() for name, value in found.items()} if self.read_every_batch else found

    def _update(self) -> None:
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _call(self, name: str, *lead: Any, logs: dict[str, Any] | None) -> None:
        for hook in self._hooks[name]:
            hook(*lead, self, logs)


_nothing = {name: getattr(Callback, name) for name in HOOKS}


def _add(sums: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        sums[name] += value
