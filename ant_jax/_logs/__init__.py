"""Logged values: of a step, over a window of batches, summed over an epoch."""
