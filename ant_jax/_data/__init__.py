"""Loaders, the batches of an epoch, reading ahead, checks."""
