"""Which samples a worker takes at a step: a function of (seed, worker, step) alone.

The simulator draws for all workers at once, a worker for itself, a resumed run from the middle;
all get the same rows.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from decentral.draws import hash64, shuffled, uniform_index
from decentral.errors import UserError

# Streams apart from other uses of the same seed.
_STREAM = int.from_bytes(b"batches", "little")
_DROPOUT = int.from_bytes(b"dropout", "little")
_SAMPLES = int.from_bytes(b"samples", "little")


class Sampler:
    """Draws batches from the shards of some `workers`.

    shards: dataset indices per worker, int64 [m_i]; only those of `workers` are read.
    sampling: "shuffle" takes the shard in a new random order in every epoch, each sample once; a
        batch that meets the end of an epoch goes on in the next, several times where the shard
        is shorter than the batch. "replacement" draws each sample on its own.

    Raises UserError where a worker has no samples.
    """

    def __init__(
        self,
        shards: Sequence[Tensor] | Mapping[int, Tensor],
        batch_size: int,
        seed: int,
        sampling: Literal["shuffle", "replacement"],
        workers: Sequence[int],
    ):
        self.sampling = sampling
        self.batch_size = batch_size
        self._workers = len(workers)
        self._seed = int(hash64(_DROPOUT, seed, workers[0]))
        self._sample_seeds = hash64(_SAMPLES, seed, torch.tensor(workers))
        # Workers whose shards are equally long are in the same place of the same epoch.
        rows: dict[int, list[int]] = {}
        for row, worker in enumerate(workers):
            rows.setdefault(len(shards[worker]), []).append(row)
        if 0 in rows:
            worker = workers[rows[0][0]]
            raise UserError(f"every worker needs samples to draw from; worker {worker} has none")
        self._groups = [
            _Group(
                rows=torch.tensor(members),
                samples=torch.stack([shards[workers[row]] for row in members]),
                key=hash64(_STREAM, seed, torch.tensor([workers[row] for row in members])),
            )
            for members in rows.values()
        ]

    def seed(self, step: int) -> int:
        """A seed for what else is random at `step`, such as dropout: for the first of `workers`."""
        return (self._seed + step) % 2**63

    def sample_seeds(self, step: int) -> Tensor:
        """Seeds for what a Dataset draws itself, such as augmentations, int64 [workers]."""
        return hash64(self._sample_seeds, step)

    def indices(self, step: int) -> Tensor:
        """Dataset indices of the batches of `step`, int64 [workers, batch]."""
        drawn = torch.empty(self._workers, self.batch_size, dtype=torch.int64)
        for group in self._groups:
            if self.sampling == "shuffle":
                drawn[group.rows] = group.shuffle(step, self.batch_size)
            else:
                drawn[group.rows] = group.replace(step, self.batch_size)
        return drawn


class _Group:
    """Workers with shards of one size m: their `samples` [k, m], and a `key` [k] for each."""

    def __init__(self, rows: Tensor, samples: Tensor, key: Tensor):
        self.rows = rows
        self._samples = samples
        self._key = key
        self._size = samples.shape[1]
        self._epochs: dict[int, Tensor] = {}  # what the last batch came from

    def shuffle(self, step: int, batch: int) -> Tensor:
        """The next `batch` samples of each worker's endless row of shuffled epochs, [k, batch]."""
        start, stop = step * batch, (step + 1) * batch
        needed = range(start // self._size, (stop - 1) // self._size + 1)
        self._epochs = {epoch: self._epoch(epoch) for epoch in needed}
        parts = [
            order[:, max(0, start - epoch * self._size) : stop - epoch * self._size]
            for epoch, order in self._epochs.items()
        ]
        return torch.cat(parts, dim=1)

    def _epoch(self, epoch: int) -> Tensor:
        """All samples of the shards in the order of an epoch, [k, m]."""
        known = self._epochs.get(epoch)
        if known is not None:
            return known
        return self._samples.gather(1, shuffled(hash64(self._key, epoch), self._size))

    def replace(self, step: int, batch: int) -> Tensor:
        """`batch` samples of each worker, each drawn from the whole shard, [k, batch]."""
        bits = hash64(self._key[:, None], step, torch.arange(batch))
        return self._samples.gather(1, uniform_index(bits, self._size))
