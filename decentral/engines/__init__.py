"""The two engines, behind one interface: the simulator and the Ray engine.

An engine runs segments and evaluates; what to run, and what to make of it, is the coordinator's.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from decentral.replica import Report, Segment
from decentral.storage import Storage, Written


class Engine(Protocol):
    """Holds n workers from the start of a run to `close`. Reports hold arrays over workers."""

    def step_seconds(self) -> np.ndarray:
        """Measured seconds of a local step of each worker, [n]; moves nothing on."""
        ...

    def run(self, segment: Segment) -> Report:
        """Run a segment on all workers and wait for it.

        Raises WorkerError, naming worker and step, if one fails or dies.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """`eval_loss` and, where the task has one, `eval_accuracy`, of the averaged model, and
        `eval_accuracy_workers`, the mean of the workers' own models."""
        ...

    def average_model(self) -> dict[str, Tensor]:
        """The state_dict of the averaged model, on the CPU."""
        ...

    def reach(self, storage: Storage) -> None:
        """Raise UserError if a worker does not see there what the driver writes."""
        ...

    def save(self, storage: Storage, folder: str) -> None:
        """Copy the workers' state, all at the same step, and begin to write it as files in
        `folder`: they may run on meanwhile. `saved` must have answered before it is called again.
        """
        ...

    def saved(self, wait: bool) -> list[Written] | None:
        """The files of the last `save`, or None while they are being written.

        Raises StorageError, when all have ended, if one could not be written.
        """
        ...

    def load(self, storage: Storage, folder: str, files: Mapping[str, Written]) -> None:
        """Go on from the files that a `save` wrote.

        Raises StorageError if one of them is missing, not what was written, or of another run;
        another `load` must follow then.
        """
        ...

    def close(self) -> None:
        """Let go of everything; the engine leaves nothing running. May be called twice."""
        ...
