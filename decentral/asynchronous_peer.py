"""One worker of a cluster in an asynchronous method: it computes, and a thread of it exchanges."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decentral.asynchronous import AsynchronousGradient, AsynchronousReplica, AsynchronousRule
from decentral.event_queue import Matchings, rounds
from decentral.peer import PeerComm
from decentral.replica import Report, Segment

POLL_S = 0.002  # how often the exchanging thread asks, if this worker begins no gradient
SWITCH_S = 1e-4  # Python's own 5 ms would leave exchanges behind where steps are short


class PeerReplica(AsynchronousReplica):
    """One worker, over a store in which all workers count the gradients that have begun.

    The main thread computes on a copy of the model; the other holds the rounds of exchanges that
    are open, in their order, with the partners that `matchings` draws. Each touches the model
    under a lock for as long as an addition takes, so neither waits for the other's work. Where
    exchanges take longer than gradients, rounds are behind, and made up for at a segment's end.
    """

    comm: PeerComm

    def __init__(
        self,
        gradient: AsynchronousGradient,
        rule: AsynchronousRule,
        comm: PeerComm,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        *,
        matchings: Matchings,
        store: dist.Store,
        average_buffers: bool = True,
        watches_drift: bool = False,
    ):
        super().__init__(
            gradient,
            rule,
            comm,
            make_optimizer,
            make_scheduler,
            average_buffers=average_buffers,
            watches_drift=watches_drift,
        )
        self._matchings, self._store = matchings, store
        self._lock = threading.Lock()
        self._news = threading.Event()  # this worker has begun a gradient, or there will be none
        self._over = False  # the main thread is done, or failed
        self._failure: Exception | None = None

    def run(self, segment: Segment) -> Report:
        self._loss.zero_()
        self._failure, self._over = None, False
        exchanging = threading.Thread(target=self._exchange, args=(segment,), daemon=True)
        switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        exchanging.start()
        try:
            with torch.no_grad():
                self._compute(segment)
            exchanging.join()
        finally:
            self._over = True
            self._news.set()
            sys.setswitchinterval(switch_s)
        if self._failure is not None:
            raise self._failure
        return self.report(segment)

    def _compute(self, segment: Segment) -> None:
        """Gradients, until all workers together have begun those of the segment."""
        n, gradient, (own,) = self.comm.n, self._gradient, self._own
        key = _counter(segment)
        while self._failure is None:
            number = n * segment.start + self._store.add(key, 1) - 1
            if number >= n * segment.stop:
                return
            self.step = number // n
            self._news.set()
            with self._lock:
                gradient.parameters.copy_(self.x)
                gradient.buffers.copy_(self.buffers)
            before = gradient.buffers.clone()
            self._loss += gradient.of([0], [int(self._finished)])[0].cpu()
            with self._lock:
                self.adapt(own, gradient.value, number, self._begun(segment) / n)
                self.buffers += gradient.buffers - before
            self._finished += 1

    def _exchange(self, segment: Segment) -> None:
        """The rounds of exchanges that open in the segment."""
        n, exchanges, (own,) = self.comm.n, self._rule.exchanges, self._own
        first, last = (rounds(n * step, n, exchanges) for step in (segment.start, segment.stop))
        try:
            with torch.no_grad():
                for turn in range(first, last):
                    while rounds(self._begun(segment), n, exchanges) <= turn:
                        self._news.wait(POLL_S)
                        self._news.clear()
                        if self._over:
                            return
                    partner = int(self._matchings.partners(turn)[self.comm.rank])
                    if partner == self.comm.rank:
                        continue
                    with self._lock:
                        message = self.message(own)
                    difference = self.comm.difference(message, partner, self.step)
                    with self._lock:
                        self.meet(own, difference, self._begun(segment) / n)
        except Exception as error:  # raised again by the main thread
            self._failure = error

    def _begun(self, segment: Segment) -> int:
        """How many gradients all workers have begun since the start of the run."""
        n = self.comm.n
        counted = self._store.add(_counter(segment), 0)
        return min(n * segment.start + counted, n * segment.stop)


def _counter(segment: Segment) -> str:
    """Where the gradients of a segment are counted: workers that find it over count too."""
    return f"begun/{segment.start}"
