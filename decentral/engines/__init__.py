"""The two engines, behind one interface: the simulator and the Ray engine.

An engine runs segments and evaluates; what to run, and what to make of it, is the coordinator's.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from decentral.errors import WorkerError
from decentral.replica import Report, Segment
from decentral.storage import Storage, Written


class Interrupted(WorkerError):
    """Workers were lost, or lost each other, while an engine's method was under way.

    lost: of each worker that is gone, by number, what became of it and at which step. what: the
    same in a line, or, where nobody is gone, who failed to hear from whom. The others exchange
    nothing before a `regroup`. report: of a segment, what those that are left did; they are all at
    its `stop`, which may be beyond the segment's where others were to follow. whole: that was all
    there was to do.
    """

    def __init__(
        self,
        lost: Mapping[int, str],
        what: str,
        report: Report | None = None,
        whole: bool = False,
    ):
        super().__init__(what)
        self.lost = lost
        self.report = report
        self.whole = whole


class Engine(Protocol):
    """Holds the workers of a run from its start to `close`. Reports hold arrays over `members`.

    Methods that need all workers raise Interrupted where some are lost meanwhile, and WorkerError,
    naming worker and step, where one fails by an error of its own. After Interrupted, `regroup`
    comes first, and then what was cut short may be asked for again.
    """

    ahead_s: float  # for so long it wants to be told `ahead`

    @property
    def members(self) -> tuple[int, ...]:
        """The workers that are there, by number, sorted."""
        ...

    def step_seconds(self) -> np.ndarray:
        """Measured seconds of a local step of each worker, [n]; moves nothing on."""
        ...

    def run(self, segment: Segment, ahead: Sequence[Segment] = ()) -> Report:
        """Run a segment on all workers and wait for it.

        ahead: what will be asked for after it, one by one and with nothing else of the workers'
        state in between, unless it is Interrupted. An engine may begin it at once.
        """
        ...

    def regroup(self, members: Sequence[int], new: Sequence[int] = ()) -> None:
        """Go on with `members`, sorted, over their topology.

        Who was there and is not among them leaves. `new`, among them, start from the mean of the
        others, also a worker that was there: it lost its state. At least one is not new.
        """
        ...

    def adopt(self, members: Sequence[int]) -> None:
        """Before the first step, be these workers, no more than there are, sorted; all at their
        start."""
        ...

    def room(self) -> int:
        """How many workers more there is room for, as far as that was looked for just now."""
        ...

    def prepare(self, workers: Sequence[int]) -> None:
        """Begin to start workers, for a `regroup` to come, and return at once."""
        ...

    def ready(self) -> list[int]:
        """The workers that were prepared and are up by now, sorted."""
        ...

    def evaluate(self) -> dict[str, float]:
        """The `averaged_figures` of evaluation.py, and `eval_accuracy_workers`, the mean of the
        workers' own models, where the task has an accuracy."""
        ...

    def diagnose(self, step: int) -> dict[str, float]:
        """The figures of the averaged model that config.diagnostics asks for, by their columns;
        `step` steps are finished."""
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
