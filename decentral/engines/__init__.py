"""The two engines, behind one interface: the simulator and the Ray engine.

An engine runs segments and evaluates; what to run, and what to make of it, is the coordinator's.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from decentral.replica import Report, Segment


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

    def save(self, folder: Path) -> None:
        """Write the workers' state, all at the same step, as files in `folder`."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from a state that `save` wrote."""
        ...

    def close(self) -> None:
        """Let go of everything; the engine leaves nothing running. May be called twice."""
        ...
