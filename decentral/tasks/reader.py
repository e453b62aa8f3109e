"""From drawn indices to batches: where a Dataset's own draws come from, and reading ahead.

The batch of a worker at a step is a function of (seed, worker, step), a Dataset's augmentations
included: the generators of torch, numpy and Python are set before each worker's samples are read.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from decentral.tasks.sampler import Sampler
from decentral.tasks.task import Data, fetch, in_memory

AHEAD = 2  # batches that each process has read


def read(data: Data, indices: Tensor, seeds: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    """The samples at `indices`, [workers, batch]: one tensor [workers, batch, ...] per part.

    seeds: gives int64 [workers], for what a Dataset draws itself. Tensors in memory draw nothing,
    and it is not asked.
    """
    if in_memory(data):
        return fetch(data, indices)
    batches = []
    for own, seed in zip(indices, seeds().tolist(), strict=True):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        batches.append(fetch(data, own))
    return tuple(torch.stack(part) for part in zip(*batches, strict=True))


class Reader:
    """The batches of a sampler's workers, by step; as `read` has them.

    processes: so many read ahead, each AHEAD batches, in the order of the steps; 0 reads when asked
    to. A step before the last one that was asked for is read when asked to. pin: into pinned host
    memory, from which a GPU copies while it computes.
    """

    def __init__(self, data: Data, sampler: Sampler, processes: int = 0, pin: bool = False):
        self._batches = _Batches(data, sampler)
        self._processes, self._pin = processes, pin
        self._ahead: Iterator[tuple[Tensor, ...]] | None = None
        self._next = 0  # step that comes from it

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        if self._processes and (self._ahead is None or step >= self._next):
            if self._ahead is None or step > self._next:
                self._ahead = self._from(step)
            self._next = step + 1
            return next(self._ahead)
        batch = self._batches[step]
        if not self._pin:
            return batch
        return tuple(part.pin_memory() if part.device.type == "cpu" else part for part in batch)

    def _from(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        steps: Any = itertools.count(step)
        return iter(
            DataLoader(
                self._batches,
                batch_size=None,  # a step is a batch
                sampler=steps,
                num_workers=self._processes,
                prefetch_factor=AHEAD,
                pin_memory=self._pin,
                multiprocessing_context="spawn",  # a fork would have locks that nobody releases
            )
        )


class _Batches(Dataset[tuple[Tensor, ...]]):
    """The batch of each step, as torch's loader asks for it."""

    def __init__(self, data: Data, sampler: Sampler):
        self._data, self._sampler = data, sampler

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        sampler = self._sampler
        return read(self._data, sampler.indices(step), lambda: sampler.sample_seeds(step))
