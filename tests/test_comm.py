"""Both sides of the door to the network do the same mixing, and count the same bytes."""

import numpy as np
import pytest
import torch
from processes import run_on_ranks

from decentral import topology as topologies
from decentral.comm import StackedComm, all_reduce_bytes
from decentral.mixing import Mixing
from decentral.peer import PeerComm

CASES = [
    ("ring", {}),
    ("path", {}),
    ("star", {}),
    ("complete", {}),
    ("exponential", {}),
    ("one_peer_exponential", {}),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def start(n, dtype):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 7, generator=generator, dtype=torch.float64).to(dtype)


def twice(message):
    """What a code that is shorter than its values stands for."""
    return torch.cat([message, 2 * message, message], dim=-1)


def mixed(comm, x, step):
    """In place; or a copy, while the tensor itself changes, whose change is taken off again."""
    if step == 0:
        comm.mix_(x, step)
        return x
    changed = x.clone()
    finish = comm.start_mix_(x, step)
    changed += 1
    finish(changed)
    return changed - 1


def mix_on_peer(rank, n):
    """Two steps of every case and dtype, and a mean, as this rank sees them."""
    seen = {}
    for name, options in CASES:
        for dtype in DTYPES:
            comm = PeerComm(Mixing(topologies.build(n, name, **options)))
            x = start(n, dtype)[rank].clone()
            for step in range(2):  # less than a period: circulant matrices commute
                x = mixed(comm, x, step).to(dtype)
            mean = comm.mean(x, 3)
            uncounted = comm.mean(x, 3, counted=False)
            assert torch.equal(mean, uncounted)
            x = comm.mix(x[:2], 5, twice).to(dtype)
            seen[name, str(dtype)] = (
                x.double().numpy(),
                torch.stack([mean, comm.least(start(n, dtype)[rank], 4)]).double().numpy(),
                comm.bytes_sent,
                list(comm.events),
            )
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 5])
def test_stacked_and_peer_mixing_agree(n):
    seen = run_on_ranks(n, mix_on_peer, n)
    for name, options in CASES:
        topology = topologies.build(n, name, **options)
        for dtype in DTYPES:
            comm = StackedComm(n, Mixing(topology), dtype)
            x = start(n, dtype)
            for step in range(2):
                x = mixed(comm, x, step).to(dtype)
            mean = comm.mean(x, 3)[0]
            x = comm.mix(x[:, :2], 5, twice).to(dtype)
            both = torch.stack([mean, comm.least(start(n, dtype), 4)[0]])
            tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
            for rank in range(n):
                peer_x, peer_both, _, events = seen[rank][name, str(dtype)]
                np.testing.assert_allclose(peer_x, x[rank].double(), atol=tolerance)
                np.testing.assert_allclose(peer_both, both.double(), atol=tolerance)
                assert events == comm.events
            assert sum(seen[rank][name, str(dtype)][2] for rank in range(n)) == comm.bytes_sent


@pytest.mark.parametrize("name", ["ring", "exponential", "one_peer_exponential"])
def test_stacked_mixing_is_the_matrix_product_of_its_step(name):
    topology = topologies.build(5, name)
    comm = StackedComm(5, Mixing(topology), torch.float64)
    x = start(5, torch.float64)
    for step in range(4):
        expected = topology.matrix(step).toarray() @ x.numpy()
        x = comm.mix(x, step)
        np.testing.assert_allclose(x, expected, atol=1e-15)


def test_bytes_are_those_of_the_messages():
    comm = StackedComm(6, Mixing(topologies.build(6, "ring")), torch.float32)
    x = torch.zeros(6, 10)
    comm.mix(x, 0)
    assert comm.bytes_sent == 6 * 2 * 40  # six workers, two neighbours each, ten floats
    comm.mean(x, 1)
    assert comm.bytes_sent == 480 + 2 * 5 * 40  # a ring all-reduce: 2 (n-1) messages' worth
    comm.mean(x, 2, counted=False)
    assert comm.bytes_sent == 880
    comm.least(x, 3)
    assert comm.bytes_sent == 880 + 2 * 5 * 40
    assert all_reduce_bytes(40, 1) == 0
