"""Combine-then-adapt: an average, and a local step with the gradient from before it."""

from decentral.replica import Replica


class CombineThenAdapt:
    """Each worker averages its model along W(k), and applies the gradient taken before that.

        x_i^{k+1} = sum_j W(k)_ij x_j^k - gamma * g(x_i^k)

    The exchange waits for no gradient and the gradient for no exchange: they go on at once, and a
    step takes the longer of the two. Float buffers go the same way: what is averaged is what they
    were before the gradient, which then adds its change. Mixes less than adapt-then-combine: the
    last gradient is not averaged.

    Source: Lian et al. 2017 (arXiv 1705.09056), algorithm 1.
    """

    equation = "x <- W x - gamma g(x)"
    source = "Lian et al. 2017, arXiv 1705.09056"
    sends = "D to each neighbour"
    requires = "doubly stochastic"
    overlaps = True

    def step(self, replica: Replica) -> None:
        finish_average = replica.start_average()
        local_step = replica.start_local_step()
        finish_average()
        local_step()
