"""The trainer: what a user holds."""
