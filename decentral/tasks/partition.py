"""How the samples of a data set are split over the workers.

Every split uses each sample exactly once and gives shards whose sizes differ by at most one: the
mean of the workers' objectives is then the objective of the pooled data, whatever the split, and
runs on different splits are comparable. A split is a function of (labels, workers, seed, options);
`labels` are the class of each sample, int64 [samples].
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from decentral.errors import UserError

_HELD_OUT = int.from_bytes(b"held out", "little")  # apart from other uses of the same seed
MOST_COUNTS = 2**20  # 4 MiB


def iid(labels: Tensor, workers: int, seed: int) -> list[Tensor]:
    """Deal the shuffled samples out, whatever their labels; indices [m_i] per worker."""
    sizes = _sizes(len(labels), workers)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return _shards(np.split(shuffled, np.cumsum(sizes)[:-1]))


def dirichlet(labels: Tensor, workers: int, seed: int, *, alpha: PositiveFloat) -> list[Tensor]:
    """Each worker draws a class mix q ~ Dir(alpha p) and fills its shard by it; indices [m_i] each.

    p are the class frequencies of the data. alpha -> infinity gives q = p, alpha -> 0 one class.
    Draws are without replacement; where a class is used up, q is renormalised over the others, so
    the few workers that are served last (in random order) get what is left, whatever their q.
    After Hsu, Qi and Brown 2019 (arXiv 1909.06335). The other custom, to split every class over
    the workers by Dir(alpha), makes shards of very different sizes: their mean objective is not the
    pooled one.
    """
    rng = np.random.default_rng(seed)
    sizes = _sizes(len(labels), workers)
    pools = _by_label(labels, rng)
    left = np.array([len(pool) for pool in pools])
    mixes = rng.dirichlet(alpha * left / left.sum(), size=workers)
    shards: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * workers
    for worker in rng.permutation(workers):
        taken = np.zeros_like(left)
        # Draws that meet a used-up class are drawn again, until the shard is full.
        while missing := sizes[worker] - taken.sum():
            open_mix = np.where(left > taken, mixes[worker], 0.0)
            if open_mix.sum() < 1e-12:  # nothing left of the classes it wants: as the rest has it
                open_mix = (left - taken).astype(np.float64)
            drawn = rng.multinomial(missing, open_mix / open_mix.sum())
            taken = np.minimum(taken + drawn, left)
        left -= taken
        shards[worker] = np.concatenate(
            [pool[rest : rest + n] for pool, rest, n in zip(pools, left, taken, strict=True)]
        )
    return _shards(shards)


def by_class(
    labels: Tensor, workers: int, seed: int, *, classes_per_worker: PositiveInt = 2
) -> list[Tensor]:
    """Give each worker samples of few classes; indices [m_i] per worker.

    The samples, sorted by class (the order of the classes drawn), are cut into
    workers * classes_per_worker pieces; a worker gets pieces that lie far apart, and is placed at
    random. After McMahan et al. 2017 (arXiv 1602.05629), who deal the pieces at random.
    Where pieces and classes end together, every worker has exactly `classes_per_worker`. A class
    that ends inside a piece adds one to that worker's, which happens at most (number of classes
    - 1) times in all; a class with more than 1/classes_per_worker of the data gives fewer.
    """
    rng = np.random.default_rng(seed)
    sizes = _sizes(len(labels), workers)
    pools = _by_label(labels, rng)
    if not len(pools) / workers <= classes_per_worker <= min(len(pools), sizes[-1]):
        raise UserError(
            f"{len(pools)} classes on {workers} workers of {sizes[-1]} samples or more need"
            f" {-(-len(pools) // workers)} to {min(len(pools), sizes[-1])} classes per worker"
            f" (every sample has a place); got {classes_per_worker}",
            "task.partition.classes_per_worker",
        )
    in_order = np.concatenate([pools[c] for c in rng.permutation(len(pools))])
    whole, rest = np.divmod(sizes, classes_per_worker)
    piece_sizes = whole + (np.arange(classes_per_worker)[:, None] < rest)  # [pieces each, workers]
    pieces = np.split(in_order, np.cumsum(piece_sizes)[:-1])
    shards = [np.concatenate(pieces[i::workers]) for i in range(workers)]
    return _shards([shards[i] for i in rng.permutation(workers)])


PARTITIONS: dict[str, Callable[..., list[Tensor]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "by_class": by_class,
}


def hold_out(samples: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a random `fraction` of the samples, at least one, and of the others; sorted.

    Raises UserError where no others are left.
    """
    count = max(1, round(fraction * samples))
    if count >= samples:
        raise UserError(
            f"must leave samples to train on; {fraction:g} of {samples} is all of them",
            "task.validation",
        )
    shuffled = np.random.default_rng([seed, _HELD_OUT]).permutation(samples)
    held_out, rest = _shards([shuffled[:count], shuffled[count:]])
    return held_out, rest


def label_counts(labels: Tensor, shards: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The classes that occur, int64 [classes], and the samples of each in each shard, int32
    [workers, classes]; None where that would be more than MOST_COUNTS numbers."""
    classes, number = torch.unique(labels, return_inverse=True)
    if len(shards) * len(classes) > MOST_COUNTS:
        return None
    counts = [torch.bincount(number[shard], minlength=len(classes)) for shard in shards]
    return classes, torch.stack(counts).to(torch.int32)


def _sizes(samples: int, workers: int) -> np.ndarray:
    """Shard sizes [workers] that differ by at most one, the larger first."""
    if not 1 <= workers <= samples:
        raise UserError(
            f"every worker needs a sample of its own: at most {samples} workers; got {workers}",
            "workers",
        )
    return samples // workers + (np.arange(workers) < samples % workers)


def _by_label(labels: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
    """For each class that occurs, the indices of its samples in random order."""
    shuffled = rng.permutation(len(labels))
    found = labels.cpu().numpy()[shuffled]
    _, counts = np.unique(found, return_counts=True)
    ordered = shuffled[np.argsort(found, kind="stable")]
    return np.split(ordered, np.cumsum(counts)[:-1])


def _shards(indices: list[np.ndarray]) -> list[Tensor]:
    """As sorted tensors: the sampler shuffles, and neighbours in memory stay neighbours."""
    return [torch.from_numpy(np.sort(shard)) for shard in indices]
