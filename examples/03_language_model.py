"""Train a byte-level language model on the source of Python's standard library.

    python examples/03_language_model.py

A small causal transformer reads bytes and predicts the next one. The example shows a general `loss_fn` in place of a
criterion, an endless stream of random windows with `steps_per_epoch`, bfloat16 arithmetic with float32 parameters,
gradient accumulation, and a learning-rate schedule from optax. It prints the bits per byte on held-out files before and
after training; to guess all bytes alike costs 8.
"""

import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import ant_jax as ant


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(y)))


class Transformer(nn.Module):
    context: int
    width: int = 96
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, tokens):
        """Return logits for the byte after each of `tokens`, `[batch, context]`."""
        embed = nn.Embed(256, self.width)
        position = self.param("position", nn.initializers.normal(0.02), (self.context, self.width))
        x = embed(tokens) + position
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = Block(self.heads)(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def read_library() -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of the library's top-level modules: of nine in ten, and of every tenth, which is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = set(files[::10])
    train = b"".join(file.read_bytes() for file in files if file not in held_out)
    val = b"".join(file.read_bytes() for file in files if file in held_out)
    return np.frombuffer(train, np.uint8), np.frombuffer(val, np.uint8)


def random_windows(text: np.ndarray, context: int, batch_size: int, seed: int = 0):
    """Yield batches of windows without an end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - context, batch_size)
        yield text[starts[:, None] + np.arange(context)]


def main(epochs: int = 4, steps_per_epoch: int = 100, context: int = 64, batch_size: int = 16, val_windows: int = 512):
    train_text, val_text = read_library()
    starts = np.linspace(0, len(val_text) - context, val_windows).astype(int)  # spread over all held-out files
    val_loader = ant.ArrayLoader(val_text[starts[:, None] + np.arange(context)], batch_size=64, shuffle=False)

    model = Transformer(context)

    def loss_fn(params, model_state, batch, key):
        # The model computes in bfloat16, which has no more than three digits: too few for the sums of a cross-entropy.
        logits = jnp.asarray(model.apply({"params": params}, batch), jnp.float32)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()
        return nats, (model_state, {"bits_per_byte": nats / jnp.log(2.0)})

    accumulation = 2
    updates = epochs * steps_per_epoch // accumulation
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, warmup_steps=updates // 10, decay_steps=updates)
    trainer = ant.Trainer(
        model,
        optax.adamw(schedule),
        loss_fn=loss_fn,
        callbacks=[ant.callbacks.gradient_norm(), ant.callbacks.log_progress(every=50)],
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        precision="bfloat16",
        progress_bar=False,
    )
    stream = random_windows(train_text, context, batch_size)
    state = trainer.init(next(stream), seed=0)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters, {len(train_text):,} bytes to read")

    before = trainer.evaluate(state, val_loader)["val_bits_per_byte"]
    state, history = trainer.fit(state, stream, epochs, val_loader, steps_per_epoch=steps_per_epoch)
    after = trainer.evaluate(state, val_loader)["val_bits_per_byte"]
    print(history)
    print(f"bits per byte on held-out files: {before:.2f} before training, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
