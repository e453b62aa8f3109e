"""The built-in models, chosen in a config as `task.model={name: mlp, hidden: [256]}`.

A model is a function `(shape, classes, *, options) -> Module`: shape of one sample, number of
outputs. None has BatchNorm: its running statistics would differ between workers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from decentral.errors import UserError
from decentral.signature import bind, choose


def mlp(shape: Sequence[int], classes: int, *, hidden: Sequence[PositiveInt] = (256,)) -> nn.Module:
    """Fully connected layers with ReLU between; `hidden` are the widths, [] is a linear model."""
    widths = [prod(shape), *hidden, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(
    shape: Sequence[int], classes: int, *, channels: Sequence[PositiveInt] = (32, 64)
) -> nn.Module:
    """For each of `channels` a 3x3 convolution, ReLU and 2x2 max pooling; then a linear layer.

    `shape` is [channels, height, width]; every stage halves height and width.
    """
    depth, height, width = shape
    if not 1 <= len(channels) <= min(height, width).bit_length() - 1:
        raise UserError(
            f"each stage halves a {height}x{width} image, which allows 1 to"
            f" {min(height, width).bit_length() - 1} stages; got {list(channels)}",
            "task.model.channels",
        )
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([depth, *channels]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        height, width = height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, classes))


def resnet(
    shape: Sequence[int], classes: int, *, depth: PositiveInt = 20, width: PositiveInt = 16
) -> nn.Module:
    """The residual network for CIFAR-10 of He et al. 2016 (arXiv 1512.03385), with GroupNorm.

    Three stages of (depth - 2) / 6 blocks, `width`, twice and four times as many channels; groups
    of 8 channels, or all in one where 8 do not divide them. A convolution of 1x1 where the shape
    changes.
    """
    blocks, left = divmod(depth - 2, 6)
    if left or not blocks:
        raise UserError(
            f"is 6 blocks + 2, such as 8, 20, 32, 44 or 56; got {depth}", "task.model.depth"
        )
    layers = [*_normalised(shape[0], width, 1), nn.ReLU()]
    before = width
    for stage in range(3):
        for block in range(blocks):
            layers.append(Residual(before, width << stage, 2 if stage and not block else 1))
            before = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class Residual(nn.Module):
    """Two 3x3 convolutions, whose result is added to what came in."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(
            *_normalised(before, width, stride), nn.ReLU(), *_normalised(width, width, 1)
        )
        same = before == width and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.inner(x) + self.skip(x))


def _normalised(before: int, width: int, stride: int) -> list[nn.Module]:
    groups = width // 8 if width % 8 == 0 else 1
    return [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.GroupNorm(groups, width)]


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn, "resnet": resnet}


def build_model(
    model: Mapping[str, Any],
    shape: Sequence[int],
    classes: int,
    seed: int,
    key: str = "task.model",
    table: Mapping[str, Callable[..., nn.Module]] = MODELS,
) -> nn.Module:
    """The model that a config asks for, a function of its arguments alone.

    `model` holds its name, in `table`, and its options. Raises UserError naming `key` and the
    option at fault.
    """
    options = dict(model)
    if not isinstance(name := options.pop("name", None), str):
        raise UserError(f"a model needs a name, one of {', '.join(table)}; got {model}", key)
    function = choose(table, name, f"{key}.name", "model")
    bound = bind(function, options, key, given=("shape", "classes"))
    with seeded(seed):
        return function(shape, classes, **bound)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws on the CPU from `seed`; afterwards the caller's own state is back.

    For modules that draw their initial values from torch's global generator.
    """
    # torch.manual_seed would also seed the accelerators, whose states are not saved here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
