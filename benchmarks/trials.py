"""Many trials of one run in one simulator: with tiny models a step costs little more for all.

Trial t of a run of n workers is workers t n .. t n + n - 1 of a larger one: a copy of the topology
which no link leaves, averages within the trial, draws of its own, and the data of the run itself.
So the trials differ in their batches alone, and trial 0 is the run, to rounding.
"""

from dataclasses import replace

import networkx as nx
import torch
from scipy.sparse import block_diag, csr_array
from torch import Tensor

from decentral.algorithms import Algorithm, Averaging
from decentral.algorithms.adapt_then_combine import AdaptThenCombine
from decentral.algorithms.parallel import Parallel
from decentral.algorithms.schedules import Every, Hierarchical, Never, Schedule
from decentral.config import Config
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.replica import Replica, Segment
from decentral.topology import Topology

NEVER = 2**62  # the period of an average over all trials


class Trials:
    """So many trials of the run that `config` describes, at their start.

    Methods that take a local step and average by a schedule without a memory can be had:
    parallel SGD (with a local optimizer linear in the gradient), Local SGD, gossip, Gossip-PGA.
    """

    def __init__(self, config: Config, trials: int):
        experiment = build(config)
        algorithm = experiment.algorithm
        assert isinstance(algorithm.rule, AdaptThenCombine | Parallel)
        assert algorithm.outer is None
        self.task, self._n, self._trials = experiment.task, config.workers, trials
        self._between = algorithm.between
        self._simulator = Simulator(
            replace(
                experiment,
                config=config.model_copy(update={"workers": config.workers * trials}),
                topology=_copies(experiment.topology, trials),
                algorithm=_within(algorithm, trials),
                shards=list(experiment.shards) * trials,
            )
        )
        self.step = 0

    def run(self, steps: int) -> Tensor:
        """Take so many steps; the mean over the workers of each trial's models, [trials, D]."""
        stop = self.step + steps
        self._simulator.run(Segment(self.step, stop, self._between, False, False))
        self.step = stop
        replica = self._simulator.replica
        assert isinstance(replica, Replica)
        return replica.x.view(self._trials, self._n, -1).mean(dim=1, dtype=torch.float64)


def _within(algorithm: Algorithm, trials: int) -> Algorithm:
    """The same method, where each trial is a group and a global average is a group's."""
    if isinstance(algorithm.rule, Parallel):
        # A mean of gradients before a linear step is a mean of models after it: J at every step.
        schedule: Schedule = Hierarchical(NEVER, 1, trials)
        return Algorithm(AdaptThenCombine(), Averaging.NOBODY, schedule)
    if isinstance(algorithm.schedule, Never):
        return algorithm
    assert isinstance(algorithm.schedule, Every)
    return replace(algorithm, schedule=Hierarchical(NEVER, algorithm.schedule.period, trials))


def _copies(topology: Topology | None, trials: int) -> Topology | None:
    """As many copies side by side. Not connected, as no topology that a config names may be."""
    if topology is None:
        return None
    graphs = (nx.disjoint_union_all([graph] * trials) for graph in topology.graphs)
    matrices = (csr_array(block_diag([W] * trials, format="csr")) for W in topology.matrices)
    return Topology(topology.name, tuple(graphs), tuple(matrices), topology.weights)


def logistic_optimum(x: Tensor, sign: Tensor) -> Tensor:
    """The minimiser [D] of mean ln(1 + exp(-sign x'w)), by Newton's method from zero, float64.

    x [samples, D], sign [samples]. A step is halved until it descends.
    """

    def value(w: Tensor) -> float:
        return float(torch.nn.functional.softplus(-(signed @ w)).mean())

    signed = x.double() * sign.double()[:, None]
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    while True:
        p = torch.sigmoid(-(signed @ w))
        gradient = -(p @ signed) / len(x)
        if gradient.norm() < 1e-11:
            return w
        hessian = (signed * (p * (1 - p))[:, None]).T @ signed / len(x)
        move = torch.linalg.solve(hessian, gradient)
        length = 1.0
        while value(w - length * move) > value(w) + 1e-15:
            length /= 2
        w = w - length * move
