"""NoLoCo: DiLoCo without an all-reduce, the outer step taken with a neighbour or few."""

import torch

from decentral.replica import Averaging, Replica


class NoLoCo:
    """Workers train alone; at every H-th step they average with neighbours, random pairs as a rule.

    theta is the model that trains, phi the slow model (theta at the start), M the average over
    the neighbours that W(k) gives (over the pair, in a matching):

        theta <- theta - gamma g(theta)                         at every step
        m     <- alpha m + lr M(theta - phi) + lr (M(phi) - phi)
        phi   <- phi + m,    theta <- phi                       at every H-th

    The last term draws the slow models together, which no all-reduce does here. With alpha 0 and
    lr 1 it is theta <- M theta, gossip at every H-th step. 2 D floats to each neighbour, every H
    steps. State: 2 D floats.

    Source: Kolehmainen et al. 2025 (arXiv 2506.10911): H 50, lr 0.7, alpha 0.5, AdamW inside.
    """

    equation = "m <- alpha m + lr (W theta - phi);  phi <- phi + m;  theta <- phi, every H steps"
    source = "Kolehmainen et al. 2025, arXiv 2506.10911"
    sends = "2 D to each neighbour, every H steps"
    requires = "doubly stochastic"
    holds = "2 D"

    def __init__(self, lr: float, momentum: float):
        self.lr, self.momentum = lr, momentum

    def step(self, replica: Replica) -> None:
        theta, state = replica.x, replica.state
        if not state:
            state["slow"], state["momentum"] = theta.clone(), torch.zeros_like(theta)
        replica.local_step()
        replica.record(theta)
        if replica.averaging is Averaging.NOBODY:
            return
        slow, momentum = state["slow"], state["momentum"]
        both = torch.cat([theta - slow, slow], dim=-1)
        replica.mix_(both)
        moved, drawn = both.chunk(2, dim=-1)
        momentum.mul_(self.momentum).add_(moved + drawn - slow, alpha=self.lr)
        slow += momentum
        theta.copy_(slow)
        replica.mix_(replica.shared_buffers)
