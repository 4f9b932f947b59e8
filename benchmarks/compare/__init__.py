"""Trainers and loops by hand against ``ant_jax``; run it with ``python -m benchmarks.compare``."""
