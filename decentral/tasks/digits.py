"""Handwritten digits that come with scikit-learn: real data, small, and there without a network.

Read from its files, for importing scikit-learn takes longer than all else that a run is built from,
and each worker is a process that would.
"""

import functools
import gzip
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from decentral.tasks.models import build_model
from decentral.tasks.task import Task

_SPLIT_SEED = 0  # never the run's: runs with different seeds are judged on the same test set


def digits(
    workers: int,
    seed: int,
    *,
    model: Mapping[str, Any] = MappingProxyType({"name": "mlp"}),
    test_fraction: Annotated[float, Field(ge=0.01, le=0.9)] = 0.2,
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> Task:
    """Classify 1797 images of 8x8 pixels into ten digits; cross-entropy.

    Pixels are scaled to [0, 1], float32; shape [64] for an `mlp`, [1, 8, 8] for a `cnn`. The
    test set is stratified and depends on `test_fraction` alone. Of the training labels the
    fraction `label_noise` is wrong. `seed` sets the initial model and which labels are wrong; the
    split over the `workers` is the partition's.
    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (the part
    that scikit-learn ships).
    """
    table = _table()
    shape = (64,) if model.get("name") == "mlp" else (1, 8, 8)
    (train_x, train_y), (test_x, test_y) = (
        (
            torch.as_tensor(table[rows, :-1] / 16, dtype=torch.float32).reshape(-1, *shape),
            torch.as_tensor(table[rows, -1], dtype=torch.int64),
        )
        for rows in _split(table[:, -1], test_fraction)
    )
    return Task(
        model=build_model(model, shape, classes=10, seed=seed),
        loss=functional.cross_entropy,
        train=(train_x, _with_wrong(train_y, label_noise, seed)),
        test=(test_x, test_y),
    )


@functools.cache
def _table() -> np.ndarray:
    """[1797, 65]: the pixels of an image, 0 to 16, and its class. Read once a process."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None, "a dependency"
    assert package.submodule_search_locations is not None, "a package"
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return np.loadtxt(lines, delimiter=",")


def _split(classes: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Samples to train on, and the `fraction` to test on: each class has its share of both.

    The very split of scikit-learn's train_test_split, stratified, with _SPLIT_SEED.
    """
    rng = np.random.RandomState(_SPLIT_SEED)
    _, counts = np.unique(classes, return_counts=True)
    tests = math.ceil(fraction * len(classes))
    train_counts = _shares(counts, len(classes) - tests, rng)
    test_counts = _shares(counts - train_counts, tests, rng)
    train, test = [], []
    by_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])
    for samples, trained, tested in zip(by_class, train_counts, test_counts, strict=True):
        shuffled = samples[rng.permutation(len(samples))]
        train.append(shuffled[:trained])
        test.append(shuffled[trained : trained + tested])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def _shares(counts: np.ndarray, draws: int, rng: np.random.RandomState) -> np.ndarray:
    """`draws` dealt out in proportion to `counts`, by the largest remainders, ties by lot."""
    exact = counts / counts.sum() * draws
    dealt = np.floor(exact)
    remainders = exact - dealt
    missing = draws - int(dealt.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        (equal,) = np.where(remainders == remainder)
        lucky = rng.choice(equal, size=min(len(equal), missing), replace=False)
        dealt[lucky] += 1
        missing -= len(lucky)
    return dealt.astype(int)


def _with_wrong(classes: Tensor, fraction: float, seed: int) -> Tensor:
    """The classes with this fraction of them, to the nearest sample, replaced by another one."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(classes), generator=generator)[: round(fraction * len(classes))]
    shift = torch.randint(1, 10, wrong.shape, generator=generator)
    return classes.index_copy(0, wrong, (classes[wrong] + shift) % 10)
