"""One worker's door to the network, over torch.distributed: the other side of comm.py."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import csr_array
from torch import Tensor

from decentral.comm import (
    Decode,
    Event,
    History,
    accumulation_dtype,
    all_reduce_bytes,
    as_it_is,
    nbytes,
)
from decentral.errors import StepError
from decentral.mixing import Mixing
from decentral.stopwatch import Stopwatch, timed

# Of a large message: there is work to do on one while the next ones come. At least so many bytes:
# each piece costs its calls.
PIECES, LEAST_PIECE = 8, 2**20


class PeerError(StepError):
    """An exchange failed: `peer` is the worker at its other end, None for an all-reduce."""

    def __init__(self, rank: int, step: int, peer: int | None, reason: str):
        super().__init__(rank, step, reason)
        self.peer = peer

    def __reduce__(self) -> tuple[Any, ...]:
        return PeerError, (self.rank, self.step, self.peer, self.reason)


class Patience:
    """How long a worker waits for others before it takes them for lost.

    `factor` times as long as it was itself busy since its last exchange, or its longest exchange
    so far took, whichever is more, and never less than FLOOR_S: so a long local phase is no death.
    Before the first exchange, when others may still be loading, `first_s`.
    """

    FLOOR_S = 10.0

    def __init__(self, factor: float, first_s: float):
        self._factor, self._first_s = factor, first_s
        self._longest_s: float | None = None
        self._free = time.perf_counter()  # when the last exchange, or this segment, began

    def begin(self) -> None:
        """A segment begins: what came before it was no work."""
        self._free = time.perf_counter()

    def deadline(self) -> timedelta:
        """For an exchange that begins now."""
        now = time.perf_counter()
        busy_s, self._free = now - self._free, now
        if self._longest_s is None:
            return timedelta(seconds=self._first_s)
        longest_s = max(busy_s, self._longest_s)
        return timedelta(seconds=max(self.FLOOR_S, self._factor * longest_s))

    def over(self) -> None:
        """The exchange is over, and went well."""
        now = time.perf_counter()
        self._longest_s = max(self._longest_s or 0.0, now - self._free)
        self._free = now


class PeerComm:
    """One worker of n; neighbours exchange whole buffers point to point.

    An exchange that fails raises PeerError; where `carries_on`, it does not: `failure` says why,
    and from then on the worker is alone. W is I and every mean its own value, so that a step which
    has begun ends as one without averaging.

    Receives are posted before sends: between two ranks gloo announces a receive in the queue of
    what it sends, so behind a large message the two directions would go one after the other.

    Where tensors are on a GPU and the backend is gloo, what is sent and received is
    staged in pinned host memory. On a GPU a mix takes the memory of one message for each neighbour
    that is heard, and no more: the sum is taken in the first one's.

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
        self._buffers: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Tensor:
        own_weight, heard, hearers = self._plan(step)
        own = decode(message)
        dtype = accumulation_dtype(own.dtype)
        sent = self._outgoing(message)
        received = {peer: self._incoming(peer, sent) for peer in heard}
        # What is to be decoded, or copied to a GPU, has to be there whole.
        whole = decode is not as_it_is or self._on_gpu
        pieces = 1 if whole else min(PIECES, max(1, nbytes(message) // LEAST_PIECE))
        arrivals = self._begin(dict.fromkeys(hearers, sent), received, step, pieces)
        # While messages are under way; on a GPU the sum is taken in the first one's memory.
        mixed = own.to(dtype) * own_weight if whole and not self._on_gpu else None
        if not whole and heard:
            mixed = torch.empty_like(own, dtype=dtype)
        for peer, piece in arrivals:
            if not whole:
                assert mixed is not None, "as it has been made"
                total = mixed.view(-1)[piece]
                # The own share by pieces too: all of it at once would keep the sending waiting.
                if peer == next(iter(heard)):
                    torch.mul(own.view(-1)[piece].to(dtype), own_weight, out=total)
                total.add_(received[peer].view(-1)[piece].to(dtype), alpha=heard[peer])
                continue
            theirs = decode(self._arrived(received.pop(peer))).to(dtype)
            if mixed is None:
                mixed = theirs.mul_(heard[peer]).add_(own.to(dtype), alpha=own_weight)
            else:
                mixed.add_(theirs, alpha=heard[peer])
        if self.failure is not None:
            return own.to(dtype, copy=True)
        self.bytes_sent += len(hearers) * nbytes(message)
        self.events.append(Event("neighbours", step, nbytes(message)))
        return own.to(dtype) * own_weight if mixed is None else mixed

    def mix_(self, x: Tensor, step: int) -> None:
        x.copy_(self.mix(x, step))

    def mean(self, x: Tensor, step: int, counted: bool = True) -> Tensor:
        total = self._all_reduce(x, step, counted=counted)
        return x.clone() if total is None else total.div_(self.n).to(x)

    def mean_of_others(self, x: Tensor, new: Tensor) -> Tensor:
        among = torch.cat([torch.zeros_like(x) if new else x, (~new).reshape(1).to(x)])
        total = self._all_reduce(among, 0, counted=False)
        return x.clone() if total is None else (total[:-1] / total[-1]).to(x)

    def least(self, x: Tensor, step: int) -> Tensor:
        least = self._all_reduce(x, step, dist.ReduceOp.MIN)
        return x.clone() if least is None else least.to(x)

    def mean_of_group(self, x: Tensor, step: int) -> Tensor:
        group = self._own_group
        assert group is not None, "the method has groups"
        total = self._all_reduce(x, step, group=group)
        return x.clone() if total is None else total.div_(group.size()).to(x)

    def difference(self, x: Tensor, peer: int, step: int) -> Tensor:
        """What two workers that meet see: the x [D] of `peer` minus one's own."""
        self.bytes_sent += nbytes(x)
        return self.trade(x, peer, step) - x  # 0 from a peer that is lost

    def trade(self, x: Tensor, peer: int, step: int) -> Tensor:
        """What `peer` sends while x goes to it, like x; not counted, and good until the next."""
        own = self._outgoing(x)
        theirs = self._incoming(peer, own)
        if not self._exchange({peer: own}, {peer: theirs}, step):
            return x
        return self._arrived(theirs)

    def spread(self, x: Tensor) -> Tensor:
        return x.expand(len(self._neighbours), *x.shape)

    def collect(self, messages: Tensor) -> Tensor:
        return messages.sum(dim=0)

    def swap(self, messages: Tensor, step: int) -> Tensor:
        sent = self._outgoing(messages.contiguous())
        received = self._incoming(_SWAPPED, sent)
        out, into = (dict(zip(self._neighbours, rows, strict=True)) for rows in (sent, received))
        if not self._exchange(out, into, step):
            return messages
        self.bytes_sent += nbytes(messages)
        self.events.append(Event("neighbours", step, nbytes(messages[:1])))
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
    def _all_reduce(
        self,
        x: Tensor,
        step: int,
        operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        counted: bool = True,
    ) -> Tensor | None:
        """The sum or least of x over the group, or all, in the dtype that sums are taken in.

        None if it failed, or was not tried after an earlier failure.
        """
        if self.failure is not None:
            return None
        dtype = accumulation_dtype(x.dtype)
        total = self._staged(_SUM, x, dtype) if self._stages else x.to(dtype, copy=True)
        # The deadline goes with the operation: one that is only waited for less long than it
        # runs would keep the group from closing.
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(operation)
        options.timeout = self.patience.deadline()
        try:
            everyone = group or dist.group.WORLD
            assert everyone is not None, "the worker has joined"
            everyone.allreduce([total], options).wait()
        except RuntimeError as error:
            self._fail(PeerError(self.rank, step, None, str(error)), error)
            return None
        self.patience.over()
        if counted:
            size, rank = (self.n, self.rank) if group is None else (group.size(), group.rank())
            # This worker's share, so that the shares of all add up to the whole exactly.
            whole = all_reduce_bytes(nbytes(x), size)
            self.bytes_sent += whole * (rank + 1) // size - whole * rank // size
            self.events.append(Event("everyone" if group is None else "group", step, nbytes(x)))
        return self._arrived(total)

    def _exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor], step: int) -> bool:
        """Send and receive at once, a message for, or from, each peer.

        False if that failed, or was not tried after an earlier failure.
        """
        for _ in self._begin(out, into, step):
            pass
        return self.failure is None

    @timed
    def _begin(
        self, out: Mapping[int, Tensor], into: Mapping[int, Tensor], step: int, pieces: int = 1
    ) -> Iterator[tuple[int, slice]]:
        """Put messages under way: an iterator over what comes, as (peer, piece of its message).

        Each message goes in so many pieces: there is work to do on one while the next ones come.
        The iterator is to be used up; after a failure it ends early.
        """
        if self.failure is not None:
            return iter(())
        deadline = self.patience.deadline()
        length = max((message.numel() for message in (*out.values(), *into.values())), default=0)
        cuts = [length * k // pieces for k in range(pieces + 1)]
        parts = [slice(*ends) for ends in itertools.pairwise(cuts)]
        # Receives first: gloo tells the other end of a receive in one queue with what it sends, and
        # behind a large message the two directions would go one after the other. And a piece to,
        # or of, each peer before the next pieces: all are served alike.
        coming = [(peer, part) for part in parts for peer in into]
        going = [(peer, part) for part in parts for peer in out]
        operations = [
            dist.P2POp(dist.irecv, into[peer].view(-1)[part], peer) for peer, part in coming
        ] + [dist.P2POp(dist.isend, out[peer].view(-1)[part], peer) for peer, part in going]
        works: list[tuple[int | None, dist.Work]] = []
        peer = None
        try:
            if not self._host:  # NCCL may have one work for all of them
                batch = dist.batch_isend_irecv(operations) if operations else []
                works = [(None, work) for work in batch]
            else:
                for operation in operations:
                    peer = operation.peer
                    work = operation.op(operation.tensor, peer, operation.group)
                    works.append((peer, work))
        except RuntimeError as error:
            self._fail(PeerError(self.rank, step, peer, str(error)), error)
            return iter(())
        return self._arrivals(coming, works, deadline, step)

    def _arrivals(
        self,
        coming: list[tuple[int, slice]],
        works: list[tuple[int | None, dist.Work]],
        deadline: timedelta,
        step: int,
    ) -> Iterator[tuple[int, slice]]:
        """Wait for `works`, the receives of what is `coming` first, and tell what has come."""
        for number, (peer, work) in enumerate(works):
            try:
                with self.stopwatch:
                    work.wait(deadline)
            except RuntimeError as error:
                self._fail(PeerError(self.rank, step, peer, str(error)), error)
                return
            if self._host and number < len(coming):
                yield coming[number]
        self.patience.over()
        if not self._host:
            yield from coming

    def let_go(self) -> None:
        """Drop the process groups, whose connections close only once nobody holds them."""
        self._own_group = None

    def _fail(self, failure: PeerError, cause: Exception) -> None:
        self.failure = failure
        if not self.carries_on:
            raise failure from cause

    @property
    def _stages(self) -> bool:
        return self._on_gpu and self._host

    def _outgoing(self, message: Tensor) -> Tensor:
        """The message where the backend takes it from: good until the next one is sent."""
        return self._staged(_SENT, message, message.dtype) if self._stages else message

    def _staged(self, use: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of x in pinned host memory, which the next one of that use overwrites.

        It waits for the GPU to have copied x, and with it all that came before: so whoever then
        receives into pinned memory overwrites nothing that `_arrived` has yet to copy.
        """
        copy = self._buffer(use, x.shape, dtype)
        copy.copy_(x, non_blocking=True)
        torch.cuda.current_stream(x.device).synchronize()
        return copy

    def _incoming(self, use: int, like: Tensor) -> Tensor:
        """Where to receive what is like `like`: on a GPU it is the caller's to keep."""
        return self._buffer(use, like.shape, like.dtype) if self._host else torch.empty_like(like)

    def _arrived(self, received: Tensor) -> Tensor:
        """What was received, on the worker's device."""
        return received.to(self._device, non_blocking=True)

    def _buffer(self, use: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """In host memory, one for each use: a peer that is heard, or one of those below 0."""
        kind = (use, shape, dtype)
        if kind not in self._buffers:
            self._buffers[kind] = torch.empty(shape, dtype=dtype, pin_memory=self._stages)
        return self._buffers[kind]


_SENT, _SUM, _SWAPPED = -1, -2, -3  # uses of a buffer, beside the peers


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


def _exchange_plan(matrix: csr_array, rank: int) -> _Plan:
    """Own weight, {peer heard: weight}, and the peers that hear this worker, from W."""
    row = matrix[[rank], :].tocoo()
    heard = {int(j): float(w) for j, w in zip(row.col, row.data, strict=True)}
    own_weight = heard.pop(rank, 0.0)
    column = matrix[:, [rank]].tocoo()
    hearers = sorted(int(i) for i in column.row if i != rank)
    return own_weight, dict(sorted(heard.items())), hearers
