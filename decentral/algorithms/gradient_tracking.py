"""Gradient tracking: each worker follows an estimate of everyone's mean gradient."""

from decentral.replica import Replica


class GradientTracking:
    """DSGT: y_i tracks (1/n) sum_j g_j, which removes the bias of heterogeneous data.

        x^{k+1} = W(k) (x^k - gamma y^k)
        y^{k+1} = W(k) y^k + g^{k+1} - g^k,    y^0 = g^0

    With a doubly stochastic W the mean of y is the mean of g at every step. With a period, x and
    y are both averaged globally: GT-PGA. The local optimizer steps along y. State: 2 D floats.

    Source: Pu and Nedic 2021 (arXiv 1805.11454), adapt-then-combine in x; with periodic averages
    GT-PGA, 2024. Prefer it where data differ much between workers and its double traffic is cheap.
    """

    equation = "x <- W (x - gamma y);  y <- W y + g_new - g_old"
    source = "Pu and Nedic 2021, arXiv 1805.11454"
    sends = "2 D to each neighbour"
    requires = "doubly stochastic"
    holds = "2 D"
    starts_anew = True

    def step(self, replica: Replica) -> None:
        state = replica.state
        gradient = replica.gradient()
        if state:
            tracker = state["mixed_tracker"] + gradient - state["gradient"]
        else:
            tracker = gradient.clone()
        replica.descend(tracker)
        replica.average()
        replica.mix_(tracker)
        state["mixed_tracker"], state["gradient"] = tracker, gradient.clone()
