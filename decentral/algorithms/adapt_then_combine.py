"""Adapt-then-combine: a local step, then an average. The rule of Local SGD and of gossip SGD."""

from decentral.replica import Replica


class AdaptThenCombine:
    """Each worker takes a local optimizer step on its own batch, then averages along W(k).

        x_i^{k+1/2} = x_i^k - gamma * g(x_i^k)
        x_i^{k+1}   = sum_j W(k)_ij x_j^{k+1/2}

    W(k) = I between the averages of Local SGD; W of the topology for gossip; J = 11'/n at a
    global average. With momentum (or any state of the optimizer) the models alone are averaged:
    the state stays local.

    Source: Chen et al. 2021 (arXiv 2105.09080), section 3, and for gossip Lian et al. 2017.
    Sends D floats to each neighbour, or takes part in an all-reduce of D floats.
    Asks of W: doubly stochastic.
    """

    equation = "x <- W (x - gamma g(x))"
    source = "Chen et al. 2021, arXiv 2105.09080"
    sends = "D to each neighbour"
    requires = "doubly stochastic"

    def step(self, replica: Replica) -> None:
        replica.local_step()
        replica.average()
