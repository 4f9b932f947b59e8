"""The host loop of ``fit`` and ``evaluate``."""
