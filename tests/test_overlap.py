"""Exchanges that go on while the gradient is computed: they do, and nothing else comes of it."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import D, Quadratic, replica_of
from processes import run_on_ranks
from torch import nn

import decentral
from decentral import topology as topologies
from decentral.algorithms import COMPRESSORS, PRESETS
from decentral.algorithms.schedules import Every, Hierarchical
from decentral.comm import consecutive_groups
from decentral.draws import hash64
from decentral.mixing import Mixing
from decentral.optimizers import optimizer
from decentral.peer import Patience, PeerComm, own_group
from decentral.replica import Replica, Segment

WORKERS, STEPS = 3, 8
LARGE = 2**20  # float64: more than sockets hold
CTA = PRESETS["gossip_cta"]()
METHODS = {
    "plain": CTA,
    "global averages": replace(CTA, schedule=Every(3)),
    "groups": replace(CTA, schedule=Hierarchical(4, 2, 2)),
    "rounded": replace(CTA, wire=COMPRESSORS["int8"]()),
}


class Moving(Quadratic):
    """Each gradient moves the buffers, as batch normalisation does: b <- (b + x[:2]) / 2."""

    def __init__(self, n=WORKERS, of=slice(None)):
        super().__init__(n)
        self.a, self.c, self.parameters = self.a[of], self.c[of], self.parameters[of]
        self.buffers = torch.arange(2.0 * n, dtype=torch.float64).view(n, 2)[of].clone()
        self.value = torch.zeros_like(self.parameters)

    def __call__(self, step):
        self.buffers.add_(self.parameters[..., :2]).div_(2)
        return super().__call__(step)


def path():
    return topologies.build(WORKERS, "path")


def segments(algorithm):
    for step in range(STEPS):
        average = algorithm.schedule.next_average(step) == step
        yield Segment(step, step + 1, algorithm.between, average, record=step == 5)


def trained(algorithm, replica):
    """Where it ends, and what a record on the way saw."""
    deviations = [replica.run(segment).deviation for segment in segments(algorithm)]
    assert deviations[5] is not None
    return replica.x.numpy(), replica.buffers.numpy(), deviations[5], replica.comm.bytes_sent


def one_of(rank, algorithm, problem, comm):
    """The replica of one worker."""
    return Replica(
        problem,
        algorithm.rule,
        comm,
        optimizer("sgd", {"lr": 0.1}),
        None,
        key=hash64(7, torch.tensor(rank)),
        shared_key=hash64(8),
        wire=algorithm.wire,
        group_period=algorithm.schedule.group_period,
    )


def on_peers(rank):
    ends = {}
    for name, algorithm in METHODS.items():
        own = own_group(consecutive_groups(WORKERS, algorithm.schedule.groups))
        comm = PeerComm(Mixing(path()), own)
        ends[name] = trained(algorithm, one_of(rank, algorithm, Moving(of=rank), comm))
    return ends


class Held(Moving):
    """A large model, whose worker 0 is not done with gradient 1 before worker 1 has its message."""

    def __init__(self, rank, store):
        super().__init__(of=rank)
        self.parameters = torch.full((LARGE,), float(rank), dtype=torch.float64)
        self.value = torch.zeros_like(self.parameters)
        self.rank, self.store = rank, store

    def __call__(self, step):
        if self.rank == 0 and step == 1:
            self.store.wait(["a step further"], timedelta(seconds=20))
        return torch.zeros((), dtype=torch.float64)


def held_in_its_gradient(rank):
    store = dist.distributed_c10d._get_default_store()
    replica = one_of(rank, CTA, Held(rank, store), PeerComm(Mixing(path())))
    for step in range(2):
        replica.run(Segment(step, step + 1, CTA.between, False, record=False))
        if rank == 1 and step == 1:
            store.set("a step further", "")
    return replica.x[-1].item()


def held_in_its_loop(rank):
    """The same of the wrapper: worker 0 is between its steps 1 and 2 until worker 1 has taken 2."""
    store = dist.distributed_c10d._get_default_store()
    model = nn.Linear(LARGE, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 1.0)
    bare = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapped = decentral.wrap(model, bare, "gossip_cta", "path")
    for step in range(3):
        model.weight.grad = torch.full_like(model.weight, float(rank) if step == 0 else 0.0)
        if rank == 0 and step == 2:
            store.wait(["a loop further"], timedelta(seconds=20))
        wrapped.step()
        if rank == 1 and step == 2:
            store.set("a loop further", "")
    own = model.weight.detach().clone()
    with wrapped.averaged():  # while the exchange of step 3 is under way
        mean = model.weight[0, -1].item()
    assert torch.equal(model.weight, own)
    state = wrapped.state_dict()
    with torch.no_grad():
        model.weight.fill_(float(rank))
    wrapped.load_state_dict(state)
    assert model.weight[0, 0].item() == rank  # what was under way is not added
    wrapped.step()
    return own[0, -1].item(), mean, model.weight[0, -1].item()


def deserted(rank):
    """Worker 1 does not come to step 1: what the others, at their gradients by then, are told."""
    store = dist.distributed_c10d._get_default_store()
    comm = PeerComm(Mixing(path()), patience=Patience(1.0, 60.0))
    comm.patience.FLOOR_S = 0.5
    comm.carries_on = True
    problem = Moving(of=rank)
    replica = one_of(rank, CTA, problem, comm)
    replica.run(Segment(0, 1, CTA.between, False, record=False))
    if rank == 1:
        store.wait(["told 0", "told 2"], timedelta(seconds=20))
        return None
    alone = replica.x - 0.1 * problem.a * (replica.x - problem.c)
    replica.run(Segment(1, 2, CTA.between, False, record=False))
    store.set(f"told {rank}", "")
    assert comm.failure is not None
    return comm.failure.peer, comm.failure.step, float((replica.x - alone).abs().max())


def scenarios(rank):
    parts = (on_peers, held_in_its_gradient, held_in_its_loop, deserted)
    return {part.__name__: part(rank) for part in parts}


@pytest.fixture(scope="module")
def workers():
    return run_on_ranks(WORKERS, scenarios)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_peers_and_the_simulator_take_the_same_steps(workers, name):
    algorithm = METHODS[name]
    x, buffers, deviation, bytes_sent = trained(algorithm, replica_of(algorithm, Moving(), path()))
    for rank, worker in enumerate(workers):
        own_x, own_buffers, own_deviation, _ = worker["on_peers"][name]
        np.testing.assert_allclose(own_x, x[rank], rtol=1e-12)
        np.testing.assert_allclose(own_buffers, buffers[rank], rtol=1e-12)
        np.testing.assert_allclose(own_deviation, deviation[rank], rtol=1e-12)
    assert sum(worker["on_peers"][name][3] for worker in workers) == bytes_sent


def test_buffers_by_hand():
    """b <- W b + (b_half - b) with b_half = (b + x[:2]) / 2, beside x <- W x - gamma a (x - c)."""
    problem = Moving()
    replica = replica_of(CTA, problem, path())
    W, a, c = path().matrix(0).toarray(), problem.a.numpy(), problem.c.numpy()
    x, b = np.zeros((WORKERS, D)), problem.buffers.numpy().copy()
    for step in range(4):
        replica.run(Segment(step, step + 1, CTA.between, False, record=False))
        x, b = W @ x - 0.1 * a * (x - c), W @ b + (x[:, :2] - b) / 2
    np.testing.assert_allclose(replica.x, x, rtol=1e-12)
    np.testing.assert_allclose(replica.buffers, b, rtol=1e-12)


@pytest.mark.slow
def test_a_message_arrives_while_its_sender_computes(workers):
    """Else worker 0 would wait in vain. Twice, x <- W x of 0, 1, 2 on a path."""
    ends = [worker["held_in_its_gradient"] for worker in workers]
    np.testing.assert_allclose(ends, [5 / 9, 1, 13 / 9])


@pytest.mark.slow
def test_a_message_arrives_while_its_sender_is_in_its_own_loop(workers):
    ends = np.array([worker["held_in_its_loop"] for worker in workers])
    # From 1, a step along 0, 1, 2 and two mixings; then 0, 1, 2 loaded, and one mixing of those.
    np.testing.assert_allclose(ends[:, 0], [4 / 9, 0, -4 / 9], atol=1e-12)
    np.testing.assert_allclose(ends[:, 1], 0, atol=1e-12)
    np.testing.assert_allclose(ends[:, 2], [1 / 3, 1, 5 / 3])


@pytest.mark.slow
def test_a_failure_behind_a_gradient_names_the_peer_and_leaves_the_local_step(workers):
    for rank in (0, 2):
        peer, step, off = workers[rank]["deserted"]
        assert (peer, step) == (1, 1)
        assert off < 1e-15
