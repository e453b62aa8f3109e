"""What a task is, and how its data is read.

A task's function returns a `Task`; the engines read its data through `fetch` alone and the
splits through `labels`, so that tensors in memory and a user's own Dataset look the same.
"""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from decentral.errors import UserError

Data: TypeAlias = Dataset[Any] | tuple[Tensor, ...]
"""Samples: a map-style Dataset of tuples, or a tuple of tensors whose first axis is the sample.
Of each sample the last part is the target, the parts before it are the model's inputs."""


@dataclass
class Task:
    """A training problem, before any engine has touched it.

    model: float32 and initialised; a function of the seed alone. Every worker starts from it.
    loss: loss(model(*inputs), target) -> scalar, the mean over the batch.
    train, test: see `Data`; floating-point tensors are cast to the run's dtype by the engine.
        Tuples become TensorDatasets. `test` is what the models are evaluated on.
    shards: for a task whose workers own their data, the indices into `train` of each worker [m_i];
        None if a partition is to split the data.
    accuracy: accuracy(model(*inputs), target) -> scalar, the fraction of the batch that is right.
        Left out, it is `top1` where the training target is of an integer dtype (torch's sign of
        class indices), else there is none. Must work under torch.func.vmap, as must the loss.
    optimum: the minimiser of the mean of the workers' objectives, flat, in the order of
        model.parameters() [D], where one is known.

    Raises UserError where the data is not as described.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Data
    test: Data | None = None
    shards: Sequence[Tensor] | None = None
    accuracy: Callable[[Tensor, Tensor], Tensor] | None = None
    optimum: Tensor | None = None

    def __post_init__(self):
        self.train = _as_dataset(self.train, "train")
        if self.test is not None:
            self.test = _as_dataset(self.test, "test")
        if self.accuracy is None and _is_integer(_target(self.train)):
            self.accuracy = top1


def top1(output: Tensor, target: Tensor) -> Tensor:
    """The fraction of targets (class indices [...]) where output [..., classes] is largest."""
    if output.shape[:-1] != target.shape:
        raise UserError(
            "top-1 accuracy needs an output of the target's shape and a last axis of classes;"
            f" got output {list(output.shape)} for target {list(target.shape)}."
            " Give the Task an accuracy of its own"
        )
    return (output.argmax(dim=-1) == target).to(torch.float32).mean()


def fetch(data: Data, indices: Tensor) -> tuple[Tensor, ...]:
    """The samples at `indices` (any shape S): one tensor of shape [S, ...] per part of a sample.

    One gather per part for tensors in memory, on their device; any other Dataset is asked for one
    sample after the other.
    """
    flat = indices.reshape(-1)
    tensors = _tensors(data)
    if tensors is not None:
        parts = [t.index_select(0, flat.to(t.device)) for t in tensors]
    else:
        samples = [_sample(data, index) for index in flat.tolist()]
        parts = [
            torch.stack([torch.as_tensor(p) for p in part]) for part in zip(*samples, strict=True)
        ]
    return tuple(part.reshape((*indices.shape, *part.shape[1:])) for part in parts)


def narrowed(task: Task, dtype: torch.dtype) -> Task:
    """The task with data in memory as floats of `dtype`, where theirs take more bytes.

    So batches need not be cast, at each step those of all workers, and fewer bytes are gathered.
    """
    made: dict[int, Tensor] = {}  # by id: training and test data may be the same

    def narrow(data: Data | None) -> Data | None:
        tensors = None if data is None else _tensors(data)
        if tensors is None:
            return data
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.element_size() > dtype.itemsize:
                made.setdefault(id(tensor), tensor.to(dtype))
        return tuple(made.get(id(tensor), tensor) for tensor in tensors)

    train = narrow(task.train)
    assert train is not None, "a task has training data"
    return replace(task, train=train, test=narrow(task.test))


def in_memory(data: Data) -> bool:
    """Whether the data lies in memory as tensors, which `fetch` takes by one gather."""
    return _tensors(data) is not None


def length(data: Data) -> int:
    """The number of samples."""
    tensors = _tensors(data)
    return len(tensors[0]) if tensors is not None else len(cast(Sized, data))


def labels(data: Data) -> Tensor:
    """The class of each sample, int64 [samples]: an integer target, or the Dataset's `.targets`.

    Raises UserError where the data tells no classes.
    """
    found = known_labels(data)
    if found is not None:
        return found
    raise UserError(
        "a split by class needs one integer class per sample: an integer target of tensors in"
        f" memory, or an attribute `targets` of the Dataset; {type(data).__name__} has neither."
        " Use kind: iid",
        "task.partition.kind",
    )


def known_labels(data: Data) -> Tensor | None:
    """The same, or None where the data tells no classes."""
    tensors = _tensors(data)
    found = tensors[-1] if tensors is not None else getattr(data, "targets", None)
    if found is None:
        return None
    found = torch.as_tensor(found)
    return found.to("cpu", torch.int64) if found.ndim == 1 and _is_integer(found) else None


def _as_dataset(data: Data, name: str) -> Dataset[Any]:
    if isinstance(data, tuple):
        lengths = [len(t) for t in data]
        if len(set(lengths)) > 1:
            raise UserError(
                f"the tensors of `{name}` need one length, the number of samples; got {lengths}"
            )
        data = TensorDataset(*data)
    if not hasattr(data, "__len__"):
        raise UserError(
            f"`{name}` needs a map-style Dataset (with __len__ and __getitem__);"
            f" got {type(data).__name__}. Read a stream into tensors first"
        )
    if length(data) == 0:
        raise UserError(f"`{name}` needs at least one sample; got none")
    _sample(data, 0)
    return data


def _tensors(data: Data) -> tuple[Tensor, ...] | None:
    """The whole data as tensors, where it lies in memory as such."""
    if isinstance(data, tuple):
        return data
    # Not a subclass, which may transform its samples.
    return data.tensors if type(data) is TensorDataset else None


def _sample(data: Any, index: int) -> Sequence[Any]:
    sample = data[index]
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        raise UserError(
            "a sample must be a tuple (input, ..., target) of tensors or numbers;"
            f" got {type(sample).__name__}"
            + (f" of {len(sample)}" if isinstance(sample, tuple | list) else "")
        )
    return sample


def _target(data: Dataset[Any]) -> Tensor:
    return torch.as_tensor(_sample(data, 0)[-1])


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
