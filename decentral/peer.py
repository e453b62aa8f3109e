"""One worker's door to the network, over torch.distributed: the other side of comm.py."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import csr_array
from torch import Tensor

from decentral import gloo
from decentral.comm import (
    Decode,
    Event,
    Finish,
    History,
    Pending,
    PendingMean,
    accumulation_dtype,
    all_reduce_bytes,
    as_it_is,
    nbytes,
)
from decentral.errors import StepError
from decentral.exchange import Exchange, ExchangeError, Messages, pieces_of
from decentral.mixing import Mixing
from decentral.stopwatch import Stopwatch, timed

# What is averaged in place goes over the wire in pieces, and each is added up while the next ones
# travel: so large that their number costs little, measured with benchmarks/exchange.py.
PIECE_BYTES = 2**20

# How many of them may be on their way to each neighbour, where the worker waits for the exchange.
PIECES_AHEAD = 2


class PeerError(StepError):
    """An exchange failed: `peer` is the worker at its other end, None for an all-reduce."""

    def __init__(self, rank: int, step: int, peer: int | None, reason: str):
        super().__init__(rank, step, reason)
        self.peer = peer

    def __reduce__(self) -> tuple[Any, ...]:
        return PeerError, (self.rank, self.step, self.peer, self.reason)


class Patience:
    """How long a worker waits for others before it takes them for lost.

    `factor` times as long as it was itself busy since an exchange last began, or its longest wait
    in one so far took, whichever is more, and never less than FLOOR_S: so a long local phase is no
    death, before an exchange or behind it. Before the first exchange, when others may still be
    loading, `first_s`.
    """

    FLOOR_S = 10.0

    def __init__(self, factor: float, first_s: float):
        self._factor, self._first_s = factor, first_s
        self._longest_s: float | None = None
        self._free = time.perf_counter()  # when the work or the wait that goes on now began
        self._busy_s = 0.0  # at work before that, since an exchange began
        self._under_way = 0  # exchanges
        self._deadline = timedelta(seconds=first_s)

    def begin(self) -> None:
        """A segment begins: what came before it was no work."""
        self._free, self._busy_s = time.perf_counter(), 0.0

    def deadline(self) -> timedelta:
        """For an exchange that begins now: behind another that is under way, for that one's."""
        self.wait()
        if not self._under_way:
            self._deadline = self.after(self._busy_s)
            self._busy_s = 0.0
        self._under_way += 1
        return self._deadline

    def after(self, busy_s: float) -> timedelta:
        """The deadline of who was at work so long."""
        if self._longest_s is None:
            return timedelta(seconds=self._first_s)
        longest_s = max(busy_s, self._longest_s)
        return timedelta(seconds=max(self.FLOOR_S, self._factor * longest_s))

    def wait(self) -> None:
        """The worker is done with its work and waits for an exchange."""
        now = time.perf_counter()
        self._busy_s += now - self._free
        self._free = now

    def over(self) -> None:
        """The exchange is over, and went well."""
        now = time.perf_counter()
        self._longest_s = max(self._longest_s or 0.0, now - self._free)
        self._free = now
        self._under_way -= 1


