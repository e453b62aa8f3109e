"""D2, also Exact Diffusion: gossip with a correction that removes its bias."""

from decentral.replica import Replica


class D2:
    """The last step's change is carried over, which cancels the heterogeneity of the data.

        psi^k   = x^k - gamma g^k
        x^{k+1} = W (psi^k + x^k - psi^{k-1}),    x^1 = W psi^0

    which with plain SGD is x^{k+1} = W (2 x^k - x^{k-1} - gamma (g^k - g^{k-1})). State: D floats.

    Source: Tang et al. 2018 (arXiv 1803.07068); Yuan et al. 2019, Exact Diffusion. The same
    traffic as gossip. Not for time-varying W.
    """

    equation = "x <- W (2 x - x_old - gamma (g - g_old))"
    source = "Tang et al. 2018, arXiv 1803.07068"
    sends = "D to each neighbour"
    requires = "symmetric, eigenvalues above -1/3"
    holds = "D"
    starts_anew = True

    def step(self, replica: Replica) -> None:
        before = replica.x.clone()
        replica.local_step()
        adapted = replica.x.clone()
        if replica.state:
            replica.x += before - replica.state["adapted"]
        replica.state["adapted"] = adapted
        replica.average()
