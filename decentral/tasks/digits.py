"""Handwritten digits that come with scikit-learn: real data, small, and there without a network."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

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
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    split = train_test_split(
        pixels / 16, classes, test_size=test_fraction, random_state=_SPLIT_SEED, stratify=classes
    )
    shape = (64,) if model.get("name") == "mlp" else (1, 8, 8)
    train_x, test_x = (
        torch.as_tensor(x, dtype=torch.float32).reshape(-1, *shape) for x in split[:2]
    )
    train_y, test_y = (torch.as_tensor(y, dtype=torch.int64) for y in split[2:])
    return Task(
        model=build_model(model, shape, classes=10, seed=seed),
        loss=functional.cross_entropy,
        train=(train_x, _with_wrong(train_y, label_noise, seed)),
        test=(test_x, test_y),
    )


def _with_wrong(classes: Tensor, fraction: float, seed: int) -> Tensor:
    """The classes with this fraction of them, to the nearest sample, replaced by another one."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(classes), generator=generator)[: round(fraction * len(classes))]
    shift = torch.randint(1, 10, wrong.shape, generator=generator)
    return classes.index_copy(0, wrong, (classes[wrong] + shift) % 10)
