"""The table of hooks, the callback, the list of callbacks, and what a hook may return."""
