"""The state of a run, what only the host knows of it, its history and its hyper-parameters."""
