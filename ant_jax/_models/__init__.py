"""Any model as two pure functions."""
