"""Which hidden unit of one network is which of another: permutations that bring them together.

A network computes the same if its hidden units change places, so the straight line between two
networks says little before their units are matched. Weight matching of Ainsworth, Hayase and
Srinivasa 2022 (Git Re-Basin, arXiv 2209.04836, algorithm 1), for plain chains of layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from decentral.errors import UserError

# Modules whose output at a unit depends on their input at that unit alone, and on no unit's number.
BY_UNIT = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Dropout,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
KNOWN = "Linear, Conv2d without groups, BatchNorm, Flatten, pooling and activations"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor that runs over the units of a hidden layer, `block` entries each."""

    tensor: str
    axis: int
    layer: int
    block: int = 1


@dataclass(frozen=True)
class Chain:
    """The hidden layers of a network: how many units each has, and the axes that run over them."""

    units: Sequence[int]
    axes: Sequence[Axis]

    def permuted(self, tensors: Tensors, places: Sequence[Tensor]) -> dict[str, Tensor]:
        """The network whose unit u of layer l is unit places[l][u] of this one: it computes the
        same."""
        result = dict(tensors)
        for axis in self.axes:
            if axis.tensor in result:
                result[axis.tensor] = _take(result[axis.tensor], axis, places[axis.layer])
        return result

    def match(self, a: Tensors, b: Tensors) -> list[Tensor]:
        """Places for `permuted`, which bring b as near to a as can be found: a local optimum of

            sum over tensors <a, permuted b>,   so the least ||a - permuted b||^2,

        one layer after the other being set to its best place given the others', until nothing
        changes. Begun twice, and the better end taken: from b as it is, and from units matched by
        what comes into them, from the first layer on. The latter finds b exactly where b is a
        permutation of a: by Cauchy and Schwarz no other place gives as much.
        """
        identity = [torch.arange(units) for units in self.units]
        forward = list(identity)
        for layer in range(len(self.units)):
            forward[layer] = self._best(a, b, forward, layer, incoming=True)
        return max(
            (self._climbed(a, b, start) for start in (identity, forward)),
            key=lambda places: self._likeness(a, self.permuted(b, places)),
        )

    def _climbed(self, a: Tensors, b: Tensors, places: list[Tensor]) -> list[Tensor]:
        places = list(places)
        best = self._likeness(a, self.permuted(b, places))
        while True:
            for layer in range(len(self.units)):
                places[layer] = self._best(a, b, places, layer)
            now = self._likeness(a, self.permuted(b, places))
            if now <= best + 1e-12 * abs(best):  # each layer's move can but raise it
                return places
            best = now

    def _best(
        self, a: Tensors, b: Tensors, places: list[Tensor], layer: int, incoming: bool = False
    ) -> Tensor:
        """The best places of one layer's units, given those of the others: an assignment problem.

        incoming: by the tensors alone in which the units are the first axis.
        """
        there = [torch.arange(self.units[layer]) if i == layer else p for i, p in enumerate(places)]
        others = self.permuted(b, there)
        gain = torch.zeros(self.units[layer], self.units[layer], dtype=torch.float64)
        for axis in self.axes:
            if axis.layer == layer and axis.tensor in a and (axis.axis == 0 or not incoming):
                gain += _rows(a[axis.tensor], axis) @ _rows(others[axis.tensor], axis).T
        return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1]).to(
            torch.int64
        )

    def _likeness(self, a: Tensors, b: Tensors) -> float:
        return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def chain_of(model: nn.Module) -> Chain:
    """The hidden layers of a chain of layers: the output of the last one is no hidden layer.

    Raises UserError for a model of any other structure.
    """
    units: list[int] = []
    axes: list[Axis] = []
    seen: set[int] = set()
    for prefix, module in _layers(model, ""):
        trained = list(module.parameters(recurse=False))
        if any(id(p) in seen for p in trained) or not all(p.requires_grad for p in trained):
            raise _unknown(f"{prefix} shares parameters with another layer, or is frozen")
        seen |= {id(p) for p in trained}
        layer = len(units) - 1  # that the input comes from; -1: the data
        if isinstance(module, nn.Linear | nn.Conv2d):
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                raise _unknown(f"{prefix} is a convolution in groups")
            if layer >= 0:
                block = module.weight.shape[1] // units[layer]
                axes.append(Axis(f"{prefix}.weight", 1, layer, block))
            units.append(module.weight.shape[0])
            axes += [Axis(f"{prefix}.{name}", 0, layer + 1) for name in ("weight", "bias")]
        elif isinstance(module, NORMS):
            if layer < 0:
                continue
            if module.num_features != units[layer]:
                raise _unknown(f"{prefix} normalises pixels, not units")
            names = ("weight", "bias", "running_mean", "running_var")
            axes += [Axis(f"{prefix}.{name}", 0, layer) for name in names]
        elif not isinstance(module, (nn.Flatten, *BY_UNIT)):
            raise _unknown(f"{prefix or 'the model'} is a {type(module).__name__}")
    last = len(units) - 1  # its units are the outputs, and stay
    return Chain(units[:-1], [axis for axis in axes if axis.layer < last])


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials, in their order, by name."""
    if type(module) is not nn.Sequential:
        yield prefix, module
        return
    for name, child in module._modules.items():  # named_children tells of one used twice once
        assert child is not None, "a Sequential holds modules"
        yield from _layers(child, f"{prefix}.{name}" if prefix else name)


def _unknown(what: str) -> UserError:
    return UserError(
        f"units are matched in a torch.nn.Sequential of {KNOWN} alone, and {what}; leave it out",
        "--match",
    )


def _take(tensor: Tensor, axis: Axis, place: Tensor) -> Tensor:
    index = (place[:, None] * axis.block + torch.arange(axis.block)).flatten()
    return tensor.index_select(axis.axis, index)


def _rows(tensor: Tensor, axis: Axis) -> Tensor:
    """A row for each unit, with all that the tensor holds of it, float64."""
    units = tensor.shape[axis.axis] // axis.block
    return tensor.movedim(axis.axis, 0).reshape(units, -1).double()
