"""Parallel SGD: the gradient averaged over all workers at every step, as DDP does."""

from decentral.replica import Replica


class Parallel:
    """Every worker applies the mean of all gradients, so all replicas stay equal.

        x^{k+1} = x^k - gamma * (1/n) sum_j g_j(x^k)

    The same as averaging the models at every step (W = J) when the local optimizer is linear in
    the gradient; not for Adam. Float buffers (BatchNorm statistics) are averaged too.

    An all-reduce of D floats a step. Asks nothing of a topology.
    """

    equation = "x <- x - gamma (1/n) sum_j g_j(x)"
    source = "DistributedDataParallel: Li et al. 2020, arXiv 2006.15704"
    sends = "all-reduce of D"
    requires = None
    one_model = True

    def step(self, replica: Replica) -> None:
        gradient = replica.gradient()
        replica.mean_(gradient)
        replica.descend(gradient)
        replica.mean_(replica.shared_buffers)
        replica.average()
