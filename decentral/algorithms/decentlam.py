"""DecentLaM: momentum on the gradient that the averaged step amounts to."""

import torch

from decentral.replica import Replica


class DecentLaM:
    """Momentum without the bias that it amplifies in plain decentralised momentum SGD.

        gt = (x - W (x - gamma g)) / gamma
        m  <- beta m + gt
        x  <- x - gamma m

    It brings its own momentum: the local optimizer is plain SGD. State: D floats.

    Source: Yuan et al. 2021 (arXiv 2104.11981). Prefer it at large batches.
    """

    equation = "gt = (x - W (x - gamma g)) / gamma;  m <- beta m + gt;  x <- x - gamma m"
    source = "Yuan et al. 2021, arXiv 2104.11981"
    sends = "D to each neighbour"
    requires = "doubly stochastic"
    holds = "D"
    plain_sgd = True

    def __init__(self, beta: float):
        self.beta = beta

    def step(self, replica: Replica) -> None:
        before, lr = replica.x.clone(), replica.lr
        momentum = replica.state.setdefault("momentum", torch.zeros_like(before))
        replica.local_step()
        replica.average()
        momentum.mul_(self.beta).add_((before - replica.x) / lr)
        replica.x.copy_(before).sub_(momentum, alpha=lr)
