"""Evaluation of a model given as flat vectors, one or many at a time. Both engines call it.

It runs in the run's dtype, whatever the training's autocast. `averaged_buffers` is what goes with
averaged parameters where a model is evaluated or saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from decentral.comm import accumulation_dtype
from decentral.draws import hash64, shuffled
from decentral.experiment import Experiment
from decentral.gradients import FlatModel, seed_generators
from decentral.tasks import Task, fetch, length

BATCH = 512  # samples a pass, at least
RECALIBRATION = (8, 256)  # batches and samples a batch, at most, for BatchNorm's statistics
_STREAM = int.from_bytes(b"recalibr", "little")
PASS = 32_768  # models x samples a pass, about: it bounds the memory of activations


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over the samples, and accuracy where the task has one."""

    loss: float
    accuracy: float | None


def averaged_figures(
    model: FlatModel, experiment: Experiment, x: Tensor, buffers: Tensor
) -> dict[str, float]:
    """What a record says of the averaged model, x [D] and buffers [B].

    `eval_loss` and `eval_accuracy` on the test set, `validation_loss` and `validation_accuracy` on
    the samples that were held out; each where there is such a set, and an accuracy.
    """
    task, held_out = experiment.task, experiment.validation
    found = {}
    if task.test is not None:
        found["eval"] = evaluate(model, task, x, buffers)
    if held_out is not None:
        found["validation"] = evaluate(model, task, x, buffers, held_out)
    figures = {}
    for name, evaluation in found.items():
        figures[f"{name}_loss"] = evaluation.loss
        if evaluation.accuracy is not None:
            figures[f"{name}_accuracy"] = evaluation.accuracy
    return figures


def evaluate(
    model: FlatModel, task: Task, x: Tensor, buffers: Tensor, held_out: Tensor | None = None
) -> Evaluation:
    """Evaluate one model, x [D] and buffers [B]; see `evaluate_each`."""
    losses, accuracies = evaluate_each(model, task, x.unsqueeze(0), buffers.unsqueeze(0), held_out)
    return Evaluation(losses[0].item(), None if accuracies is None else accuracies[0].item())


def evaluate_each(
    model: FlatModel, task: Task, x: Tensor, buffers: Tensor, held_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Losses and accuracies, [m] in float64, of m models: x [m, D] and buffers [m, B].

    On the test set, or on the training samples of the indices `held_out` [v].
    """
    data = task.test if held_out is None else task.train
    assert data is not None, "a task without a test set has nothing to evaluate"
    samples = torch.arange(length(data)) if held_out is None else held_out
    size = len(samples)
    models = len(x) if model.takes_vmap else 1
    batch = max(BATCH, PASS // models)
    sums = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)  # of loss, of accuracy
    model.module.eval()
    try:
        for indices in samples.split(batch):
            *inputs, target = model.cast(fetch(data, indices))
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
            values.append(task.accuracy(output, target))
        return torch.stack([value.to(accumulation_dtype(x.dtype)) for value in values])

    with torch.no_grad():
        if model.takes_vmap and len(x) > 1:
            return vmap(figures, out_dims=1, randomness="different")(x, buffers)
        return torch.stack([figures(*row) for row in zip(x, buffers, strict=True)], dim=1)


def averaged_buffers(model: FlatModel, experiment: Experiment, x: Tensor, mean: Tensor) -> Tensor:
    """The buffers [B] of the averaged model x [D]: the workers' `mean`, or recalibrated."""
    if experiment.config.buffers != "recalibrate":
        return mean
    batches = recalibration_batches(experiment.shards, experiment.config.seed)
    return recalibrated(model, experiment.task, x, mean, batches)


def recalibration_batches(shards: Sequence[Tensor], seed: int) -> Tensor:
    """Samples drawn without replacement from all shards, int64 [batches, batch]: equal batches."""
    samples = torch.cat(list(shards))
    batches, batch = RECALIBRATION
    batch = min(batch, len(samples))
    batches = min(batches, len(samples) // batch)
    order = shuffled(hash64(_STREAM, seed).reshape(1), len(samples))[0]
    return samples[order[: batches * batch]].reshape(batches, batch)


def recalibrated(
    model: FlatModel, task: Task, x: Tensor, buffers: Tensor, batches: Tensor
) -> Tensor:
    """`buffers` [B] with BatchNorm's statistics anew, those of x [D] on the training `batches`.

    Each running mean and variance becomes the mean over the batches of its input's, taken in
    training mode: what torch.optim.swa_utils.update_bn does. Other buffers stay as they are, and
    so does all that the module holds itself.
    """
    norms = {
        name: module
        for name, module in model.module.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return buffers
    fresh, result = buffers.clone(), buffers.clone()
    views = model.buffers.views(fresh)
    counters = {name: counter.clone() for name, counter in model.counters().items()}
    statistics = []
    for name in norms:
        prefix = f"{name}." if name else ""
        counters[
            f"{prefix}num_batches_tracked"
        ].zero_()  # so the first batch replaces what is there
        statistics += [f"{prefix}running_mean", f"{prefix}running_var"]
    momenta = {name: module.momentum for name, module in norms.items()}
    try:
        for module in norms.values():
            module.momentum = None  # torch's word for a cumulative average
        with torch.no_grad():
            for number, indices in enumerate(batches):
                *inputs, _ = model.cast(fetch(task.train, indices))
                seed_generators(number, model.device)
                model(model.parameters.views(x), views | counters, inputs)
    finally:
        for name, module in norms.items():
            module.momentum = momenta[name]
    into = model.buffers.views(result)
    for name in statistics:
        into[name].copy_(views[name])
    return result
