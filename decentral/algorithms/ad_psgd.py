"""AD-PSGD: nobody waits for gradients; neighbours average in pairs while they compute."""

from torch import Tensor

from decentral.asynchronous import AsynchronousRule, OwnModel


class ADPSGD(AsynchronousRule):
    """Two neighbours that meet average their models; a gradient is applied when it is done.

        on a meeting of i and j:    x_i, x_j <- (x_i + x_j) / 2
        on a gradient:              x_i <- x_i - gamma g(x_i as it was when the gradient began)

    A meeting keeps the sum of the models, whatever the workers do meanwhile: each adds half the
    difference that both saw as they met. A slow worker holds up nobody. Pairs are random maximal
    matchings of the graph, `exchanges` rounds a step.

    Source: Lian et al. 2018 (arXiv 1710.06952), algorithm 1. Prefer it where workers' speeds
    differ or vary much.
    """

    equation = "x_i, x_j <- (x_i + x_j) / 2 when they meet;  x <- x - gamma g(x of its start)"
    source = "Lian et al. 2018, arXiv 1710.06952"
    sends = "D to one neighbour, in each round of exchanges"
    requires = "undirected, static"
    holds = "D"

    def __init__(self, exchanges: float):
        self.exchanges = exchanges

    def adapt(self, own: OwnModel, gradient: Tensor, time: float) -> None:
        own.descend(gradient)

    def meet(self, own: OwnModel, difference: Tensor, time: float) -> None:
        own.x.add_(difference, alpha=0.5)
