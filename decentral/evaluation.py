"""Evaluation of a model given as flat vectors, one or many at a time. Both engines call it.

It runs in the run's dtype, whatever the training's autocast. `averaged_buffers` is what goes with
averaged parameters where a model is evaluated or saved.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from decentral.comm import accumulation_dtype
from decentral.draws import hash64, shuffled
from decentral.experiment import Experiment
from decentral.gradients import FlatModel, seed_generators
from decentral.tasks import Data, Task, fetch, length

BATCH = 512  # samples a pass, at least
RECALIBRATION = (8, 256)  # batches and samples a batch, at most, for BatchNorm's statistics
_STREAM = int.from_bytes(b"recalibr", "little")
# Test samples on which a worker's own model is evaluated, at most. Where a task has more of them
# with more workers, all models on all of them would take longer than the run.
OWN_SAMPLES = 10_000
# Models x samples a pass: about so much memory of activations, and no fewer or more than these.
PASS_BYTES = 2**25
LEAST, MOST = 2**15, 2**18

Figure = Callable[[Tensor, Tensor], Tensor]  # of output and target, a mean over samples, []


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
    """Evaluate one model, x [D] and buffers [B].

    On the test set, or on the training samples of the indices `held_out` [v].
    """
    data = task.test if held_out is None else task.train
    assert data is not None, "a task without a test set has nothing to evaluate"
    samples = torch.arange(length(data)) if held_out is None else held_out
    figures = [task.loss] if task.accuracy is None else [task.loss, task.accuracy]
    found = _means(model, data, samples, x.unsqueeze(0), buffers.unsqueeze(0), figures)
    loss, *accuracy = found[:, 0].tolist()
    return Evaluation(loss, accuracy[0] if accuracy else None)


def accuracies(
    model: FlatModel, task: Task, x: Tensor, buffers: Tensor, workers: Sequence[int]
) -> Tensor:
    """Of the models of these m workers, x [m, D] and buffers [m, B]: [m] in float64.

    On the test set. Of one of more than OWN_SAMPLES each worker has every s-th sample, s as small
    as can be: worker i from sample i mod s on, so that workers do not all have the same.
    """
    assert task.accuracy is not None, "a task without one has nothing to say here"
    assert task.test is not None, "a task without a test set has nothing to evaluate"
    samples = length(task.test)
    stride = math.ceil(samples / OWN_SAMPLES)
    first = torch.tensor(workers) % stride
    found = torch.empty(len(x), dtype=torch.float64)
    for start in first.unique().tolist():
        rows = (first == start).nonzero().flatten().to(x.device)
        models = (x, buffers) if len(rows) == len(x) else (x[rows], buffers[rows])
        part = torch.arange(start, samples, stride)
        found[rows.cpu()] = _means(model, task.test, part, *models, [task.accuracy])[0]
    return found


def _means(
    model: FlatModel,
    data: Data,
    samples: Tensor,
    x: Tensor,
    buffers: Tensor,
    figures: Sequence[Figure],
) -> Tensor:
    """Each figure of each of m models, its mean over those samples: [figures, m] in float64."""
    models = len(x) if model.takes_vmap else 1
    at_once = LEAST
    if model.sample_bytes:
        at_once = min(MOST, max(LEAST, PASS_BYTES // model.sample_bytes))
    batch = max(BATCH, at_once // models)
    every = torch.arange(len(x), device=x.device)
    sums = torch.zeros(len(figures), len(x), dtype=torch.float64, device=x.device)
    model.module.eval()
    try:
        for indices in samples.split(batch):
            *inputs, target = model.cast(fetch(data, indices))
            for rows in every.split(max(1, at_once // len(indices))):
                found = _figures(model, figures, x[rows], buffers[rows], inputs, target)
                sums[:, rows] += found.to(sums) * len(indices)
    finally:
        model.module.train()
    return sums.cpu() / len(samples)


def _figures(
    model: FlatModel,
    figures: Sequence[Figure],
    x: Tensor,
    buffers: Tensor,
    inputs: list[Tensor],
    target: Tensor,
) -> Tensor:
    """Each figure of each model on the same samples: [figures, m]."""

    def of(x: Tensor, buffers: Tensor) -> Tensor:
        output = model(model.parameters.views(x), model.buffers.views(buffers), inputs)
        values = [figure(output, target) for figure in figures]
        return torch.stack([value.to(accumulation_dtype(x.dtype)) for value in values])

    with torch.no_grad():
        if model.takes_vmap and len(x) > 1:
            return vmap(of, out_dims=1, randomness="different")(x, buffers)
        return torch.stack([of(*row) for row in zip(x, buffers, strict=True)], dim=1)


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
