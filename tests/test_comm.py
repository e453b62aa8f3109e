"""Both sides of the door to the network do the same mixing, and count the same bytes."""

from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decentral import comm as door
from decentral import peer as own_door
from decentral import topology as topologies
from decentral.comm import StackedComm, all_reduce_bytes
from decentral.exchange import Exchange, pieces_of
from decentral.mixing import Mixing
from decentral.peer import Patience, PeerComm
from decentral.replica import squared_distance

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


def mix_on_peer(rank, n, piece):
    """Two steps of every case and dtype, and a mean, as this rank sees them."""
    ahead = own_door.PIECES_AHEAD if rank else 1  # each end has its own
    with mock.patch.multiple(own_door, PIECE_BYTES=piece, PIECES_AHEAD=ahead):
        return mix_every_case(rank, n)


def mix_every_case(rank, n):
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
@pytest.mark.parametrize(("n", "piece"), [(1, 24), (2, own_door.PIECE_BYTES), (5, 24)])
def test_stacked_and_peer_mixing_agree(n, piece):
    seen = run_on_ranks(n, mix_on_peer, n, piece)
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


def mix_with_one_that_leaves(rank):
    """On a path, in pieces of 3 elements of 7: worker 1 trades two of the three, and no more.

    What a worker thinks of it, and how far off what it held before it ends.
    """
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        part = torch.ones(3, dtype=torch.float64)
        calls = [dist.irecv, dist.irecv, dist.isend, dist.isend]
        works = [call(part.clone(), other) for other in (0, 2) for call in calls]
        for work in works:
            assert work is not None
            work.wait()
        store.wait(["gone on 0", "gone on 2"])
        return None
    comm = PeerComm(Mixing(topologies.build(3, "path")), patience=Patience(1.0, 1.0))
    comm.carries_on = True
    x = start(3, torch.float64)[rank]
    own = x if rank == 0 else x + 1
    before = own.clone()
    with mock.patch.object(own_door, "PIECE_BYTES", 24):
        comm.start_mix_(x, 0)(own)
    store.set(f"gone on {rank}", "")
    assert comm.failure is not None
    return comm.failure.peer, comm.bytes_sent, float((own - before).abs().max())


@pytest.mark.slow
def test_a_failure_among_the_last_pieces_leaves_nothing_mixed():
    ends = run_on_ranks(3, mix_with_one_that_leaves)
    assert ends == [(1, 0, 0.0), None, (1, 0, 0.0)]


@pytest.mark.parametrize(("ahead", "sent"), [(1, [1, 2, 3, 4, 4]), (3, [3, 4, 4, 4, 4])])
def test_so_many_pieces_are_on_their_way_out_and_no_more(ahead, sent, monkeypatch):
    """Of four to each of two peers: at the start, and after each that has been waited for."""
    posted, waited = [], []

    def call(kind):
        def post(part, peer):
            posted.append((kind, peer, int(part)))
            return SimpleNamespace(wait=lambda deadline: waited.append((kind, peer, int(part))))

        return post

    monkeypatch.setattr(dist, "isend", call("to"))
    monkeypatch.setattr(dist, "irecv", call("from"))
    pieces = pieces_of(torch.arange(4), 1)
    exchange = Exchange({1: pieces, 2: pieces}, {3: pieces}, ahead)
    assert exchange.pieces == 4
    assert posted[:4] == [("from", 3, k) for k in range(4)]
    for number, expected in enumerate(sent):
        assert posted[4:] == [("to", peer, k) for k in range(expected) for peer in (1, 2)]
        assert sorted(waited) == sorted(w for w in posted if w[2] < number)
        if number < 4:
            exchange.wait(timedelta(seconds=1))


@pytest.mark.parametrize("name", ["ring", "exponential", "one_peer_exponential"])
def test_stacked_mixing_is_the_matrix_product_of_its_step(name):
    topology = topologies.build(5, name)
    comm = StackedComm(5, Mixing(topology), torch.float64)
    x = start(5, torch.float64)
    for step in range(4):
        expected = topology.matrix(step).toarray() @ x.numpy()
        x = comm.mix(x, step)
        np.testing.assert_allclose(x, expected, atol=1e-15)


# Whole, one block, two to four, up to seven.
BLOCKS = [(2**21, 2**18, 2**10), (0, 2**18, 2**10), (0, 96, 8), (0, 8, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ring", "exponential", "one_peer_exponential"])
def test_mixing_in_place_is_mixing_in_any_blocks_of_columns(name, dtype, monkeypatch):
    topology = topologies.build(6, name)
    # A sum may be taken with or without an intermediate rounding of its products.
    rtol = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for whole, block, row in BLOCKS:
        monkeypatch.setattr(door, "WHOLE_BYTES", whole)
        monkeypatch.setattr(door, "BLOCK_BYTES", {"cpu": block})
        monkeypatch.setattr(door, "LEAST_ROW_BYTES", row)
        comm = StackedComm(6, Mixing(topology), dtype)
        other = StackedComm(6, Mixing(topology), dtype)
        x, expected = start(6, dtype), start(6, dtype)
        for step in range(4):
            comm.mix_(x, step)
            expected = other.mix(expected, step).to(dtype)
        assert comm.bytes_sent == other.bytes_sent
        assert comm.events == other.events
        torch.testing.assert_close(x, expected, rtol=rtol, atol=rtol)


def test_sums_of_bfloat16_are_rounded_once():
    """Each sum to the nearest of 8 bits; 64 summands added up in them would be off by far more."""
    topology = topologies.build(64, "complete")
    comm = StackedComm(64, Mixing(topology), torch.bfloat16)
    x = 1 + start(64, torch.bfloat16).abs()
    exact = topology.matrix(0).toarray() @ x.double().numpy()
    mean, mixed = comm.mean(x, 0), x.clone()
    comm.mix_(mixed, 0)
    assert mixed.dtype == mean.dtype == torch.bfloat16
    for rounded in (mixed, mean.expand_as(x)):
        np.testing.assert_allclose(rounded.double(), exact, rtol=2.0**-8)
    naive = torch.zeros(7, dtype=torch.bfloat16)
    for row in x:
        naive += row
    assert np.abs(naive.double().numpy() / 64 / exact[0] - 1).max() > 2.0**-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [2**18, 100, 1])
def test_distances_are_those_of_each_row_in_any_blocks(block, dtype, monkeypatch):
    monkeypatch.setitem(door.BLOCK_BYTES, "cpu", block)
    x = start(9, dtype)
    for other in (x.mean(0, keepdim=True), x.flip(0)):
        exact = (x.double() - other.double()).square().sum(1)
        distance = squared_distance(x, other)
        assert distance.dtype == torch.float64
        rtol = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(distance, exact, rtol=rtol, atol=rtol)
        each = [squared_distance(*pair) for pair in zip(x, other.expand_as(x), strict=True)]
        torch.testing.assert_close(torch.stack(each), exact, rtol=rtol, atol=rtol)


class Largest(TorchDispatchMode):
    """The bytes of the largest memory, beside that of some tensor, which operations worked in."""

    def __init__(self, beside):
        super().__init__()
        self.bytes, self._beside = 0, beside.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            memory = tensor.untyped_storage()
            if memory.data_ptr() != self._beside:
                self.bytes = max(self.bytes, memory.nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_in_place_takes_no_second_buffer(dtype):
    comm = StackedComm(64, Mixing(topologies.build(64, "ring")), dtype)
    x = torch.ones(64, 10_000, dtype=dtype)
    with Largest(x) as largest:
        comm.mix_(x, 0)
    assert 0 < largest.bytes < x.nbytes / 4


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
