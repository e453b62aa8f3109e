"""What goes wrong, in the user's terms. The command line turns it into exit codes.

Every message states the rule, what came, and the remedy.
"""

from typing import Any


class UserError(ValueError):
    """The input was wrong and nothing was started. The command line exits with 2.

    `key` is the dotted config key at fault, where one is known; it leads the message.
    """

    def __init__(self, message: str, key: str | None = None):
        super().__init__(f"{key}: {message}" if key else message)
        self.message = message
        self.key = key


class WorkerError(RuntimeError):
    """A worker failed or died while a run was under way. The message names worker and step."""


class StepError(RuntimeError):
    """Raised on a worker: worker `rank` could not finish step `step`, from 0, for `reason`."""

    def __init__(self, rank: int, step: int, reason: str):
        super().__init__(f"worker {rank} at step {step}: {reason}")
        self.rank = rank
        self.step = step
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return StepError, (self.rank, self.step, self.reason)
