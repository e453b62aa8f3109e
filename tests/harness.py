"""Methods on quadratics, without a task: what the tests of algorithms run on."""

import torch

from decentral import topology as topologies
from decentral.batches import Batches
from decentral.comm import StackedComm, consecutive_groups
from decentral.draws import hash64
from decentral.mixing import Mixing
from decentral.optimizers import optimizer
from decentral.replica import Replica, Segment

N, D = 5, 3


class Quadratic:
    """f_i(x) = 1/2 sum_d a_id (x_d - c_id)^2, its exact gradient; every worker its own a and c."""

    def __init__(self, n=N, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.a = 0.5 + torch.rand(n, D, generator=generator, dtype=torch.float64)
        self.c = torch.randn(n, D, generator=generator, dtype=torch.float64)
        self.parameters = torch.zeros(n, D, dtype=torch.float64)
        self.buffers = torch.zeros(n, 0, dtype=torch.float64)
        self.counters = {}
        self.value = torch.zeros_like(self.parameters)
        self.batches, self.measures, self.variance = Batches(1), False, None

    def __call__(self, step):
        torch.mul(self.a, self.parameters - self.c, out=self.value)
        self.parameters.grad = self.value
        return self.losses(step)

    def losses(self, step):
        return 0.5 * (self.a * (self.parameters - self.c) ** 2).sum(-1)


def replica_of(algorithm, problem, topology=None, name="sgd", average_buffers=True, **options):
    n = len(problem.parameters)
    return Replica(
        problem,
        algorithm.rule,
        StackedComm(
            n,
            Mixing(topology, turn_steps=algorithm.gossip_period) if topology else None,
            torch.float64,
            groups=consecutive_groups(n, algorithm.schedule.groups),
        ),
        optimizer(name, {"lr": 0.1, **options}),
        None,
        key=hash64(7, torch.arange(n)),
        outer=algorithm.outer,
        wire=algorithm.wire,
        gossip_period=algorithm.gossip_period,
        group_period=algorithm.schedule.group_period,
        shared_key=hash64(8),
        average_buffers=average_buffers,
    )


def run(algorithm, problem, steps, topology=None, name="sgd", start=0, **options):
    """Run steps as the coordinator cuts them, and return the replica."""
    replica = replica_of(algorithm, problem, topology, name, **options)
    step = start
    while step < steps:
        average = algorithm.schedule.next_average(step)
        stop = steps if average is None else min(steps, average + 1)
        everyone = average is not None and stop == average + 1
        replica.run(Segment(step, stop, algorithm.between, everyone, record=False))
        if everyone:
            algorithm.schedule.observe(stop - 1, 1.0, replica.lr)
        step = stop
    return replica


def ring():
    return topologies.build(N, "ring")
