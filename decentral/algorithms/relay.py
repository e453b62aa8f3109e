"""RelaySGD: models relayed along a tree, each reaching every worker once, late but whole."""

import torch

from decentral.replica import Averaging, Replica


class Relay:
    """On a tree, i tells neighbour j the sum of the models on its own side of the link.

        x_i^{k+1/2} = x_i^k - gamma g_i
        m_{i->j}    = x_i^{k+1/2} + sum over neighbours l other than j of m_{l->i} of step k-1
        x_i^{k+1}   = (1/n) ((n - c_i) x_i^{k+1/2} + sum_l m_{l->i}),    c_i the models in the sum

    So the model of a worker at distance d counts with weight 1/n as it was d-1 steps ago; where
    none has come yet, a worker's own stands in. A message carries its count. A global average
    starts the relay anew. State: D + 1 floats a neighbour. Buffers are gossiped.

    Source: Vogels et al. 2021 (arXiv 2110.04175), algorithm 1. Prefer it where data differ much
    and the graph is sparse, such as a chain of machines; delays grow with the tree's diameter.
    """

    equation = "x <- ((n - c) x_half + sum_l m_l) / n;  m_{i->j} = x_half + sum_{l != j} m_l"
    source = "Vogels et al. 2021, arXiv 2110.04175"
    sends = "D + 1 to each neighbour"
    requires = "tree"
    holds = "D + 1 for each neighbour"
    starts_anew = True

    def step(self, replica: Replica) -> None:
        x, state = replica.x, replica.state
        replica.local_step()
        if replica.averaging is not Averaging.NEIGHBOURS:
            replica.average()
            state.pop("heard", None)
            return
        replica.record(x)
        dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype  # of sums, and of counts
        own = torch.cat([x.to(dtype), torch.ones_like(x[..., :1], dtype=dtype)], dim=-1)
        if "heard" not in state:
            state["heard"] = torch.zeros_like(replica.comm.spread(own))
        known = own + replica.comm.collect(state["heard"])
        heard = replica.swap(replica.comm.spread(known) - state["heard"])
        total, count = replica.comm.collect(heard).tensor_split([x.shape[-1]], dim=-1)
        n = replica.comm.n
        x.copy_(((n - count) * x + total) / n)
        state["heard"] = heard
        replica.mix_(replica.shared_buffers)
