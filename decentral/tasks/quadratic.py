"""Quadratic objectives with a known optimum: for closed forms and for watching bias and noise."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from decentral.tasks.task import Task


class Point(nn.Module):
    """The iterate x [D], read as sqrt(a) x, so that half a squared distance is the objective."""

    def __init__(self, dim: int):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dim))

    def forward(self, root_curvature: Tensor) -> Tensor:
        return root_curvature * self.x


def quadratic(
    workers: int,
    seed: int,
    *,
    dim: PositiveInt = 10,
    samples_per_worker: PositiveInt = 100,
    heterogeneity: NonNegativeFloat = 1.0,
    noise: NonNegativeFloat = 1.0,
    condition: Annotated[float, Field(ge=1)] = 10.0,
    curvature_spread: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Task:
    """Worker i minimises f_i(x) = 1/2 sum_d a_id mean_m (x_d - c_imd)^2 over its samples m.

    c_im = 1 + heterogeneity * u_i + noise * v_im, with u_i and v_im standard normal [dim]: the
    start is 0 and, by and large, the optimum 1. heterogeneity and noise are the standard
    deviations of the workers' and of the samples' centres.
    a_id = alpha_d (1 + curvature_spread * s_id), alpha from 1 down to 1/condition geometrically,
    s_id uniform on [-1, 1]: SGD is stable for lr < 2 / (1 + curvature_spread). Only where
    curvatures differ between workers does gossip with a constant step size move the mean away
    from the optimum; without, it is unbiased.

    A sample is (sqrt(a_i), sqrt(a_i) c_im), float64, and a function of (seed, worker, sample)
    alone. `optimum` is exact for the samples drawn: sum_i a_i mean_m c_im / sum_i a_i. The models
    are evaluated on the training data: the objective, whose least value is not zero.
    """
    alpha = condition ** -np.linspace(0.0, 1.0, dim) if dim > 1 else np.ones(1)
    root_curvature = np.empty((workers, dim))
    scaled_centres = np.empty((workers, samples_per_worker, dim))
    for i in range(workers):
        rng = np.random.default_rng([seed, i])
        curvature = alpha * (1 + curvature_spread * rng.uniform(-1, 1, dim))
        centre = 1 + heterogeneity * rng.standard_normal(dim)
        centres = centre + noise * rng.standard_normal((samples_per_worker, dim))
        root_curvature[i] = np.sqrt(curvature)
        scaled_centres[i] = root_curvature[i] * centres

    pull = (root_curvature * scaled_centres.mean(axis=1)).sum(axis=0)
    data = (
        torch.from_numpy(root_curvature).repeat_interleave(samples_per_worker, dim=0),
        torch.from_numpy(scaled_centres).flatten(0, 1),
    )
    return Task(
        model=Point(dim),
        loss=half_squared_distance,
        train=data,
        test=data,
        shards=torch.arange(workers * samples_per_worker).split(samples_per_worker),
        optimum=torch.from_numpy(pull / (root_curvature**2).sum(axis=0)),
    )


def half_squared_distance(output: Tensor, target: Tensor) -> Tensor:
    """1/2 ||output - target||^2 over the last axis, mean over the batch."""
    return 0.5 * (output - target).square().sum(dim=-1).mean()
