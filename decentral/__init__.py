"""Decentralised and local SGD on PyTorch and Ray: launch, simulate, compare.

result = decentral.run("configs/quickstart.yaml", engine="sim", **{"algorithm.period": 4})
result.metrics, result.model, result.summary
"""

from typing import TYPE_CHECKING, Any

from decentral.errors import StepError, UserError, WorkerError

if TYPE_CHECKING:
    from decentral.api import Result, resume, run
    from decentral.sweep.driver import Comparison, compare
    from decentral.tasks import Task
    from decentral.wrapper import wrap

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "Result",
    "StepError",
    "Task",
    "UserError",
    "WorkerError",
    "compare",
    "resume",
    "run",
    "wrap",
]

_HOMES = {
    "Comparison": "sweep.driver",
    "Result": "api",
    "Task": "tasks",
    "compare": "sweep.driver",
    "resume": "api",
    "run": "api",
    "wrap": "wrapper",
}


def __getattr__(name: str) -> Any:
    # torch takes over a second to import: only when something needs it.
    if name not in _HOMES:
        raise AttributeError(f"module 'decentral' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"decentral.{_HOMES[name]}"), name)
