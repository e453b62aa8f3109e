"""A training loop of one's own is a run: `wrap` gives what the simulator gives, and fits torch."""

import pytest
import torch
from processes import run_on_ranks

import decentral
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.tasks import fetch

WORKERS = 4
METHODS = {
    "parallel_sgd": {},
    "local_sgd": {"period": 5},
    "post_local_sgd": {"period": 4},
    "qsr": {"base_period": 2, "alpha": 0.2},
    "hierarchical_sgd": {"period": 8, "group_period": 2, "groups": 2},
    "slowmo": {"period": 5},
    "diloco": {"period": 5},
    "gossip_sgd": {"wire": {"name": "int8"}, "gossip_period": 2},
    "gossip_pga": {"period": 5},
    "gossip_aga": {"initial_period": 2, "warmup": 6},
    "consensus_control": {"fraction": 0.05, "every": 3},
    "gossip_cta": {},
    "gradient_tracking": {},
    "gt_pga": {"period": 5},
    "d2": {},
    "qg_dsgdm": {},
    "decentlam": {},
    "sgp": {},
    "relay_sgd": {},
    "noloco": {"period": 3},
    "choco_sgd": {"compression": {"name": "random_k", "fraction": 0.2}, "consensus_step": 0.4},
}


def config_of(quick, method):
    own_momentum = method in ("qg_dsgdm", "decentlam")
    return quick | {
        "workers": WORKERS,
        "steps": 16,
        "algorithm": {"name": method, **METHODS[method]},
        "topology": {"name": "path" if method in ("relay_sgd", "d2") else "ring"},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0 if own_momentum else 0.9},
        "lr_schedule": {"name": "step", "milestones": [7], "gamma": 0.5},
        "record": {"every": 16},
    }


def own_loop(rank, config):
    """The loop that somebody would write, on the batches of the run: what it ends with."""
    experiment = build(load(config))
    task, sampler = experiment.task, experiment.sampler([rank])
    model = task.model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank  # all start from rank 0's all the same
    options = dict(config["optimizer"])
    options.pop("name")
    optimizer = torch.optim.SGD(model.parameters(), **options)
    optimizer = decentral.wrap(model, optimizer, config["algorithm"], config["topology"])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7], gamma=0.5)
    for step in range(config["steps"]):
        inputs, target = (t[0] for t in fetch(task.train, sampler.indices(step)))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = task.loss(model(inputs.double()), target)
        loss.backward()
        optimizer.step(loss=loss)
        scheduler.step()
    x = torch.cat([p.detach().flatten() for p in model.parameters()])
    return x.numpy(), optimizer.bytes_sent, optimizer.period, optimizer.consensus_distance()


def own_loops(rank, configs):
    return [own_loop(rank, config) for config in configs]


@pytest.mark.slow
def test_a_loop_of_ones_own_is_the_simulated_run(quick):
    configs = [config_of(quick, method) for method in METHODS]
    seen = run_on_ranks(WORKERS, own_loops, configs)
    for number, config in enumerate(configs):
        name = config["algorithm"]["name"]
        simulator = Simulator(experiment := build(load(config)))
        coordinator = Coordinator(experiment, simulator)
        list(coordinator.run())
        ends = [seen[rank][number] for rank in range(WORKERS)]
        x = torch.stack([torch.from_numpy(end[0]) for end in ends])
        torch.testing.assert_close(x, simulator.replica.x, rtol=1e-9, atol=1e-11, msg=name)
        assert sum(end[1] for end in ends) == simulator.replica.comm.bytes_sent, name
        assert {end[2] for end in ends} == {experiment.algorithm.schedule.period}, name
        apart = (x - x.mean(0)).square().sum(1).mean().sqrt()
        assert ends[0][3] == pytest.approx(float(apart), rel=1e-9, abs=1e-12), name
