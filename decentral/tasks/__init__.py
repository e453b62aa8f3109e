"""Tasks: a model, a loss, data split over the workers, and an evaluation.

`TASKS` names the built-in ones. Each is a plain function `(workers, seed, *, options) -> Task`,
and a user's own task is any function of that shape: no option needs a schema beside its signature.
"""

from collections.abc import Callable

from decentral.tasks.digits import digits
from decentral.tasks.images import images
from decentral.tasks.logistic import logistic
from decentral.tasks.models import MODELS, build_model, seeded
from decentral.tasks.partition import (
    PARTITIONS,
    by_class,
    dirichlet,
    hold_out,
    iid,
    label_counts,
)
from decentral.tasks.quadratic import quadratic
from decentral.tasks.reader import Reader, read
from decentral.tasks.sampler import Sampler
from decentral.tasks.task import Data, Task, fetch, known_labels, labels, length, narrowed
from decentral.tasks.text import text

TASKS: dict[str, Callable[..., Task]] = {
    "quadratic": quadratic,
    "logistic": logistic,
    "digits": digits,
    "text": text,
    "images": images,
}

__all__ = [
    "MODELS",
    "PARTITIONS",
    "TASKS",
    "Data",
    "Reader",
    "Sampler",
    "Task",
    "build_model",
    "by_class",
    "digits",
    "dirichlet",
    "fetch",
    "hold_out",
    "iid",
    "images",
    "known_labels",
    "label_counts",
    "labels",
    "length",
    "logistic",
    "narrowed",
    "quadratic",
    "read",
    "seeded",
    "text",
]
