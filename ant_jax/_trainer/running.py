"""What a running fit tells the hooks."""

from __future__ import annotations

from ant_jax._loop.run_info import Costs, RunInfo


class Running:
    """The facts of the run that is under way, for host hooks."""

    _run: RunInfo | None

    @property
    def num_epochs(self) -> int:
        """The ``num_epochs`` of the ``fit`` that is running; for host hooks.

        Raises:
            RuntimeError: no ``fit`` is running, or a traced hook asks: the number would be compiled in.
        """
        return self._running("num_epochs").num_epochs

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in the epoch under way of the ``fit`` that is running, ``None`` if nobody can tell; for host hooks.

        Raises:
            RuntimeError: as for ``num_epochs``.
        """
        return self._running("steps_per_epoch").steps_per_epoch

    @property
    def whole(self) -> bool:
        """Whether a run that went on from the state of this hook would end as this one does; for host hooks.

        So it is in ``on_checkpoint``, and in ``on_exception`` unless the exception came between a step and the end of
        the hooks after it.

        Raises:
            RuntimeError: as for ``num_epochs``.
        """
        return self._running("whole").whole

    @property
    def costs(self) -> Costs:
        """What the ``fit`` that is running has cost so far; for host hooks.

        Raises:
            RuntimeError: as for ``num_epochs``.
        """
        return self._running("costs").costs

    def _running(self, fact: str) -> RunInfo:
        if self._run is None:
            raise RuntimeError(
                f"trainer.{fact} is known only to host hooks, while fit runs; traced hooks cannot have it"
            )
        return self._run
