"""Workers that go and come: what the others do then, against loops written out by hand."""

import gc
import time
import weakref

import numpy as np
import pytest
import torch
from harness import N, Quadratic, replica_of, ring
from processes import run_on_ranks

import decentral
from decentral import UserError
from decentral import topology as topologies
from decentral.algorithms import PRESETS
from decentral.clock import Clock
from decentral.comm import Event, StackedComm
from decentral.config import load
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.mixing import Mixing
from decentral.peer import Patience, PeerComm
from decentral.replica import Averaging, Replica, Segment, filled, rows_of

LR = 0.1


@pytest.fixture
def points(quick):
    """Five workers with one sample each, so that gradients are exact: a_i (x - c_i)."""
    return quick | {
        "workers": 5,
        "task": {
            "name": "quadratic",
            "batch_size": 2,
            "dim": 3,
            "samples_per_worker": 1,
            "curvature_spread": 0.5,
        },
        "optimizer": {"name": "sgd", "lr": LR},
        "algorithm": {"name": "gossip_sgd"},
        "record": {"every": 1},
        "steps": 8,
    }


def gradients(config):
    """a_i and a_i c_i of each worker, [n, D]."""
    train = build(load(config)).task.train
    samples = [train[i] for i in range(config["workers"])]
    root, scaled = (torch.stack(part).numpy() for part in zip(*samples, strict=True))
    return root**2, root * scaled


def gossip(x, W, a, b, steps):
    for _ in range(steps):
        x = W @ (x - LR * (a * x - b))
    return x


def mixing_matrix(n):
    return topologies.build(n, "ring").matrices[0].toarray()


def model_of(config):
    return decentral.run(config).model.get_parameter("x").detach().numpy()


# In the simulator.


def test_those_that_are_left_go_on_from_where_they_are_over_a_smaller_ring(points):
    """Worker 2 dies before step 3; worker 0 reads its data from then on: the mean of both."""
    points |= {"faults": [{"kind": "kill", "worker": 2, "step": 3}], "on_worker_failure": "shrink"}
    a, b = gradients(points)
    x = gossip(np.zeros((5, 3)), mixing_matrix(5), a, b, 3)
    left = [0, 1, 3, 4]
    a[0], b[0] = (a[0] + a[2]) / 2, (b[0] + b[2]) / 2
    x = gossip(x[left], mixing_matrix(4), a[left], b[left], 5)
    np.testing.assert_allclose(model_of(points), x.mean(0), rtol=1e-12)
    metrics = decentral.run(points).metrics
    assert list(metrics.workers) == [5, 5, 5, 4, 4, 4, 4, 4]
    assert list(np.diff(metrics.bytes_sent)) == [5 * 2 * 24] * 2 + [4 * 2 * 24] * 5


@pytest.mark.parametrize(
    "optimizer", [{"name": "sgd", "lr": LR, "momentum": 0.9}, {"name": "adamw", "lr": LR}]
)
def test_buffers_of_those_that_were_are_free_at_once(points, optimizer):
    """All n models, their gradients and momentum: not when garbage is collected."""
    points |= {"optimizer": optimizer, "lr_schedule": {"name": "cosine", "T_max": 8}}
    simulator = Simulator(build(load(points)))
    segment = Segment(0, 2, Averaging.NEIGHBOURS, True, record=True)
    gc.disable()
    try:
        simulator.run(segment)
        replica = simulator.replica
        assert isinstance(replica, Replica)
        state = [t for held in replica.optimizer.state.values() for t in held.values()]
        buffers = [replica.x, replica._gradient.value, *(t for t in state if t.dim() == 2)]
        assert len(buffers) >= 3
        before = [weakref.ref(buffer) for buffer in buffers]
        del replica, state, buffers
        simulator.regroup([0, 1, 3, 4])
        assert [buffer() for buffer in before] == [None] * len(before)
    finally:
        gc.enable()


def test_a_replacement_starts_from_the_mean_of_the_others(points):
    points |= {"faults": [{"kind": "kill", "worker": 2, "step": 3}]}
    a, b = gradients(points)
    x = gossip(np.zeros((5, 3)), mixing_matrix(5), a, b, 3)
    x[2] = x[[0, 1, 3, 4]].mean(0)
    x = gossip(x, mixing_matrix(5), a, b, 5)
    np.testing.assert_allclose(model_of(points), x.mean(0), rtol=1e-12)


