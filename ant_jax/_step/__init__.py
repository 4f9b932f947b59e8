"""The pure step: gradient, traced hooks, optax."""
