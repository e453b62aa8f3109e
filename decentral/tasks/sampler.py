"""Which samples a worker takes at a step: a function of (seed, worker, step) alone.

The simulator draws for all workers at once, a worker for itself, a resumed run from the middle;
all get the same rows.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from decentral.draws import hash64, permute, uniform_index
from decentral.errors import UserError

_STREAM = int.from_bytes(b"batches", "little")  # apart from other uses of the same seed


class Sampler:
    """Draws batches from the shards of some `workers`.

    shards: dataset indices per worker, int64 [m_i]; only those of `workers` are read.
    sampling: "shuffle" takes the shard in a new random order in every epoch, each sample once; a
        batch that meets the end of an epoch goes on in the next, several times where the shard
        is shorter than the batch. "replacement" draws each sample on its own.
    device: where indices are drawn and returned.

    Raises UserError where a worker has no samples.
    """

    def __init__(
        self,
        shards: Sequence[Tensor] | Mapping[int, Tensor],
        batch_size: int,
        seed: int,
        sampling: Literal["shuffle", "replacement"],
        workers: Sequence[int],
        device: torch.device | str = "cpu",
    ):
        assert batch_size >= 1, batch_size
        assert sampling in ("shuffle", "replacement"), sampling
        own = [shards[worker] for worker in workers]
        sizes = torch.tensor([len(shard) for shard in own])
        for worker, size in zip(workers, sizes.tolist(), strict=True):
            if size == 0:
                raise UserError(
                    f"every worker needs samples to draw from; worker {worker} has none"
                )
        self.sampling = sampling
        self.batch_size = batch_size
        self._samples = torch.cat(own).to(device, torch.int64)
        self._size = sizes[:, None].to(device)  # [workers, 1], as those below
        self._start = (sizes.cumsum(0) - sizes)[:, None].to(device)
        self._key = hash64(_STREAM, seed, torch.tensor(list(workers))[:, None].to(device))
        self._column = torch.arange(batch_size, device=device)  # [batch]

    def indices(self, step: int) -> Tensor:
        """Dataset indices of the batches of `step`, int64 [workers, batch]."""
        if self.sampling == "replacement":
            drawn = uniform_index(hash64(self._key, step, self._column), self._size)
        else:
            drawn = self._shuffled(step)
        drawn += self._start
        return self._samples.index_select(0, drawn.flatten()).view_as(drawn)

    def _shuffled(self, step: int) -> Tensor:
        """Positions in the shards, [workers, batch]."""
        first = step * self.batch_size  # of all that the worker draws, this batch's first
        epoch = first // self._size
        offset = first - epoch * self._size + self._column
        beyond = (offset >= self._size).flatten().nonzero().squeeze(1)
        if len(beyond) == 0:
            return permute(offset, self._size, hash64(self._key, epoch))
        # One key per worker is cheap, one per draw is not: only draws past the epoch's end pay.
        drawn = permute(offset.minimum(self._size - 1), self._size, hash64(self._key, epoch))
        row = beyond // self.batch_size
        size, key, epoch = (column[row, 0] for column in (self._size, self._key, epoch))
        offset = offset.flatten()[beyond]
        later = hash64(key, epoch + offset // size)
        drawn.view(-1)[beyond] = permute(offset % size, size, later)
        return drawn
