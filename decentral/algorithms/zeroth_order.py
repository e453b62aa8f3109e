"""Zeroth-order SGD: the step is taken from losses alone, and scalars are all that is sent."""

import torch
from torch import Tensor

from decentral.draws import hash64, normal
from decentral.replica import Replica


class ZerothOrder:
    """Central differences along R random directions that all workers share.

        u_r ~ N(0, I),  r = 1 .. R         (from seed and step: nobody sends them)
        c_ir = (F_i(x + mu u_r) - F_i(x - mu u_r)) / (2 mu)
        x   <- x - gamma (1/R) sum_r cbar_r u_r,    cbar_r = (1/n) sum_i c_ir

    Both losses of a difference are of the same batch and the same dropout. E[c u] is the gradient
    of the smoothed E F(x + mu u), the gradient of F itself where F is quadratic; its variance
    grows with D / R, and so must gamma fall. All replicas stay equal. The losses recorded are the
    mean of the 2 R. Every u_r is drawn three times, so that one is in memory at a time. F may be
    the mean of accumulated batches; there is no gradient of a worker to clip.

    An all-reduce of R floats a step, and of the float buffers where a model has them. Asks
    nothing of a topology. The clock reckons with 2 R forward passes a step.

    Source: Nesterov and Spokoiny 2017 (two-point Gaussian smoothing); over many workers that
    answer with losses alone, Shu et al. 2023 (arXiv 2308.04077). Prefer it where a model gives no
    gradient, or where hardly anything can be sent.
    """

    equation = (
        "c_r = (F(x + mu u_r) - F(x - mu u_r)) / 2 mu;  x <- x - gamma (1/R) sum_r cbar_r u_r"
    )
    source = "Nesterov and Spokoiny 2017; over many workers: Shu et al. 2023, arXiv 2308.04077"
    sends = "all-reduce of R"
    requires = None
    one_model = True

    def __init__(self, directions: int, mu: float):
        self.directions = directions
        self.mu = mu

    @property
    def evaluations(self) -> int:
        return 2 * self.directions

    def step(self, replica: Replica) -> None:
        x, before = replica.x, replica.x.clone()
        slopes, losses = [], []
        for r in range(self.directions):
            x.add_(self.direction(replica, r), alpha=self.mu)
            above = replica.losses()
            x.copy_(before).sub_(self.direction(replica, r), alpha=self.mu)
            below = replica.losses()
            x.copy_(before)
            slopes.append((above - below) / (2 * self.mu))
            losses.append((above + below) / 2)
        replica.count(torch.stack(losses).mean(0))
        slope = torch.stack(slopes, dim=-1)  # [..., R]
        replica.mean_(slope)
        gradient = torch.zeros_like(x)
        for r in range(self.directions):
            gradient.addcmul_(slope[..., r, None], self.direction(replica, r))
        replica.descend(gradient.div_(self.directions))
        replica.mean_(replica.shared_buffers)
        replica.average()

    def direction(self, replica: Replica, r: int) -> Tensor:
        """u_r of this step, [D], the same on all workers."""
        x = replica.x
        return normal(hash64(replica.shared_key(), r), x.shape[-1], x.dtype)
