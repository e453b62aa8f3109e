"""Stochastic gradient push: gossip on directed graphs, where no W is doubly stochastic."""

import torch

from decentral.replica import Replica


class PushSum:
    """Each worker splits its mass among those that hear it; a weight tells how much it holds.

        x_half = x - gamma g(z)
        (x, w) <- P (x_half, w),    w^0 = 1
        z      = x / w

    P is column-stochastic: it keeps the sum, and x / w converges to the mean. The model that
    trains, and is evaluated, is z; float buffers go with it, as sums of w times their values.
    State: one float.

    Source: Assran et al. 2019 (arXiv 1811.10792), algorithm 1. Prefer it on directed graphs that
    are not regular; on others it is gossip with one float more.
    """

    equation = "(x, w) <- P (x - gamma g(z), w);  z = x / w"
    source = "Assran et al. 2019, arXiv 1811.10792"
    sends = "D + 1 to each neighbour"
    requires = "column-stochastic"
    holds = "1"
    starts_anew = True

    def step(self, replica: Replica) -> None:
        z = replica.x
        weight = replica.state.setdefault("weight", torch.ones_like(z[..., :1]))
        local_step = replica.start_local_step()
        z.mul_(weight)  # x, until the division below
        local_step()
        replica.record(z / weight)
        buffers = replica.shared_buffers
        mass = torch.cat([z, weight * buffers, weight], dim=-1)
        replica.mix_(mass)
        x, sums, held = mass.split([z.shape[-1], buffers.shape[-1], 1], dim=-1)
        weight.copy_(held)
        torch.div(x, weight, out=z)
        torch.div(sums, weight, out=buffers)
