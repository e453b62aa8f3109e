"""When asynchronous workers do what: an event queue over compute times and links.

Workers begin a gradient as soon as their last one is done, whoever is faster does more, and
neighbours exchange meanwhile. Who meets whom is drawn round by round; a round opens when so many
gradients have begun. The coordinator runs the queue ahead of each segment: the simulator carries
out its moments, and both engines take its time for `sim_time_s`.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import torch

from decentral.draws import hash64
from decentral.replica import Moment
from decentral.timeline import Slice, Timeline

_MATCHINGS = int.from_bytes(b"matching", "little")  # apart from other uses of the same seed


class Matchings:
    """Who exchanges with whom in each round: random maximal matchings of an undirected graph.

    A function of (seed, round) alone, so all workers know it without a word.
    """

    def __init__(self, graph: nx.Graph, seed: int):
        self.n = graph.number_of_nodes()
        self._edges = np.array(list(graph.edges()), dtype=np.int64).reshape(-1, 2)
        self._numbers = torch.arange(len(self._edges))
        self._seed = seed

    def partners(self, turn: int) -> np.ndarray:
        """The partner of each worker in round `turn`, its own number where it has none, [n].

        Edges in random order, each taken if both its ends are free still; an edge that comes
        before all others at both its ends can be taken at once.
        """
        order = hash64(_MATCHINGS, self._seed, turn, self._numbers).numpy()
        partner = np.arange(self.n)
        u, v = self._edges[:, 0], self._edges[:, 1]
        while len(u):
            first = np.full(self.n, np.iinfo(np.int64).max)
            np.minimum.at(first, u, order)
            np.minimum.at(first, v, order)
            taken = (order == first[u]) & (order == first[v])
            partner[u[taken]], partner[v[taken]] = v[taken], u[taken]
            free = (partner[u] == u) & (partner[v] == v)
            u, v, order = u[free], v[free], order[free]
        return partner

    def laplacian(self, exchanges: float, turns: int = 1000) -> np.ndarray:
        """L = sum over edges of rate_ij (e_i - e_j)(e_i - e_j)', [n, n], rates per unit of time.

        A unit of time is a gradient of each worker, in which `exchanges` rounds are held; how often
        an edge is taken in a round is counted over `turns` rounds.
        """
        L = np.zeros((self.n, self.n))
        workers = np.arange(self.n)
        for turn in range(turns):
            partner = self.partners(turn)
            paired = workers[partner != workers]
            L[paired, partner[paired]] -= exchanges / turns
        L[workers, workers] = -L.sum(axis=1)
        return L


class Remembered(Matchings):
    """Keeps what it has drawn, for whoever goes over the same rounds again and again."""

    def __init__(self, graph: nx.Graph, seed: int):
        super().__init__(graph, seed)
        self._drawn: dict[int, np.ndarray] = {}

    def partners(self, turn: int) -> np.ndarray:
        if turn not in self._drawn:
            self._drawn[turn] = super().partners(turn)
        return self._drawn[turn]


def acceleration(L: np.ndarray) -> tuple[float, float]:
    """chi1 = 1 / lambda_2(L) and chi2 = max over edges of (e_i - e_j)' L^+ (e_i - e_j) / 2.

    From a Laplacian of exchange rates (Nabli et al. 2023, arXiv 2306.08289): how fast exchanges
    mix, and the largest resistance of a link. n must be at least 2 and L connected.
    """
    chi1 = 1 / np.linalg.eigvalsh(L)[1]
    inverse = np.linalg.pinv(L, hermitian=True)
    i, j = np.nonzero(np.triu(L, 1))
    resistance = inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]
    return float(chi1), float(resistance.max() / 2)


class EventQueue:
    """compute_s(worker, m): seconds of a worker's m-th gradient; link_s(i, j): of an exchange.

    exchanges: rounds per step. A worker is in one exchange at a time, in the order of rounds.
    """

    def __init__(
        self,
        matchings: Matchings,
        exchanges: float,
        compute_s: Callable[[int, int], float],
        link_s: Callable[[int, int], float],
        timeline: Timeline | None = None,
    ):
        self.time_s = 0.0  # all workers are done with the last segment
        self._n = matchings.n
        self._matchings = matchings
        self._exchanges = exchanges
        self._compute_s, self._link_s = compute_s, link_s
        self._timeline = timeline
        self._begun = [0] * self._n  # gradients, of each worker

    def run(self, start: int, stop: int) -> list[Moment]:
        """The moments of steps start .. stop-1, n gradients each, in order; all wait at the end."""
        n = self._n
        moments: list[Moment] = []
        ahead: list[tuple[float, int, str, int, int]] = []
        numbers = itertools.count()  # of two things at the same time, the one planned first
        free = [self.time_s] * n  # for the next exchange
        begun, round_ = n * start, rounds(n * start, n, self._exchanges)

        def plan(time_s: float, kind: str, worker: int, other: int) -> None:
            heapq.heappush(ahead, (time_s, next(numbers), kind, worker, other))

        def begin(worker: int, now: float) -> None:
            nonlocal begun, round_
            if begun == n * stop:
                return
            plan(now, "start", worker, begun)
            seconds = self._compute_s(worker, self._begun[worker])
            plan(now + seconds, "finish", worker, begun)
            self._draw(worker, "compute", begun // n, now, now + seconds, {})
            begun += 1
            self._begun[worker] += 1
            while round_ < rounds(begun, n, self._exchanges):
                partner = self._matchings.partners(round_)
                for i in np.flatnonzero(partner > np.arange(n)).tolist():
                    j = int(partner[i])
                    meet = max(now, free[i], free[j])
                    free[i] = free[j] = meet + self._link_s(i, j)
                    plan(meet, "meet", i, j)
                    plan(free[i], "part", i, j)
                    for one, other in ((i, j), (j, i)):
                        facts = {"with worker": other}
                        self._draw(one, "exchange", begun // n, meet, free[i], facts)
                round_ += 1

        for worker in range(n):
            begin(worker, self.time_s)
        while ahead:
            self.time_s, _, kind, worker, other = heapq.heappop(ahead)
            moments.append(Moment(kind, worker, other, begun / n))
            if kind == "finish":
                begin(worker, self.time_s)
        return moments

    def _draw(
        self, worker: int, kind: str, step: int, start: float, end: float, facts: dict[str, int]
    ) -> None:
        if self._timeline is not None and self._timeline.covers(step):
            hidden = kind == "exchange"
            self._timeline.add(Slice(worker, kind, step, start, end, facts, hidden))

    def state(self) -> dict[str, Any]:
        """What `restore` needs between two runs."""
        return {"time_s": self.time_s, "begun": list(self._begun)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.time_s, self._begun = state["time_s"], list(state["begun"])


def rounds(begun: int, n: int, exchanges: float) -> int:
    """How many rounds of exchanges are open once n workers have begun so many gradients."""
    return math.floor(exchanges * begun / n)
