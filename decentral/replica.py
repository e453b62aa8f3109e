"""A replica: the model that a worker trains, and what acts on it. Both engines run this text.

`Replica` holds one worker as a flat buffer [D], or all workers of the simulator as [n, D]; every
operation on it, and every step rule, is written for a last axis of D and any leading one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from decentral.batches import Batches
from decentral.comm import BLOCK_BYTES, Comm, Decode, Event, Finish, accumulation_dtype
from decentral.draws import hash64


class Averaging(Enum):
    """With whom a worker averages at one step: the mixing matrix W(k) is I, W, the averages of
    groups, or J = 11'/n."""

    NOBODY = "nobody"
    NEIGHBOURS = "neighbours"
    GROUP = "group"
    EVERYONE = "everyone"


class Outer(Protocol):
    """What becomes of a global average: see algorithms/outer.py."""

    @property
    def equation(self) -> str: ...

    def step(self, x: Tensor, state: dict[str, Tensor], lr: float) -> None:
        """Replace x, which holds the global average, in place; `lr` is the local one, gamma."""
        ...


class Compressor(Protocol):
    """A code for what goes over the wire: see algorithms/compression.py."""

    def encode(self, x: Tensor, key: Tensor) -> Tensor:
        """[..., D] to bytes, uint8 [..., M]; `key` [...] is for codes that draw."""
        ...

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        """The floats of a message, in dtype and last axis like `like`."""
        ...

    def contraction(self, size: int) -> float:
        """delta in ||x - Q(x)||^2 <= (1 - delta) ||x||^2 for x of `size` elements."""
        ...


class Gradient(Protocol):
    """Loss and gradient of the workers' own batches, at the parameters it was built over."""

    parameters: Tensor  # [..., D], trained in place
    buffers: Tensor  # [..., B], float buffers such as BatchNorm statistics; B may be 0
    counters: dict[str, Tensor]  # integer buffers, [..., *shape]
    batches: Batches  # that a step takes
    measures: bool  # whether a call leaves `variance`, [...], of its batches' gradients
    variance: Tensor | None

    @property
    def value(self) -> Tensor:
        """[..., D], the gradient that the last call left."""
        ...

    def __call__(self, step: int) -> Tensor:
        """Draw the batch of `step`, fill `value`, and return the losses, shape [...].

        The optimizer of `parameters` finds the gradient where torch's do, in their `grad`.
        """
        ...

    def losses(self, step: int) -> Tensor:
        """The losses alone, [...], of the same batch, and with the same draws of the model."""
        ...


