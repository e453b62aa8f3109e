"""The synthetic logistic regression on which decentralised methods are compared."""

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from decentral.tasks.task import Task


class Direction(nn.Module):
    """One weight vector w [D] and no bias: the score h'w of features h."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight


def logistic(
    workers: int,
    seed: int,
    *,
    dim: PositiveInt = 10,
    samples_per_worker: PositiveInt = 8000,
    iid: bool = False,
) -> Task:
    """Worker i minimises f_i(x) = mean_m ln(1 + exp(-y_im h_im'x)) over its samples m.

    h ~ N(0, 10 I) [dim]; y = +1 with probability 1 / (1 + exp(-h'x_i*)), else -1, with
    x_i* ~ N(0, I) the worker's own, or, if `iid`, one for all. Start at zero.
    The setting of Chen et al., "Accelerating gossip SGD with periodic global averaging", ICML 2021
    (arXiv 2105.09080); the law of x* is this project's choice.

    The data, float64, of worker i is a function of (seed, i) alone: a run with more workers only
    adds to it. The models are evaluated on the training data: the objective itself.
    """
    features = np.empty((workers, samples_per_worker, dim))
    signs = np.empty((workers, samples_per_worker))
    shared = np.random.default_rng([seed, 0, 1]).standard_normal(dim)
    for i in range(workers):
        rng = np.random.default_rng([seed, i])
        own = rng.standard_normal(dim)  # drawn in either case: `iid` changes the labels alone
        features[i] = np.sqrt(10.0) * rng.standard_normal((samples_per_worker, dim))
        score = features[i] @ (shared if iid else own)
        # y = +1 where a standard logistic variable, the logit of a uniform one, is below the score.
        signs[i] = np.where(rng.logistic(size=samples_per_worker) < score, 1.0, -1.0)
    data = (torch.from_numpy(features).flatten(0, 1), torch.from_numpy(signs).flatten())
    return Task(
        model=Direction(dim),
        loss=logistic_loss,
        train=data,
        test=data,
        shards=torch.arange(workers * samples_per_worker).split(samples_per_worker),
        accuracy=sign_accuracy,
    )


def logistic_loss(score: Tensor, sign: Tensor) -> Tensor:
    """Mean of ln(1 + exp(-sign score)); softplus does not overflow."""
    return functional.softplus(-sign * score).mean()


def sign_accuracy(score: Tensor, sign: Tensor) -> Tensor:
    """The fraction of scores on the side of their sign +1 or -1; a score of zero is wrong."""
    return (score * sign > 0).to(torch.float32).mean()
