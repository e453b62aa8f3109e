"""The training objective on a fixed sample of the workers' data: its gradient, its curvature.

The task's loss alone, without weight decay, with the model in evaluation mode: dropout is off and
BatchNorm takes its running statistics. Diagnostics is the caller, and `build` tries it once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decentral.draws import hash64, shuffled
from decentral.gradients import FlatModel, seed_generators
from decentral.tasks import Task, fetch

PASS = 512  # samples a forward and backward pass, at most: it bounds the memory of activations
_STREAM = int.from_bytes(b"sampled", "little")


class Part(NamedTuple):
    """Samples for one pass, int64 [m], and the weight of their mean loss in the objective."""

    samples: Tensor
    weight: float


@dataclass(frozen=True)
class Objective:
    """F(x) = sum_c weight_c mean loss(samples_c; x), for models x [D] with `buffers` [B]."""

    model: FlatModel
    task: Task
    buffers: Tensor
    parts: Sequence[Part]

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of F at x, [D]."""
        total = torch.zeros_like(x)
        for leaves, loss in self._losses(x):
            self._add(total, torch.autograd.grad(loss, leaves, materialize_grads=True))
        return total

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """The Hessian of F at x times v, [D]: the gradient of x -> <gradient of F, v>.

        Raises RuntimeError where an operation of the model has no second derivative.
        """
        total = torch.zeros_like(x)
        along = tuple(self.model.parameters.views(v).values())
        # Fused attention has no second derivative; the plain form of it does.
        with sdpa_kernel(SDPBackend.MATH):
            for leaves, loss in self._losses(x):
                first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
                slope = torch.stack([(g * u).sum() for g, u in zip(first, along, strict=True)])
                if not slope.requires_grad:  # the loss is linear in x
                    continue
                # Not torch.autograd.grad, which takes a function that can be differentiated once
                # for a constant: backward comes past it, and raises.
                slope.sum().backward()
                self._add(total, [leaf.grad for leaf in leaves])
        return total

    def _losses(self, x: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """For each part: the parameters that the pass was taken at, and its weighted loss."""
        for number, (samples, weight) in enumerate(self.parts):
            *inputs, target = self.model.cast(fetch(self.task.train, samples))
            # What a model draws even now is the same for every product with the Hessian.
            seed_generators(number, self.model.device)
            views = self.model.parameters.views(x)
            leaves = {name: view.detach().requires_grad_() for name, view in views.items()}
            buffers = self.model.buffers.views(self.buffers.clone())
            with torch.enable_grad():
                loss = self.task.loss(self.model(leaves, buffers, inputs), target)
                yield tuple(leaves.values()), weight * loss

    def _add(self, total: Tensor, parts: Sequence[Tensor | None]) -> None:
        for view, part in zip(self.model.parameters.views(total).values(), parts, strict=True):
            if part is not None:
                view += part


def fixed_sample(shards: Sequence[Tensor], per_worker: int, seed: int) -> list[Part]:
    """At most `per_worker` samples of each worker, drawn once and for all without replacement.

    Every worker has the weight 1/n, however many samples it has: F is the mean of the workers'
    objectives, each taken on its sample, and where all samples are in, the objective itself.
    """
    by_count: dict[int, list[Tensor]] = {}
    for worker, shard in enumerate(shards):
        if len(shard) > per_worker:
            order = shuffled(hash64(_STREAM, seed, worker).reshape(1), len(shard))[0]
            shard = shard[order[:per_worker]]
        by_count.setdefault(len(shard), []).append(shard)
    return [
        part
        for count, alike in by_count.items()
        for part in split(torch.cat(alike), len(alike) / len(shards))
        if count
    ]


def split(samples: Tensor, weight: float = 1.0) -> list[Part]:
    """Samples [m] that count alike, with this weight together, in parts that fit a pass."""
    return [Part(some, weight * len(some) / len(samples)) for some in samples.split(PASS)]