@runtime_checkable
class StepRule(Protocol):
    """One step of a method on a replica, and what `decentral methods` says of it.

    It may say what it `holds` as well: floats of a worker in `replica.state` from step to step.
    """

    @property
    def equation(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def sends(self) -> str:
        """Floats a worker sends a step; D parameters."""
        ...

    @property
    def requires(self) -> str | None:
        """What it asks of the mixing matrix, such as "doubly stochastic"."""
        ...

    def step(self, replica: "Replica") -> None: ...


class Moment(NamedTuple):
    """What an asynchronous worker does in the simulator.

    It starts or finishes gradient `other` (those of all workers are counted together, from 0), or
    meets worker `other`, or parts from it, both models averaged. `time` is in gradients begun,
    per worker.
    """

    kind: str  # start, finish, meet or part
    worker: int
    other: int
    time: float


@dataclass(frozen=True)
class Segment:
    """Steps start .. stop-1; the last may average globally, record, be watched for its schedule,
    and have its gradient's noise measured. If it records it may measure drift too.

    One without steps is what is left of a last step that workers' deaths cut short: the record
    and the global average.
    """

    start: int
    stop: int
    between: Averaging
    global_average: bool
    record: bool
    watch: bool = False
    measure: bool = False
    drift: bool = False
    batches: Batches | None = None  # where their number changes
    load: float = 1.0  # batches a step, of those that the config says
    moments: Sequence[Moment] = ()  # of an asynchronous method, in the simulator


@dataclass(frozen=True)
class Report:
    """What a segment gave, per worker: arrays of length n, or 1 from a worker of a cluster."""

    stop: int  # steps finished: fewer than asked for where an exchange failed
    loss: np.ndarray  # sum over the steps of the segment
    deviation: np.ndarray | None  # ||x_i - xbar||^2 before the last averaging, if recorded
    bytes_sent: int  # by these workers, since the start
    events: list[Event]  # what a worker did, in order: all workers do the same
    lr: float  # at the last step
    next_lr: float  # at the step after it
    moved: np.ndarray | None = None  # ||(W x)_i - x_i||^2 of the last averaging, if watched
    gradient_square: np.ndarray | None = None  # ||g_i||^2 at the last step, if watched or measured
    variance: np.ndarray | None = None  # of one batch's gradient at the last step, if measured
    drift: np.ndarray | None = None  # ||x_i - c_i||^2 where deviation is taken, if asked for
    compute_s: np.ndarray | None = None  # seconds in gradients, of a worker of a cluster
    wait_s: np.ndarray | None = None  # and in exchanges: waiting for the others, and sending
    ended: float | None = None  # of a cluster, at this moment of the driver's clock


def followed(first: Report, then: Report) -> Report:
    """What two segments gave, one after the other; the state is that after the second."""
    return replace(then, loss=first.loss + then.loss, events=[*first.events, *then.events])


class Replica:
    """Parameters, local optimizer, step rule and its state, over a `Comm`.

    `state` is what the step rule and the outer optimizer remember between steps: tensors [..., *].
    `key`, int64 [...], are random bits of each worker, `shared_key` those that all have in common.
    `wire` is a format for what goes over the wire in place of floats. Where neighbours average,
    they do at every `gossip_period`-th step; groups, if there are any, at every `group_period`-th.
    `average_buffers` says whether float buffers are averaged with the parameters, or stay each
    worker's own. With `watches_drift`, `anchor` [..., D] is where drift is measured from, c: the
    models after the last step that averaged globally, or as they started.
    """

    def __init__(
        self,
        gradient: Gradient,
        rule: StepRule,
        comm: Comm,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        key: Tensor,
        shared_key: Tensor,
        *,
        outer: Outer | None = None,
        wire: Compressor | None = None,
        gossip_period: int = 1,
        group_period: int | None = None,
        average_buffers: bool = True,
        watches_drift: bool = False,
    ):
        self.x = gradient.parameters
        self.anchor = self.x.clone() if watches_drift else None
        self.buffers = gradient.buffers
        self.counters = gradient.counters
        self.state: dict[str, Tensor] = {}
        self.comm = comm
        self.step = 0
        self.optimizer = make_optimizer([self.x])
        self.scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        self._gradient = gradient
        self._rule = rule
        self._key = key
        self._shared_key = shared_key
        self._average_buffers = average_buffers
        self._outer = outer
        self._wire = wire
        self._gossip_period, self._group_period = gossip_period, group_period
        if outer is not None:
            self.state["outer_model"] = self.x.clone()
            self.state["outer_momentum"] = torch.zeros_like(self.x)
        self.averaging = Averaging.NOBODY
        self._recording = self._watching = self._measuring = self._drifting = False
        self._load = 1.0
        self._begun: Callable[[], None] | None = None  # an averaging that `begin` began
        self._sent: Tensor | None = None  # x where it began, kept for the next time
        self._deviation: Tensor | None = None
        self._drift: Tensor | None = None
        self._moved: Tensor | None = None
        self._gradient_square: Tensor | None = None
        self._loss = torch.zeros(self.x.shape[:-1], dtype=torch.float64, device=self.x.device)

    # What a step rule is written with.

    def gradient(self) -> Tensor:
        """The stochastic gradient at x on this step's batch, [..., D]; overwritten by the next."""
        self._take_gradient()
        return self._gradient.value

    def _take_gradient(self) -> None:
        self.count(self._gradient(self.step))
        if self._watching or self._measuring:
            self._gradient_square = squared_norm(self._gradient.value)

    def local_step(self) -> None:
        """x <- x - gamma g(x): the local optimizer's step along the gradient of `gradient`."""
        self.start_local_step()()

    def start_local_step(self) -> Callable[[], None]:
        """Take the gradient at x as it is: call what it returns to step along it, from x as it is
        then."""
        self._take_gradient()
        return self.optimizer.step

    def losses(self) -> Tensor:
        """F_i(x_i) on this step's batch, [...], without a gradient; a rule `count`s what it is."""
        return self._gradient.losses(self.step)

    def count(self, losses: Tensor) -> None:
        """Take `losses`, [...], for the training loss of this step, and the step for computed."""
        self._loss += losses
        self.comm.events.append(Event("compute", self.step, 0, self._load))

    @property
    def shared_buffers(self) -> Tensor:
        """What is averaged with the parameters: the float buffers, or [..., 0] if they stay."""
        return self.buffers if self._average_buffers else self.buffers[..., :0]

    def descend(self, direction: Tensor) -> None:
        """The local optimizer's step on x, `direction` in the place of the gradient."""
        self.x.grad = direction.contiguous()
        self.optimizer.step()

    @property
    def lr(self) -> float:
        """gamma: the learning rate of this step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def key(self) -> Tensor:
        """64 random bits for this step, of each worker its own, int64 [...]."""
        return hash64(self._key, self.step)

    def shared_key(self) -> Tensor:
        """64 random bits for this step, the same on all workers, int64."""
        return hash64(self._shared_key, self.step)

    def mix_(self, v: Tensor) -> None:
        """v_i <- sum_j W(k)_ij v_j, with W(k) as the schedule has it at this step.

        Where a wire format rounds what is sent, Q, it is v_i <- v_i + sum_j W_ij (Q_j - Q_i),
        which keeps the mean exactly.
        """
        self._start_mix(v)(v)

    def _start_mix(self, v: Tensor) -> Finish:
        """Begin what `mix_` does."""
        if self.averaging is Averaging.NOBODY or not v.numel():
            return lambda own: None
        if self.averaging is Averaging.NEIGHBOURS:
            wire = self._wire
            return self.comm.start_mix_(v, self.step) if wire is None else self._rounded(v, wire)
        everyone = self.averaging is Averaging.EVERYONE
        start = self.comm.start_mean if everyone else self.comm.start_mean_of_group
        averaged = start(v, self.step)

        def finish(own: Tensor) -> None:
            records = everyone and own is self.x and self._recording
            if own is v and not records:
                averaged(own)
                return
            mean = averaged()
            if records:
                self.record(own, mean)
            if own is v:
                own.copy_(mean)
            else:
                own.sub_(v).add_(mean)

        return finish

    def _rounded(self, v: Tensor, wire: Compressor) -> Finish:
        message, step = wire.encode(v, self.key()), self.step
        mixed = self.comm.start_mix(message, step, lambda m: wire.decode(m, v))

        def finish(own: Tensor) -> None:
            own += mixed() - wire.decode(message, v)

        return finish

    def mixed(self, message: Tensor, decode: Decode) -> Tensor:
        """sum_j W_ij decode(message_j) over the topology, for messages that are codes."""
        return self.comm.mix(message, self.step, decode)

    def swap(self, messages: Tensor) -> Tensor:
        """A message of its own for each neighbour: per link, what the neighbour sent here.

        `comm.spread` and `comm.collect` go from workers to links and back.
        """
        return self.comm.swap(messages, self.step)

    def mean_(self, v: Tensor) -> None:
        """v_i <- (1/n) sum_j v_j, whatever the schedule says."""
        if v.numel():
            self.comm.start_mean(v, self.step)(v)

    def least(self, v: Tensor) -> Tensor:
        """min_j v_j, element by element: it broadcasts against v."""
        return self.comm.least(v, self.step)

    def record(self, x: Tensor, mean: Tensor | None = None) -> None:
        """Where a rule is after its local step and before it averages: the consensus distance, and
        drift. `mean`: of all x, where it is known anyway."""
        if not self._recording:
            return
        if mean is None:
            mean = self.comm.mean(x, self.step, counted=False)
        self._deviation = squared_distance(x, mean)
        if self._drifting and self.anchor is not None:
            self._drift = squared_distance(x, self.anchor)

    def average(self) -> None:
        """x_i <- sum_j W(k)_ij x_j: the model's averaging, buffers with it.

        The consensus distance is recorded before; at a global average it costs no message, and
        the outer optimizer has its turn after.
        """
        self._start_average(self.x, self.shared_buffers)()

    def start_average(self) -> Callable[[], None]:
        """Begin `average`, and go on while messages are under way: call what it returns to end it.

        In between x stays as it is. What the gradient changes of the buffers b is the worker's
        own, as its step is: b_i <- sum_j W(k)_ij b_j + (change of b_i).
        """
        begun, self._begun = self._begun, None
        return begun or self._start_average(self.x, self.shared_buffers.clone())

    def _start_average(self, x: Tensor, buffers: Tensor) -> Callable[[], None]:
        """`x` and `buffers` are what is averaged: the replica's, or copies that stay as they are
        while the replica's change."""
        everyone = self.averaging is Averaging.EVERYONE
        if not everyone:  # else from the average itself
            self.record(x)
        finish_x, finish_buffers = self._start_mix(x), self._start_mix(buffers)

        def finish() -> None:
            before = self.x.clone() if self._watching else None
            finish_x(self.x)
            finish_buffers(self.shared_buffers)
            if before is not None:
                self._moved = squared_distance(self.x, before)
            if everyone and self._outer is not None:
                self._outer.step(self.x, self.state, self.lr)

        return finish

    # What an engine calls.

    def run(self, segment: Segment) -> Report:
        """Run the steps of `segment`; parameters, optimizer and state move on in place."""
        self._loss.zero_()
        self._deviation = self._moved = self._gradient_square = self._drift = None
        self._load = segment.load
        if segment.batches is not None:
            self._gradient.batches = segment.batches
        lr = self.lr
        alone = self.comm.failure is not None
        stop = segment.start
        with torch.no_grad():
            for step in range(segment.start, segment.stop):
                lr = self.lr
                self.take(segment, step)
                stop = step + 1
                if self.comm.failure is not None and not alone:
                    break
            if segment.start == segment.stop:
                self._make_up(segment)
        events, self.comm.events = self.comm.events, []
        return Report(
            stop=stop,
            loss=self._loss.cpu().numpy().reshape(-1).copy(),
            deviation=array(self._deviation),
            moved=array(self._moved),
            gradient_square=array(self._gradient_square),
            variance=array(self._gradient.variance if segment.measure else None),
            drift=array(self._drift),
            bytes_sent=self.comm.bytes_sent,
            events=events,
            lr=lr,
            next_lr=self.lr,
        )

    def take(self, segment: Segment, step: int) -> None:
        """One step of `segment`, without a report: who owns the training loop calls this."""
        self._enter(segment, step)
        last = step == segment.stop - 1
        if segment.measure:
            self._gradient.measures = last
        self._rule.step(self)
        if last and segment.global_average:
            self._set_anchor()
        if self.scheduler is not None:
            self.scheduler.step()

    def begin(self, segment: Segment) -> None:
        """Begin the averaging of the next step, the only one of `segment`: what `start_average` of
        its rule is then. For a loop that has the step's gradient before it asks for the step."""
        self._enter(segment, segment.start)
        self._sent = self.x.clone() if self._sent is None else self._sent.copy_(self.x)
        self._begun = self._start_average(self._sent, self.shared_buffers.clone())

    def leave_off(self) -> None:
        """End what `begin` began, and leave the model as it is."""
        if self._begun is not None:
            own = self.x.clone(), self.buffers.clone()
            self._begun()
            self._begun = None
            for tensor, value in zip((self.x, self.buffers), own, strict=True):
                tensor.copy_(value)

    def _enter(self, segment: Segment, step: int) -> None:
        self.step, last = step, step == segment.stop - 1
        self.averaging = self._averaging(segment, last)
        self._recording = last and segment.record
        self._watching = last and segment.watch
        self._measuring = last and segment.measure
        self._drifting = last and segment.drift

    def _make_up(self, segment: Segment) -> None:
        """The record and the global average of a step whose averaging was cut short.

        Some workers may have had it, so what follows from it is averaged as well.
        """
        self._recording, self._drifting = segment.record, segment.drift
        self.record(self.x)
        if segment.global_average:
            for memory in (self.x, self.shared_buffers, *self.state.values()):
                self.mean_(memory)
            self._set_anchor()

    def _set_anchor(self) -> None:
        if self.anchor is not None:
            self.anchor.copy_(self.x)

    def regroup(self, comm: Comm, new: Tensor | None) -> None:
        """Go on over `comm`, among other workers than before; `new`, bool [...], have just come.

        They take the mean of the others: of the model, and of what optimizer and rule remember;
        `new` is None where nobody came. Where all workers have one model, all take it, for a
        failure may have moved some apart. A rule whose memory holds for one set of workers alone
        starts anew.
        """
        comm.bytes_sent, self.comm = self.comm.bytes_sent, comm
        if getattr(self._rule, "starts_anew", False):
            self.state.clear()
        one_model = getattr(self._rule, "one_model", False)
        if new is None and not one_model:
            return
        if new is None:
            new = torch.zeros(self.x.shape[:-1], dtype=torch.bool, device=self.x.device)
        takes = (new | one_model).unsqueeze(-1)
        for memory in self._memory():
            memory.copy_(torch.where(takes, comm.mean_of_others(memory, new), memory))

    def _memory(self) -> list[Tensor]:
        """All that is each worker's own and has a mean: [..., *]."""
        remembered = self.optimizer.state.get(self.x, {}).values()
        tensors = [self.x, self.buffers, self.anchor, *self.state.values(), *remembered]
        return [
            t
            for t in tensors
            if isinstance(t, Tensor)
            and t.dim() == self.x.dim()
            and t.is_floating_point()
            and t.numel()
        ]

    def blank(self) -> dict[str, Any]:
        """A state for a worker that comes to these, before it takes their mean: see `regroup`.

        Its tensors of more than one element are on the device meta: shape and dtype alone.
        """
        state = self.state_dict() | {"bytes_sent": 0}
        return _mapped(state, lambda t: t.to("meta") if t.dim() else t)

    def _averaging(self, segment: Segment, last: bool) -> Averaging:
        """With whom to average at the present step."""
        if last and segment.global_average:
            return Averaging.EVERYONE
        if self._group_period is not None and (self.step + 1) % self._group_period == 0:
            return Averaging.GROUP
        if segment.between is Averaging.NEIGHBOURS and (self.step + 1) % self._gossip_period:
            return Averaging.NOBODY
        return segment.between

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: tensors and plain numbers."""
        return {
            "x": self.x,
            "buffers": self.buffers,
            "anchor": self.anchor,
            "counters": self.counters,
            "state": self.state,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "bytes_sent": self.comm.bytes_sent,
            "history": self.comm.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state in place: whoever shares the buffers sees it."""
        self.x.copy_(state["x"])
        self.buffers.copy_(state["buffers"])
        if self.anchor is not None:
            self.anchor.copy_(state["anchor"])
        for name, counter in self.counters.items():
            counter.copy_(state["counters"][name])
        device = self.x.device
        self.state = {name: t.to(device, copy=True) for name, t in state["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.comm.bytes_sent = state["bytes_sent"]
        self.comm.history = {
            number: [(step, x.to(device, copy=True)) for step, x in past]
            for number, past in state["history"].items()
        }


def filled(blank: dict[str, Any]) -> dict[str, Any]:
    """A `blank` state with zeros for what was not sent along."""
    return _mapped(blank, lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)


def rows_of(state: dict[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
    """The state of some of n stacked workers, int64 [m]: rows of all that is each worker's own."""
    return _mapped(state, lambda t: t[rows] if t.dim() and len(t) == n else t)


def _mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure, with every tensor changed."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: _mapped(value, change) for key, value in state.items()}
    return [_mapped(value, change) for value in state] if isinstance(state, list) else state


def consensus_distance(deviation: np.ndarray) -> float:
    """sqrt((1/n) sum_i ||x_i - xbar||^2) from the squared distances (Kong et al. 2021)."""
    return math.sqrt(float(np.mean(deviation)))


def squared_distance(x: Tensor, other: Tensor) -> Tensor:
    """||x_i - other_i||^2 over the last axis, [...], in float64; the sums are those of x's dtype.

    `other` broadcasts against x. Some rows at a time, whose differences stay in the cache.
    """
    dtype = accumulation_dtype(x.dtype)
    if x.dim() == 1:
        return _squared_length(x.to(dtype) - other.to(dtype))
    rows = max(1, BLOCK_BYTES[x.device.type] // max(1, x.shape[1] * dtype.itemsize))
    others = other.expand_as(x)
    distances = [
        _squared_length(mine.to(dtype) - theirs.to(dtype))
        for mine, theirs in zip(x.split(rows), others.split(rows), strict=True)
    ]
    return torch.cat(distances)


def _squared_length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).double().square_()


def squared_norm(x: Tensor) -> Tensor:
    """||x||^2 over the last axis, in float64."""
    return x.to(accumulation_dtype(x.dtype)).square().sum(dim=-1, dtype=torch.float64)


def array(values: Tensor | None) -> np.ndarray | None:
    """Over workers, [n] or [1]."""
    return None if values is None else values.cpu().numpy().reshape(-1)