def test_a_worker_that_comes_back_has_its_own_data_again(points):
    faults = [{"kind": "kill", "worker": 2, "step": 1}, {"kind": "join", "worker": 2, "step": 4}]
    points |= {"faults": faults, "on_worker_failure": "shrink"}
    a, b = gradients(points)
    x = gossip(np.zeros((5, 3)), mixing_matrix(5), a, b, 1)
    left, shared = [0, 1, 3, 4], (a[0] + a[2]) / 2
    fewer_a, fewer_b = a.copy(), b.copy()
    fewer_a[0], fewer_b[0] = shared, (b[0] + b[2]) / 2
    y = gossip(x[left], mixing_matrix(4), fewer_a[left], fewer_b[left], 3)
    x[left], x[2] = y, y.mean(0)
    x = gossip(x, mixing_matrix(5), a, b, 4)
    np.testing.assert_allclose(model_of(points), x.mean(0), rtol=1e-12)


def test_stop_stops_at_a_scripted_death(points):
    points |= {"faults": [{"kind": "kill", "worker": 2, "step": 3}], "on_worker_failure": "stop"}
    with pytest.raises(decentral.WorkerError, match="worker 2 died before step 3"):
        decentral.run(points)


def test_nobody_is_left(points):
    faults = [{"kind": "kill", "worker": worker, "step": 3} for worker in range(5)]
    with pytest.raises(decentral.WorkerError, match="nobody is left"):
        decentral.run(points | {"faults": faults})


@pytest.mark.parametrize("method", ["gossip_pga", "gradient_tracking", "sgp", "parallel_sgd"])
def test_a_resumed_run_has_the_workers_that_it_had(quick, tmp_path, method):
    """Also two that are away: bit for bit as without a stop."""
    quick |= {
        "workers": 5,
        "algorithm": {"name": method},
        "optimizer": {"name": "adam", "lr": 0.01},
        "on_worker_failure": "shrink",
        "checkpoint": {"every": 11},
        "faults": [
            {"kind": "kill", "worker": 1, "step": 4},
            {"kind": "kill", "worker": 3, "step": 9},
            {"kind": "join", "worker": 1, "step": 17},
        ],
    }
    if method == "gossip_pga":
        quick["algorithm"] = {"name": method, "period": 4}
    if method == "sgp":
        quick["topology"] = {"name": "exponential", "weights": "push"}
    whole = decentral.run(quick)
    decentral.run(quick | {"steps": 13}, out=tmp_path)
    (tmp_path / "checkpoints/step-00000011/checksums.json").stat()
    resumed = decentral.resume(tmp_path, steps=24)
    assert list(resumed.metrics.workers)[-4:] == [3, 4, 4, 4]
    for column in ("loss", "consensus_distance", "bytes_sent", "sim_time_s", "workers"):
        assert list(resumed.metrics[column])[4:] == list(whole.metrics[column])[4:], column


@pytest.mark.parametrize("workers", [3, 7])
def test_a_run_goes_on_with_another_number_of_workers(points, tmp_path, workers):
    """The first ones keep their models; others come from their mean."""
    a, b = gradients(points | {"workers": workers})
    own_a, own_b = gradients(points)
    x = gossip(np.zeros((5, 3)), mixing_matrix(5), own_a, own_b, 4)
    lines = []

    class Listening(decentral.progress.Watcher):
        def say(self, line):
            lines.append(line)

    decentral.run(points | {"steps": 4, "checkpoint": {"every": 4}}, out=tmp_path)
    resumed = decentral.resume(tmp_path, watcher=Listening(), workers=workers, steps=8)
    x = np.concatenate([x, np.tile(x.mean(0), (2, 1))])[:workers]
    x = gossip(x, mixing_matrix(workers), a, b, 4)
    np.testing.assert_allclose(
        resumed.model.get_parameter("x").detach().numpy(), x.mean(0), rtol=1e-12
    )
    told = {
        3: ["3 of 5 workers go on as they were"],
        7: ["5 of 5 workers go on as they were", "2 workers come to them, from their mean"],
    }
    assert lines[:2] == told[workers]
    assert list(resumed.metrics.step) == list(range(1, 9))


# What is remembered.


