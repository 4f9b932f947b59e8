"""The torch trainer that benchmarks and parity tests compare with: what the parity tests do not use of it."""

from typing import Any

import pytest
import torch

from benchmarks.torch_trainer import Callback, Trainer


def batches(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four batches, the last of another size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 3, generator=generator) for size in (5, 5, 5, 2)]
    return [(each, torch.randint(4, (len(each),), generator=generator)) for each in inputs]


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(-1) == targets).float().mean()


def trainer(*callbacks: Callback, seed: int = 0, **options: Any) -> Trainer:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    criterion = torch.nn.functional.cross_entropy
    return Trainer(model, optimizer, criterion, callbacks, {"accuracy": accuracy}, **options)


@pytest.mark.parametrize("read_every_batch", [True, False])
def test_a_checkpoint_brings_back_parameters_optimizer_and_history(tmp_path, read_every_batch):
    first, second = (trainer(seed=seed, read_every_batch=read_every_batch) for seed in (0, 1))
    first.fit(batches(), 2, batches(1))
    first.save_checkpoint(tmp_path / "checkpoint.pt")
    second.load_checkpoint(tmp_path / "checkpoint.pt")
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(second.optimizer.state_dict(), first.optimizer.state_dict(), rtol=0, atol=0)
    assert len(second.history) == 2 and second.history == first.history
    # Of what the optimizer remembers, nothing is missing: both go on alike.
    assert second.fit(batches(), 2, batches(1)) == first.fit(batches(), 2, batches(1))


class Kinds(Callback):
    """Note what kinds of values the logs of batches hold."""

    def __init__(self):
        self.kinds: set[type] = set()

    def on_batch_end(self, batch_idx, trainer, logs=None):
        assert logs is not None
        self.kinds |= {type(logs[name]) for name in ("loss", "accuracy")}


def test_reading_once_an_epoch_gives_the_same_history():
    histories, kinds = [], []
    for read_every_batch in True, False:
        noted = Kinds()
        histories.append(trainer(noted, read_every_batch=read_every_batch).fit(batches(), 3, batches(1)))
        kinds.append(noted.kinds)
    assert kinds == [{float}, {torch.Tensor}]
    # Sums of the same numbers, in double precision and in single.
    assert [*histories[1]] == [pytest.approx(epoch, rel=1e-6) for epoch in histories[0]]
    assert all(type(value) is float for epoch in histories[1] for value in epoch.values())


def test_batches_are_used_as_they_are_and_moved_nowhere():
    seen, given, held_out = list[torch.Tensor](), batches(), batches(1)
    a_trainer = trainer()
    a_trainer.model.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    a_trainer.fit(given, 1, held_out)
    assert [id(tensor) for tensor in seen] == [id(inputs) for inputs, _ in given + held_out]


def test_a_loader_without_a_length_is_refused_before_a_step():
    a_trainer = trainer()
    before = [parameter.clone() for parameter in a_trainer.model.parameters()]
    loader: Any = iter(batches())
    with pytest.raises(TypeError, match="has no len"):
        a_trainer.fit(loader, 1)
    assert all(map(torch.equal, a_trainer.model.parameters(), before))
