"""Evaluation of a model given as flat vectors, one or many at a time. Both engines call it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from decentral.gradients import FlatModel
from decentral.tasks import Task, fetch, length

BATCH = 512  # samples a pass, at least
PASS = 32_768  # models x samples a pass, about: it bounds the memory of activations


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over the test set, and accuracy where the task has one."""

    loss: float
    accuracy: float | None


def evaluate(model: FlatModel, task: Task, x: Tensor, buffers: Tensor) -> Evaluation:
    """Evaluate one model, x [D] and buffers [B]."""
    losses, accuracies = evaluate_each(model, task, x.unsqueeze(0), buffers.unsqueeze(0))
    return Evaluation(losses[0].item(), None if accuracies is None else accuracies[0].item())


def evaluate_each(
    model: FlatModel, task: Task, x: Tensor, buffers: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Losses and accuracies, [m] in float64, of m models: x [m, D] and buffers [m, B]."""
    assert task.test is not None, "a task without a test set has nothing to evaluate"
    size = length(task.test)
    models = len(x) if model.takes_vmap else 1
    batch = max(BATCH, PASS // models)
    sums = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)  # of loss, of accuracy
    model.module.eval()
    try:
        for indices in torch.arange(size).split(batch):
            *inputs, target = model.cast(fetch(task.test, indices))
            for rows in torch.arange(len(x), device=x.device).split(max(1, PASS // len(indices))):
                figures = _figures(model, task, x[rows], buffers[rows], inputs, target)
                sums[: len(figures), rows] += figures.to(sums) * len(indices)
    finally:
        model.module.train()
    losses, right = sums.cpu() / size
    return losses, None if task.accuracy is None else right


def _figures(
    model: FlatModel,
    task: Task,
    x: Tensor,
    buffers: Tensor,
    inputs: list[Tensor],
    target: Tensor,
) -> Tensor:
    """Loss, and accuracy where there is one, of each model on the same samples: [1 or 2, m]."""

    def figures(x: Tensor, buffers: Tensor) -> Tensor:
        output = model(model.parameters.views(x), model.buffers.views(buffers), inputs)
        values = [task.loss(output, target)]
        if task.accuracy is not None:
            values.append(task.accuracy(output, target).to(values[0]))
        return torch.stack(values)

    with torch.no_grad():
        if model.takes_vmap and len(x) > 1:
            return vmap(figures, out_dims=1, randomness="different")(x, buffers)
        return torch.stack([figures(*row) for row in zip(x, buffers, strict=True)], dim=1)