def test_newcomers_take_the_mean_of_what_the_others_remember():
    algorithm = PRESETS["qg_dsgdm"]()
    replica = replica_of(algorithm, Quadratic(), ring())
    replica.run(Segment(0, 3, Averaging.NEIGHBOURS, False, record=False))
    x, momentum = replica.x.clone(), replica.state["momentum"].clone()
    new = torch.tensor([False, True, False, False, True])
    replica.regroup(replica.comm, new)
    for now, before in ((replica.x, x), (replica.state["momentum"], momentum)):
        torch.testing.assert_close(now[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=0)
        mean = before[[0, 2, 3]].mean(0)
        torch.testing.assert_close(now[[1, 4]], mean.expand(2, -1), rtol=1e-14, atol=0)


def test_the_optimizers_memory_has_a_mean_and_its_step_stays():
    replica = replica_of(PRESETS["gossip_sgd"](), Quadratic(), ring(), name="adam")
    replica.run(Segment(0, 3, Averaging.NEIGHBOURS, False, record=False))
    memory = {k: v.clone() for k, v in replica.optimizer.state[replica.x].items()}
    replica.regroup(replica.comm, torch.tensor([True, False, False, False, False]))
    after = replica.optimizer.state[replica.x]
    assert after["step"] == 3
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(after[name][0], memory[name][1:].mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(after[name][1:], memory[name][1:], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["gradient_tracking", "d2", "choco_sgd", "sgp"])
def test_what_holds_for_one_set_of_workers_is_begun_anew(method):
    """After a regrouping a step is what it is at the start of a run."""
    topology = topologies.build(N, "ring", weights="lazy") if method == "d2" else ring()
    options = {"compression": {"name": "top_k", "fraction": 0.5}, "consensus_step": 0.4}
    algorithm = PRESETS[method](**options if method == "choco_sgd" else {})
    replica = replica_of(algorithm, Quadratic(), topology)
    replica.run(Segment(0, 3, Averaging.NEIGHBOURS, False, record=False))
    fresh_problem = Quadratic()
    fresh_problem.parameters = replica.x.clone()
    fresh = replica_of(algorithm, fresh_problem, topology)
    replica.regroup(replica.comm, None)
    segment = Segment(3, 4, Averaging.NEIGHBOURS, False, record=False)
    for one in (replica, fresh):
        one.run(segment)
    torch.testing.assert_close(replica.x, fresh.x, rtol=1e-14, atol=0)


def test_workers_with_one_model_have_one_again_after_a_failure_moved_them_apart():
    replica = replica_of(PRESETS["parallel_sgd"](), Quadratic())
    replica.run(Segment(0, 2, Averaging.NOBODY, False, record=False))
    replica.x[0] += 1
    mean = replica.x.mean(0)
    replica.regroup(replica.comm, None)
    torch.testing.assert_close(replica.x, mean.expand(N, -1), rtol=1e-14, atol=0)


def test_a_blank_state_has_shapes_and_plain_numbers_alone():
    replica = replica_of(PRESETS["gossip_sgd"](), Quadratic(), ring(), name="adam")
    replica.run(Segment(0, 3, Averaging.NEIGHBOURS, False, record=False))
    blank = replica.blank()
    assert blank["x"].is_meta
    other = replica_of(PRESETS["gossip_sgd"](), Quadratic(), ring(), name="adam")
    other.load_state_dict(filled(blank))
    assert not other.x.any()
    assert other.optimizer.state[other.x]["step"] == 3
    assert not other.optimizer.state[other.x]["exp_avg"].any()
    assert other.comm.bytes_sent == 0


def test_rows_of_a_state_are_of_what_is_each_workers_own():
    state = {"x": torch.arange(6.0).view(3, 2), "step": torch.tensor(4.0), "lr": [1, 2, 3]}
    some = rows_of(state, torch.tensor([2, 0]), 3)
    assert some["x"].tolist() == [[4, 5], [0, 1]]
    assert (some["step"], some["lr"]) == (4.0, [1, 2, 3])


def test_a_step_whose_averaging_was_cut_short_is_made_up_for():
    """A segment without steps: record and global average, of what outer optimizers hold too."""
    algorithm = PRESETS["slowmo"](period=4)
    replica = replica_of(algorithm, Quadratic())
    replica.run(Segment(0, 3, Averaging.NOBODY, False, record=False))
    x = replica.x.clone()
    replica.state["outer_model"][0] += 1  # as if worker 0 had had its global average
    outer = replica.state["outer_model"].mean(0)
    report = replica.run(Segment(3, 3, Averaging.NOBODY, True, record=True))
    assert report.stop == 3
    assert not report.loss.any()
    assert report.deviation is not None
    np.testing.assert_allclose(report.deviation, ((x - x.mean(0)) ** 2).sum(1), rtol=1e-13)
    torch.testing.assert_close(replica.x, x.mean(0).expand(N, -1), rtol=1e-14, atol=0)
    torch.testing.assert_close(replica.state["outer_model"], outer.expand(N, -1))


# Data.


def test_the_present_read_the_data_of_the_absent(points):
    experiment = build(load(points | {"workers": 6}))
    sampler = experiment.sampler([1, 4], members=[1, 4])
    drawn = [set(sampler.indices(step)[row].tolist()) for step in range(9) for row in (0, 1)]
    # Absent are 0, 2, 3 and 5, which go to 1, 4, 1 and 4.
    assert set.union(*drawn[::2]) == {1, 0, 3}
    assert set.union(*drawn[1::2]) == {4, 2, 5}
    alone = experiment.sampler([1], members=[1, 4])
    assert alone.indices(5).tolist() == sampler.indices(5)[:1].tolist()


# The clock.


def test_the_clock_goes_on_for_those_that_are_left():
    clock = Clock(np.array([1.0, 2.0, 5.0]), 0.5, 1e3, topologies.build(3, "ring"))
    clock.advance(Event("compute", 0, 0))
    clock.regroup([0, 1], topologies.build(2, "ring"))
    clock.advance(Event("neighbours", 0, 100))  # from 2 on, latency, and 0.1 s of sending
    np.testing.assert_allclose(clock.now, [2.6, 2.6, 5.0])
    clock.advance(Event("everyone", 0, 100))
    np.testing.assert_allclose(clock.now[:2], 2.6 + 2 * 0.5 + 2 * 100 / 2 / 1e3)
    clock.advance(Event("compute", 1, 0))
    clock.regroup([0, 1, 2], topologies.build(3, "ring"))
    np.testing.assert_allclose(clock.now, [4.7, 5.7, 5.7])


# One worker's side of a failure.


def _cut_off(rank):
    """Three in a ring; 2 does not come to the second exchange."""
    Patience.FLOOR_S = 0.5
    comm = PeerComm(Mixing(topologies.build(3, "ring")))
    x = torch.full((2,), float(rank), dtype=torch.float64)
    first = comm.mix(x, 0)
    if rank == 2:
        time.sleep(5)
        return first.tolist(), None, None, None
    comm.carries_on = True
    started = time.monotonic()
    second = comm.mix(x, 1)
    waited_s = time.monotonic() - started
    assert comm.failure is not None
    assert 0.4 < waited_s < 4
    alone = comm.mean(x, 2), comm.mix(x, 2), comm.least(x, 2)
    peer = comm.failure.peer, comm.failure.step
    return first.tolist(), second.tolist(), peer, [value.tolist() for value in alone]


@pytest.mark.slow
def test_a_worker_that_is_cut_off_goes_on_alone():
    for rank, (first, second, peer, alone) in enumerate(run_on_ranks(3, _cut_off)[:2]):
        assert first == [1.0, 1.0]
        assert second == [rank, rank]  # no averaging at the step that failed
        assert peer == (2, 1)
        assert alone == [[rank, rank]] * 3


def test_an_elastic_number_of_workers_is_two_keys(points):
    config = load(points | {"workers": {"min": 2, "max": 5}})
    assert (config.workers, config.min_workers) == (5, 2)
    assert Simulator(build(config)).members == (0, 1, 2, 3, 4)
    with pytest.raises(UserError, match=r"^workers: must be a number, or \{min: 4, max: 16\}"):
        load(points | {"workers": {"max": 5}})
    with pytest.raises(UserError, match=r"^min_workers: must be at most workers.*got 6"):
        load(points | {"workers": {"min": 6, "max": 5}})


def test_a_stacked_mean_leaves_newcomers_out():
    comm = StackedComm(3, None, torch.float64)
    x = torch.tensor([[1.0], [10.0], [4.0]])
    assert comm.mean_of_others(x, torch.tensor([False, True, False])).tolist() == [[2.5]]
    assert comm.bytes_sent == 0


def test_a_run_whose_method_has_no_topology_for_those_left_stops(quick):
    """D2 needs eigenvalues above -1/3, which a ring of four has not."""
    quick |= {
        "workers": 5,
        "algorithm": {"name": "d2"},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "topology": {"name": "ring", "weights": "metropolis"},
        "faults": [{"kind": "kill", "worker": 1, "step": 4}],
        "on_worker_failure": "shrink",
    }
    with pytest.raises(decentral.WorkerError, match=r"^4 workers are left, for whom there is no"):
        decentral.run(quick)
