"""Checkpoints: the one room that knows Orbax."""
