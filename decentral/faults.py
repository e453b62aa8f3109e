"""The scripted faults of a run: who is away, which links carry nothing, who is slow.

`config.faults` holds them. Whatever is drawn is a function of (seed, step, worker or link), so both
engines and a resumed run have the same faults. Mixing, the clock and the coordinator ask;
experiment.py checks that the script fits the run.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decentral.config import (
    ChurnFault,
    CutFault,
    DelayFault,
    Fault,
    JoinFault,
    KillFault,
    LoseFault,
    SlowFault,
)
from decentral.draws import hash64, uniform_float
from decentral.errors import UserError

# Apart from each other and from other uses of the same seed.
_LOSE, _DELAY, _CHURN = (int.from_bytes(word, "little") for word in (b"lose", b"delay", b"churn"))

DRAWS_AHEAD = 2**20  # of one search for the next change of membership: a tenth of a second


@dataclass(frozen=True)
class Changes:
    """Who is no member any more, and who is anew, before a step: worker ids, sorted."""

    killed: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()


class Faults:
    """The script of a run of `workers` workers, ids 0 .. workers-1.

    Raises UserError, naming the key, for a worker or link that cannot be, and for two changes of
    one worker before the same step.
    """

    def __init__(self, script: Sequence[Fault], seed: int, workers: int):
        self.script = tuple(script)
        self._seed, self._workers = seed, workers
        self._cuts = [fault for fault in script if isinstance(fault, CutFault)]
        self._slow = [fault for fault in script if isinstance(fault, SlowFault)]
        self._lose = [fault for fault in script if isinstance(fault, LoseFault)]
        self._delay = [fault for fault in script if isinstance(fault, DelayFault)]
        self._churn = [fault for fault in script if isinstance(fault, ChurnFault)]
        self._kills = {(f.step, f.worker) for f in script if isinstance(f, KillFault)}
        self._joins = {(f.step, f.worker) for f in script if isinstance(f, JoinFault)}
        everyone = np.arange(workers)
        self._churn_keys = [self._key(_CHURN, k, everyone) for k in range(len(self._churn))]
        self._check()

    @property
    def changes_members(self) -> bool:
        """Whether any worker may go or come."""
        return bool(self._kills or self._joins or self._churn)

    @property
    def delays(self) -> tuple[int, ...]:
        """The steps by which messages may be late."""
        return tuple(sorted({fault.steps for fault in self._delay}))

    def touches_links(self, step: int) -> bool:
        """Whether any link may be out, or any message late, at `step`."""
        return any(f.covers(step) for f in (*self._cuts, *self._lose, *self._delay))

    def of_messages(self, senders: np.ndarray, receivers: np.ndarray) -> "MessageFaults":
        """What happens to these messages, a message of every step each; the ends are ids [k]."""
        low, high = np.minimum(senders, receivers), np.maximum(senders, receivers)
        ends = {"exchanges": (low, high), "messages": (senders, receivers)}
        cuts = [(f, (low == min(f.link)) & (high == max(f.link))) for f in self._cuts]
        losses = [(f, self._key(_LOSE, k, *ends[f.of])) for k, f in enumerate(self._lose)]
        delays = [(f, self._key(_DELAY, k, senders, receivers)) for k, f in enumerate(self._delay)]
        return MessageFaults(len(senders), cuts, losses, delays)

    def slowdown(self, step: int, workers: np.ndarray) -> np.ndarray:
        """How many times as long the local step of each of these workers takes, float64 [k]."""
        factors = np.ones(len(workers))
        for fault in self._slow:
            if fault.covers(step):
                factors[workers == fault.worker] *= fault.factor
        return factors

    def slowdown_of(self, worker: int) -> Callable[[int], float] | None:
        """Its factor as a function of the step, or None for a worker that is never slow."""
        if all(fault.worker != worker for fault in self._slow):
            return None
        return lambda step: float(self.slowdown(step, np.array([worker]))[0])

    def next_change(self, step: int, members: Collection[int]) -> int | None:
        """The first step, `step` or later, before which one of `members` goes or another comes.

        None if there is none. With churn so rare that `DRAWS_AHEAD` draws change nobody, the step
        after those that were drawn. Once a step's changes are made, ask from the next step on.
        """
        scripted = [at for at, worker in self._kills if worker in members and at >= step]
        scripted += [at for at, worker in self._joins if worker not in members and at >= step]
        first = min(scripted, default=None)
        churned = self._next_churn(step, first, members)
        return first if churned is None else churned

    def changes(self, step: int, members: Collection[int]) -> Changes:
        """What happens to `members` before `step`.

        Who is killed neither leaves nor returns at that step. Where all that are then left would
        leave, the one whose draw was furthest from it stays.
        """
        killed = {worker for at, worker in self._kills if at == step and worker in members}
        joined = {worker for at, worker in self._joins if at == step and worker not in members}
        live = np.array(sorted(set(members) - killed), dtype=np.int64)
        away = np.array(sorted(set(range(self._workers)) - set(members)), dtype=np.int64)
        leaves, margin = np.zeros(len(live), dtype=bool), np.ones(len(live))
        for fault, key in zip(self._churn, self._churn_keys, strict=True):
            if fault.covers(step):
                drawn = _draw(key, step)
                leaves |= drawn[live] < fault.leave
                margin = np.minimum(margin, drawn[live] - fault.leave)
                joined |= set(away[drawn[away] < fault.return_].tolist())
        if len(live) and leaves.all():
            leaves[margin.argmax()] = False
        return Changes(*(tuple(sorted(ids)) for ids in (killed, live[leaves].tolist(), joined)))

    def _next_churn(self, step: int, stop: int | None, members: Collection[int]) -> int | None:
        """The first step in step .. stop-1 at which a draw of churn changes `members`."""
        if not self._churn:
            return None
        live = np.isin(np.arange(self._workers), list(members))
        leaving = len(members) > 1  # the last one stays
        chances = [np.where(live, f.leave if leaving else 0.0, f.return_) for f in self._churn]
        if not any(chance.any() for chance in chances):
            return None
        windows = [(f.start, math.inf if f.stop is None else f.stop) for f in self._churn]
        last = min(max(end for _, end in windows), math.inf if stop is None else stop)
        step = max(step, min(start for start, _ in windows))
        block, drawn = 16, 0
        while step < last:
            steps = np.arange(step, min(step + block, last), dtype=np.int64)[:, None]
            changed = np.zeros(len(steps), dtype=bool)
            for key, (start, end), chance in zip(self._churn_keys, windows, chances, strict=True):
                hit = _draw(key, torch.from_numpy(steps)) < chance
                changed |= (hit & (start <= steps) & (steps < end)).any(axis=1)
            if changed.any():
                return step + int(changed.argmax())
            step, drawn = step + len(steps), drawn + len(steps) * self._workers
            if drawn >= DRAWS_AHEAD:
                return step
            block = min(2 * block, max(16, DRAWS_AHEAD // (8 * self._workers)))
        return None

    def _key(self, kind: int, number: int, *ends: np.ndarray) -> Tensor:
        """Random bits of each worker or link, for the `number`-th fault of a kind."""
        return hash64(kind, self._seed, number, *(torch.from_numpy(end) for end in ends))

    def _check(self) -> None:
        before: dict[tuple[int, int], str] = {}
        for number, fault in enumerate(self.script):
            key = f"faults.{number}"
            if isinstance(fault, KillFault | JoinFault | SlowFault):
                self._check_worker(fault.worker, f"{key}.worker")
            if isinstance(fault, CutFault):
                for worker in fault.link:
                    self._check_worker(worker, f"{key}.link")
                if fault.link[0] == fault.link[1]:
                    raise UserError(
                        f"a link joins two workers; got {fault.link}. Name its two ends",
                        f"{key}.link",
                    )
            if isinstance(fault, KillFault | JoinFault):
                other = before.setdefault((fault.step, fault.worker), key)
                if other != key:
                    raise UserError(
                        f"worker {fault.worker} goes or comes once before a step, but {other} has"
                        f" it change before step {fault.step} too; take one away, or another step",
                        key,
                    )

    def _check_worker(self, worker: int, key: str) -> None:
        if worker >= self._workers:
            raise UserError(
                f"the workers are 0 to {self._workers - 1}; got {worker}. Name one of them, or"
                " raise workers",
                key,
            )


class MessageFaults:
    """What happens to k messages of every step: see `Faults.of_messages`."""

    def __init__(
        self,
        count: int,
        cuts: list[tuple[CutFault, np.ndarray]],
        losses: list[tuple[LoseFault, Tensor]],
        delays: list[tuple[DelayFault, Tensor]],
    ):
        self._count, self._cuts, self._losses, self._delays = count, cuts, losses, delays

    def lost(self, step: int) -> np.ndarray:
        """Which messages of `step` do not come, bool [k]."""
        lost = np.zeros(self._count, dtype=bool)
        for fault, cut in self._cuts:
            if fault.covers(step):
                lost |= cut
        for fault, key in self._losses:
            if fault.covers(step):
                lost |= _draw(key, step) < fault.probability
        return lost

    def late(self, step: int) -> np.ndarray:
        """By how many steps each message of `step` is late, int [k]; the first fault that holds."""
        late = np.zeros(self._count, dtype=np.int64)
        for fault, key in self._delays:
            if fault.covers(step):
                late[(_draw(key, step) < fault.probability) & (late == 0)] = fault.steps
        return late


def _draw(key: Tensor, step: int | Tensor) -> np.ndarray:
    """Uniform on (0, 1), for each combination of keys and steps."""
    return uniform_float(hash64(key, step)).numpy()
