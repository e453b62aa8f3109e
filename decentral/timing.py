"""How long one worker's local step takes on this machine: what the clock reckons with."""

import copy
import statistics
import time

import torch

from decentral.experiment import Experiment
from decentral.gradients import FlatModel, ModuleGradient

WARM_UP = 2
REPEATS = 5


def step_seconds(experiment: Experiment, device: str = "cpu") -> float:
    """Median seconds of a step's batches drawn, their gradient and an optimizer step, on a copy.

    Of a method without gradients, its losses in their place.
    """
    model = FlatModel(copy.deepcopy(experiment.task.model), experiment.dtype, device)
    options = experiment.config.gradient.model_dump()
    compiled = experiment.config.engine == "ray" and experiment.config.ray.compile
    gradient = ModuleGradient(
        model, experiment.task, experiment.sampler([0]), **options, compiled=compiled
    )
    evaluations = experiment.algorithm.evaluations
    x = gradient.parameters
    stepper = experiment.make_optimizer([x])
    x.grad = gradient.value
    seconds = []
    with torch.random.fork_rng(devices=[]):
        for step in range(WARM_UP + REPEATS):
            start = time.perf_counter()
            for _ in range(evaluations):
                gradient.losses(step)
            if not evaluations:
                gradient(step)
            stepper.step()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])
