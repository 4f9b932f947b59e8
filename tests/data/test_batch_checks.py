"""Numbers that cannot be meant are named where they come from, for those who ask."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import BATCH, batches, data, trainer

import ant_jax as ant


def with_labels(label: int) -> Any:
    inputs, targets = data(5 * BATCH)
    targets = targets.copy()
    targets[3 * BATCH + 1] = label
    return inputs, targets


def with_inputs(value: float) -> Any:
    inputs, targets = data(5 * BATCH)
    inputs = inputs.copy()
    inputs[3 * BATCH + 1, 2] = value
    return inputs, targets


FAULTS = {
    "a label below": (with_labels(-1), r"1 int32\[8\] has 1 labels outside of 0 to 2; they are from -1 to 2"),
    "a label above": (with_labels(3), r"1 int32\[8\] has 1 labels outside of 0 to 2; they are from 0 to 3"),
    "NaN": (with_inputs(float("nan")), r"0 float32\[8, 4\] has 1 numbers that are not finite; the others are from -"),
    "infinite": (with_inputs(float("inf")), r"0 float32\[8, 4\] has 1 numbers that are not finite"),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_meant_is_named(kind, fuse):
    (inputs, targets), message = FAULTS[kind]
    listed = [(inputs[i : i + BATCH], targets[i : i + BATCH]) for i in range(0, 5 * BATCH, BATCH)]
    asking = trainer(check_batches=True, fuse=fuse)
    state = asking.init(listed[0])
    asking.fit(state, batches(), 2, batches())
    for loader in (listed, ant.ArrayLoader((inputs, targets), BATCH, shuffle=False)):
        with pytest.raises(ant.BatchError, match=f"train_loader, batch 3 of epoch 0: {message}"):
            asking.fit(state, loader, 1)
        with pytest.raises(ant.BatchError, match=f"val_loader, batch 3 of epoch 0: {message}"):
            asking.fit(state, batches(), 1, loader)
    trainer(fuse=fuse).fit(state, listed, 1)  # nobody has asked


def test_targets_that_are_no_labels_are_not_taken_for_some():
    counts = (np.ones((8, 4), np.float32), np.full(8, 99, np.int32))
    asking = trainer(
        check_batches=True,
        criterion=lambda outputs, targets: optax.l2_loss(outputs, targets.astype(jnp.float32)),
        model=(lambda key, inputs: (jnp.zeros(4), {}), lambda params, state, inputs, key: (inputs @ params, state)),
    )
    asking.fit(asking.init(counts), [counts], 1)
