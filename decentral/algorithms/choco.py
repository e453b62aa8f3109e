"""CHOCO-SGD: gossip of compressed differences that still converges to the mean."""

import torch

from decentral.replica import Averaging, Compressor, Replica


class Choco:
    """Workers keep public copies xhat of each other and send compressed corrections to them.

        x    <- x - gamma g
        q    = Q(x - xhat),    xhat <- xhat + q        (q alone is sent)
        x_i  <- x_i + gamma_c sum_j W_ij (xhat_j - xhat_i)

    A worker holds its own xhat and sum_j W_ij xhat_j, which it updates from what it hears: 2 D
    floats of state whatever the degree. A global average leaves the copies as they are.

    Source: Koloskova et al. 2019 (arXiv 1902.00340), algorithm 2. Asks for a static W.
    """

    equation = "q = Q(x - xhat);  xhat <- xhat + q;  x <- x + gamma_c (W xhat - xhat)"
    source = "Koloskova et al. 2019, arXiv 1902.00340"
    sends = "Q(D) to each neighbour"
    requires = "doubly stochastic, static"
    holds = "2 D"
    starts_anew = True

    def __init__(self, compressor: Compressor, consensus_step: float):
        self.compressor = compressor
        self.consensus_step = consensus_step

    def step(self, replica: Replica) -> None:
        x = replica.x
        public = replica.state.setdefault("public", torch.zeros_like(x))
        heard = replica.state.setdefault("heard", torch.zeros_like(x))
        replica.local_step()
        if replica.averaging is Averaging.EVERYONE:
            replica.average()
            return
        replica.record(x)
        message = self.compressor.encode(x - public, replica.key())
        public += self.compressor.decode(message, x)
        heard += replica.mixed(message, lambda m: self.compressor.decode(m, x))
        x.add_(heard - public, alpha=self.consensus_step)
        replica.mix_(replica.shared_buffers)