class PeerComm:
    """One worker of n; neighbours exchange whole buffers point to point.

    An exchange that fails raises PeerError; where `carries_on`, it does not: `failure` says why,
    and from then on the worker is alone. W is I and every mean its own value, so that a step which
    has begun ends as one without averaging.

    What is started goes on by itself while the worker computes: in a thread of gloo's, or in
    a stream of NCCL's. What comes is added up where it is waited for, on CPUs piece by piece.

    Where tensors are on a GPU and the backend is gloo, what is sent and received is
    staged in pinned host memory. To mix in place takes the memory of one message for each neighbour
    that is heard, and of a piece.

    `own_group` averages by itself, where the method has such groups. What does not come at a step
    is not sent either: both ends know it from `mixing`. device: where the tensors are; `stopwatch`
    has the seconds in exchanges there.
    """

    def __init__(
        self,
        mixing: Mixing | None,
        own_group: dist.ProcessGroup | None = None,
        patience: Patience | None = None,
        device: str = "cpu",
    ):
        gloo.give_way()
        self.rank = dist.get_rank()
        self.n = dist.get_world_size()
        self.bytes_sent = 0
        self.carries_on = False
        self.failure: PeerError | None = None
        self.patience = patience or Patience(10.0, 300.0)
        self.events: list[Event] = []
        self.history: History = {}  # nothing comes late here
        self.stopwatch = Stopwatch(device)
        self._own_group = own_group
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        # Where no backend was named, it follows from where the tensors are.
        self._host = not self._on_gpu or dist.get_backend() == "gloo"
        self._mixing = mixing
        # By id: those of the topology stay, and of the others the last, with its matrix.
        self._intact = (
            {id(W): _exchange_plan(W, self.rank) for W in mixing.matrices} if mixing else {}
        )
        self._other: tuple[csr_array, _Plan] | None = None
        # In host memory, those that nothing is sent from or received into now.
        self._buffers: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Tensor:
        return self.start_mix(message, step, decode)()

    def start_mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Pending:
        own_weight, arriving = self._start_messages(message, step)

        def finish() -> Tensor:
            own = decode(message)
            dtype = accumulation_dtype(own.dtype)
            heard = self._all(arriving)
            if not heard:
                return own.to(dtype, copy=True)
            mixed = own.to(dtype) * own_weight
            for weight, theirs in heard[0]:
                mixed.add_(decode(self._arrived(theirs)), alpha=weight)
            return mixed

        return finish

    def mix_(self, x: Tensor, step: int) -> None:
        self._start_mix_(x, step, PIECES_AHEAD)(x)

    def start_mix_(self, x: Tensor, step: int) -> Finish:
        return self._start_mix_(x, step, None)

    def _start_mix_(self, x: Tensor, step: int, ahead: int | None) -> Finish:
        size = PIECE_BYTES // x.element_size() if self._host else len(x)
        own_weight, arriving = self._start_messages(x, step, size, ahead)
        # Where the worker waits for the pieces it mixes each while the next ones come.
        at_once = self._on_gpu or ahead is None

        def finish(own: Tensor) -> None:
            parts = list(zip(pieces_of(own, size), pieces_of(x, size), strict=True))
            kept: list[Tensor] = []  # what parts were that are mixed
            try:
                heard = self._all(arriving) if at_once else arriving
                for number, others in enumerate(heard):
                    part, sent = parts[number]
                    if not at_once and number < len(parts) - 1:  # the next may yet fail
                        kept.append(self._keep(part, others))
                    self._mix_part(part, None if own is x else sent, own_weight, others)
            finally:
                if self.failure is not None:
                    for (part, _), before in zip(parts, kept, strict=False):
                        part.copy_(before)

        return finish

    def _mix_part(
        self, own: Tensor, sent: Tensor | None, own_weight: float, others: "_Heard"
    ) -> None:
        """A part of `own` in place, of which `sent` went out, None where that is `own`."""
        mixed = own.to(accumulation_dtype(own.dtype))  # `own` itself where that is its dtype
        if sent is None:
            mixed.mul_(own_weight)
        else:
            mixed.add_(sent, alpha=own_weight - 1)
        for weight, theirs in others:
            mixed.add_(self._arrived(theirs), alpha=weight)
        if mixed.dtype != own.dtype:
            own.copy_(mixed)

    def _keep(self, part: Tensor, others: "_Heard") -> Tensor:
        """What a part is, in the place of what the first of `others` sent, which moves."""
        if not others:
            return part.clone()
        weight, place = others[0]
        moved = self._buffer(place.shape, place.dtype)
        others[0] = weight, moved.copy_(place)
        self._give_back(moved)  # good until the next part's
        return place.copy_(part)

    def _all(self, arriving: "Iterator[_Heard]") -> "list[_Heard]":
        """All pieces of an exchange, or none if it fails."""
        heard = list(arriving)
        return heard if self.failure is None else []

    def _start_messages(
        self, message: Tensor, step: int, size: int | None = None, ahead: int | None = None
    ) -> "tuple[float, Iterator[_Heard]]":
        """Begin to send a message along W(step), and to receive the others', as an Exchange does.

        The worker's own weight; and, piece by piece as they come, each other's weight and its
        piece: none any more once the exchange failed. What was heard is good until the next
        exchange begins.
        """
        own_weight, heard, hearers = self._plan(step)
        sent = self._outgoing(message)
        received = {peer: self._incoming(sent) for peer in heard}
        out = dict.fromkeys(hearers, pieces_of(sent, size))
        into = {peer: pieces_of(buffer, size) for peer, buffer in received.items()}
        arrivals = self._begin(out, into, step, ahead)

        def arriving() -> Iterator[_Heard]:
            for number, went_well in enumerate(arrivals):
                if not went_well:
                    return
                yield [(heard[peer], parts[number]) for peer, parts in into.items()]
            self._give_back(*received.values(), *([sent] if self._stages else []))
            self.bytes_sent += len(hearers) * nbytes(message)
            self.events.append(Event("neighbours", step, nbytes(message)))

        return own_weight, arriving()

    def mean(self, x: Tensor, step: int, counted: bool = True) -> Tensor:
        return self.start_mean(x, step, counted)()

    def start_mean(self, x: Tensor, step: int, counted: bool = True) -> PendingMean:
        return self._start_mean(x, step, None, counted)

    def mean_of_others(self, x: Tensor, new: Tensor) -> Tensor:
        among = torch.cat([torch.zeros_like(x) if new else x, (~new).reshape(1).to(x)])
        total = self._start_all_reduce(among, 0, counted=False)()
        return x.clone() if total is None else (total[:-1] / total[-1]).to(x)

    def least(self, x: Tensor, step: int) -> Tensor:
        least = self._start_all_reduce(x, step, dist.ReduceOp.MIN)()
        return x.clone() if least is None else least.to(x)

    def mean_of_group(self, x: Tensor, step: int) -> Tensor:
        return self.start_mean_of_group(x, step)()

    def start_mean_of_group(self, x: Tensor, step: int) -> PendingMean:
        assert self._own_group is not None, "the method has groups"
        return self._start_mean(x, step, self._own_group, True)

    def _start_mean(
        self, x: Tensor, step: int, group: dist.ProcessGroup | None, counted: bool
    ) -> PendingMean:
        reduced = self._start_all_reduce(x, step, group=group, counted=counted)
        size = self.n if group is None else group.size()

        def finish(into: Tensor | None = None) -> Tensor:
            total = reduced()
            if into is None:
                return x.clone() if total is None else total.div_(size).to(x)
            if total is None:
                return into.copy_(x)
            torch.div(total, size, out=into)
            if not self._on_gpu:
                self._give_back(total)
            return into

        return finish

    def difference(self, x: Tensor, peer: int, step: int) -> Tensor:
        """What two workers that meet see: the x [D] of `peer` minus one's own."""
        self.bytes_sent += nbytes(x)
        return self.trade(x, peer, step) - x  # 0 from a peer that is lost

    def trade(self, x: Tensor, peer: int, step: int) -> Tensor:
        """What `peer` sends while x goes to it, like x; not counted, and good until the next."""
        own = self._outgoing(x)
        theirs = self._incoming(own)
        if not all(self._begin({peer: [own]}, {peer: [theirs]}, step)):
            return x
        self._give_back(theirs, *([own] if self._stages else []))
        return self._arrived(theirs)

    def spread(self, x: Tensor) -> Tensor:
        return x.expand(len(self._neighbours), *x.shape)

    def collect(self, messages: Tensor) -> Tensor:
        return messages.sum(dim=0)

    def swap(self, messages: Tensor, step: int) -> Tensor:
        sent = self._outgoing(messages.contiguous())
        received = self._incoming(sent)
        out, into = (
            {peer: [row] for peer, row in zip(self._neighbours, rows, strict=True)}
            for rows in (sent, received)
        )
        if not all(self._begin(out, into, step)):
            return messages
        self.bytes_sent += nbytes(messages)
        self.events.append(Event("neighbours", step, nbytes(messages[:1])))
        self._give_back(received, *([sent] if self._stages else []))
        arrived = self._arrived(received)
        return arrived if self._on_gpu else arrived.clone()

    @property
    def _neighbours(self) -> list[int]:
        assert self._mixing is not None, "the method has a topology"
        return self._intact[id(self._mixing.matrices[0])][2]

    def _plan(self, step: int) -> "_Plan":
        assert self._mixing is not None, "the method has a topology"
        W = self._mixing.matrix(step)
        intact = self._intact.get(id(W))
        if intact is not None:
            return intact
        if self._other is None or self._other[0] is not W:
            self._other = W, _exchange_plan(W, self.rank)
        return self._other[1]

    @timed
    def _start_all_reduce(
        self,
        x: Tensor,
        step: int,
        operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        counted: bool = True,
    ) -> Callable[[], Tensor | None]:
        """Begin the sum or least of x over the group, or all, in the dtype that sums are taken in.

        What it returns gives None if it failed, or was not tried after an earlier failure.
        """
        if self.failure is not None:
            return _not_tried
        dtype = accumulation_dtype(x.dtype)
        total = self._copied(x, dtype)
        # The deadline goes with the operation: one that is only waited for less long than it
        # runs would keep the group from closing.
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(operation)
        options.timeout = self.patience.deadline()
        try:
            everyone = group or dist.group.WORLD
            assert everyone is not None, "the worker has joined"
            works = [everyone.allreduce([total], options)]
        except RuntimeError as error:
            self._fail(step, None, error)
            return _not_tried
        size, rank = (self.n, self.rank) if group is None else (group.size(), group.rank())

        def finish() -> Tensor | None:
            if self.failure is not None:
                return None
            self.patience.wait()
            try:
                with self.stopwatch:
                    works.pop().wait()  # and let go of, see Exchange.let_go
            except RuntimeError as error:
                self._fail(step, None, error)
                return None
            self.patience.over()
            if counted:
                # This worker's share, so that the shares of all add up to the whole exactly.
                whole = all_reduce_bytes(nbytes(x), size)
                self.bytes_sent += whole * (rank + 1) // size - whole * rank // size
                kind = "everyone" if group is None else "group"
                self.events.append(Event(kind, step, nbytes(x)))
            if self._stages:
                self._give_back(total)
            return self._arrived(total)

        return finish

    @timed
    def _begin(
        self, out: Messages, into: Messages, step: int, ahead: int | None = None
    ) -> Iterator[bool]:
        """Begin an Exchange, of which the arguments are.

        What it returns waits for the next piece: true if that went well; false, and no more, if it
        failed, or was not tried after an earlier failure.
        """
        if self.failure is not None:
            return iter([False])
        deadline = self.patience.deadline()
        try:
            exchange = Exchange(out, into, ahead, together=not self._host)
        except ExchangeError as error:
            self._fail(step, error.peer, error)
            return iter([False])
        return self._arrivals(exchange, deadline, step)

    def _arrivals(self, exchange: Exchange, deadline: timedelta, step: int) -> Iterator[bool]:
        self.patience.wait()
        for _ in range(exchange.pieces):
            went_well = self._went_well(exchange, deadline, step)
            yield went_well
            if not went_well:
                return
        self.patience.over()

    def _went_well(self, exchange: Exchange, deadline: timedelta, step: int) -> bool:
        """Wait for a piece; not, where another exchange that was under way has failed."""
        if self.failure is not None:
            exchange.let_go()
            return False
        try:
            with self.stopwatch:
                exchange.wait(deadline)
        except ExchangeError as error:
            self._fail(step, error.peer, error)
            return False
        return True

    def let_go(self) -> None:
        """Drop the process groups, whose connections close only once nobody holds them."""
        self._own_group = None

    def _fail(self, step: int, peer: int | None, cause: Exception) -> None:
        self.failure = PeerError(self.rank, step, peer, str(cause))
        if not self.carries_on:
            raise self.failure from cause

    @property
    def _stages(self) -> bool:
        return self._on_gpu and self._host

    def _outgoing(self, message: Tensor) -> Tensor:
        """The message where the backend takes it from: good until the next one is sent."""
        return self._copied(message, message.dtype) if self._stages else message

    def _copied(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of x where the backend takes it from, which in host memory may be given back.

        It waits for the GPU to have copied x, and with it all that came before: so whoever then
        receives into pinned memory overwrites nothing that `_arrived` has yet to copy.
        """
        if not self._host:
            return x.to(dtype, copy=True)
        copy = self._buffer(x.shape, dtype).copy_(x, non_blocking=True)
        if self._stages:
            torch.cuda.current_stream(x.device).synchronize()
        return copy

    def _incoming(self, like: Tensor) -> Tensor:
        """Where to receive what is like `like`: on a GPU it is the caller's to keep."""
        return self._buffer(like.shape, like.dtype) if self._host else torch.empty_like(like)

    def _arrived(self, received: Tensor) -> Tensor:
        """What was received, on the worker's device."""
        return received.to(self._device, non_blocking=True)

    def _buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """In host memory: one that was given back, where there is one."""
        spare = self._buffers.setdefault((shape, dtype), [])
        if spare:
            return spare.pop()
        return torch.empty(shape, dtype=dtype, pin_memory=self._stages)

    def _give_back(self, *buffers: Tensor) -> None:
        """The next exchange may write into them."""
        for buffer in buffers if self._host else ():
            self._buffers[buffer.shape, buffer.dtype].append(buffer)


def _not_tried() -> None:
    """What an exchange gives that was not."""


def own_group(
    groups: Sequence[np.ndarray], timeout: timedelta | None = None
) -> dist.ProcessGroup | None:
    """Open a process group for each group of workers; this worker's. All ranks must call it."""
    own = None
    for members in groups:
        group = dist.new_group(members.tolist(), timeout=timeout)
        if dist.get_rank() in members:
            own = group
    assert own is None or isinstance(own, dist.ProcessGroup)
    return own


_Plan = tuple[float, dict[int, float], list[int]]
_Heard = list[tuple[float, Tensor]]  # of each other, its weight and its message, or a piece of it


def _exchange_plan(matrix: csr_array, rank: int) -> _Plan:
    """Own weight, {peer heard: weight}, and the peers that hear this worker, from W."""
    row = matrix[[rank], :].tocoo()
    heard = {int(j): float(w) for j, w in zip(row.col, row.data, strict=True)}
    own_weight = heard.pop(rank, 0.0)
    column = matrix[:, [rank]].tocoo()
    hearers = sorted(int(i) for i in column.row if i != rank)
    return own_weight, dict(sorted(heard.items())), hearers
