"""Evaluation of a model given as flat vectors, one or many at a time. Both engines call it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from decentral.gradients import FlatModel
from decentral.tasks import Task, fetch, length

BATCH = 512  # samples a pass
MODEL_SAMPLES = 16_384  # models x samples a pass, to bound the memory of activations


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
    losses = torch.zeros(len(x), dtype=torch.float64)
    right = torch.zeros_like(losses)
    model.module.eval()
    try:
        for start in range(0, size, BATCH):
            indices = torch.arange(start, min(start + BATCH, size))
            *inputs, target = model.cast(fetch(task.test, indices))
            for rows in torch.arange(len(x)).split(max(1, MODEL_SAMPLES // len(indices))):
                outputs = _forward(model, x[rows], buffers[rows], inputs)
                for row, output in zip(rows.tolist(), outputs, strict=True):
                    losses[row] += task.loss(output, target).item() * len(indices)
                    if task.accuracy is not None:
                        right[row] += task.accuracy(output, target).item() * len(indices)
    finally:
        model.module.train()
    return losses / size, None if task.accuracy is None else right / size


def _forward(model: FlatModel, x: Tensor, buffers: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of each model, x [m, D], on the same inputs."""

    def forward(x: Tensor, buffers: Tensor) -> Tensor:
        return model(model.parameters.views(x), model.buffers.views(buffers), inputs)

    with torch.no_grad():
        if model.takes_vmap and len(x) > 1:
            return list(vmap(forward, randomness="different")(x, buffers))
        return [forward(*row) for row in zip(x, buffers, strict=True)]
