"""QG-DSGDm: momentum from what the model did, not from what its own gradient said."""

import torch

from decentral.replica import Replica


class QuasiGlobalMomentum:
    """The momentum buffer follows the change of the averaged model.

        x_half = x - gamma (beta m + g)
        x_new  = W x_half
        m      <- mu m + (1 - mu) (x - x_new) / gamma

    It brings its own momentum: the local optimizer is plain SGD. State: D floats.

    Source: Lin et al. 2021 (arXiv 2102.04761), algorithm 1. Prefer it over local momentum where
    data differ much between workers.
    """

    equation = "x_new = W (x - gamma (beta m + g));  m <- mu m + (1 - mu) (x - x_new) / gamma"
    source = "Lin et al. 2021, arXiv 2102.04761"
    sends = "D to each neighbour"
    requires = "doubly stochastic"
    holds = "D"
    plain_sgd = True

    def __init__(self, beta: float, mu: float):
        self.beta, self.mu = beta, mu

    def step(self, replica: Replica) -> None:
        before, lr = replica.x.clone(), replica.lr
        momentum = replica.state.setdefault("momentum", torch.zeros_like(before))
        replica.descend(self.beta * momentum + replica.gradient())
        replica.average()
        momentum.mul_(self.mu).add_((before - replica.x) / lr, alpha=1 - self.mu)
