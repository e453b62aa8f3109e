"""One worker's door to the network, over torch.distributed: the other side of comm.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import csr_array
from torch import Tensor

from decentral.comm import (
    Decode,
    Event,
    accumulation_dtype,
    all_reduce_bytes,
    as_it_is,
    nbytes,
)
from decentral.errors import StepError
from decentral.stopwatch import Stopwatch, timed
from decentral.topology import Topology


class PeerError(StepError):
    """An exchange failed: `peer` is the worker at its other end, None for an all-reduce."""

    def __init__(self, rank: int, step: int, peer: int | None, reason: str):
        super().__init__(rank, step, reason)
        self.peer = peer

    def __reduce__(self) -> tuple[Any, ...]:
        return PeerError, (self.rank, self.step, self.peer, self.reason)


class PeerComm:
    """One worker of n; neighbours exchange whole buffers point to point.

    A gloo connection between two ranks is half-duplex in practice, so two groups carry the
    messages: the first of `groups` those to a higher rank, the second those to a lower one. NCCL
    needs none. Buffers on a GPU are staged through host memory where the backend is gloo.

    `own_group` averages by itself, where the method has such groups. turn_steps: the steps that
    one turn of the topology's sequence lasts. device: where the tensors are; `stopwatch` has the
    seconds in exchanges there.
    """

    def __init__(
        self,
        topology: Topology | None,
        ways: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        own_group: dist.ProcessGroup | None = None,
        turn_steps: int = 1,
        device: str = "cpu",
    ):
        self.rank = dist.get_rank()
        self.n = dist.get_world_size()
        self.bytes_sent = 0
        self.events: list[Event] = []
        self.stopwatch = Stopwatch(device)
        self._up, self._down = ways or (None, None)
        self._own_group = own_group
        self._turn_steps = turn_steps
        self._host = dist.get_backend() == "gloo"
        self._plans = [_exchange_plan(w, self.rank) for w in topology.matrices] if topology else []
        self._received: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Tensor:
        turn = step // self._turn_steps
        own_weight, heard, hearers = self._plans[turn % len(self._plans)]
        own = decode(message)
        if self._host:
            message = message.cpu()
        received = {peer: self._buffer(peer, message) for peer in heard}
        self._exchange(dict.fromkeys(hearers, message), received, step)
        self.bytes_sent += len(hearers) * nbytes(message)
        self.events.append(Event("neighbours", step, nbytes(message)))
        mixed = own.to(accumulation_dtype(own.dtype)) * own_weight
        for peer, weight in heard.items():
            mixed.add_(decode(received[peer].to(own.device)).to(mixed), alpha=weight)
        return mixed

    def mean(self, x: Tensor, step: int, counted: bool = True) -> Tensor:
        return self._all_reduce(x, step, counted=counted).div_(self.n).to(x)

    def least(self, x: Tensor, step: int) -> Tensor:
        return self._all_reduce(x, step, dist.ReduceOp.MIN).to(x)

    def mean_of_group(self, x: Tensor, step: int) -> Tensor:
        group = self._own_group
        assert group is not None, "the method has groups"
        return self._all_reduce(x, step, group=group).div_(group.size()).to(x)

    def difference(self, x: Tensor, peer: int, step: int) -> Tensor:
        """What two workers that meet see: the x [D] of `peer` minus one's own."""
        self.bytes_sent += nbytes(x)
        return self.trade(x, peer, step) - x

    def trade(self, x: Tensor, peer: int, step: int) -> Tensor:
        """What `peer` sends while x goes to it, like x; not counted, and good until the next."""
        own = x.to("cpu" if self._host else x.device)
        theirs = self._buffer(peer, own)
        self._exchange({peer: own}, {peer: theirs}, step)
        return theirs.to(x.device)

    def spread(self, x: Tensor) -> Tensor:
        return x.expand(len(self._neighbours), *x.shape)

    def collect(self, messages: Tensor) -> Tensor:
        return messages.sum(dim=0)

    def swap(self, messages: Tensor, step: int) -> Tensor:
        device = messages.device
        messages = messages.to("cpu" if self._host else device).contiguous()
        received = torch.empty_like(messages)
        out, into = (
            dict(zip(self._neighbours, rows, strict=True)) for rows in (messages, received)
        )
        self._exchange(out, into, step)
        self.bytes_sent += nbytes(messages)
        self.events.append(Event("neighbours", step, nbytes(messages[:1])))
        return received.to(device)

    @property
    def _neighbours(self) -> list[int]:
        return self._plans[0][2]

    @timed
    def _all_reduce(
        self,
        x: Tensor,
        step: int,
        operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        counted: bool = True,
    ) -> Tensor:
        """The sum or least of x over the group, or all, in the dtype that sums are taken in."""
        total = x.to("cpu" if self._host else x.device, accumulation_dtype(x.dtype), copy=True)
        try:
            dist.all_reduce(total, operation, group)
        except RuntimeError as error:
            raise PeerError(self.rank, step, None, str(error)) from error
        if counted:
            size, rank = (self.n, self.rank) if group is None else (group.size(), group.rank())
            # This worker's share, so that the shares of all add up to the whole exactly.
            whole = all_reduce_bytes(nbytes(x), size)
            self.bytes_sent += whole * (rank + 1) // size - whole * rank // size
            self.events.append(Event("everyone" if group is None else "group", step, nbytes(x)))
        return total

    @timed
    def _exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor], step: int) -> None:
        """Send and receive at once, a message for, or from, each peer."""
        # Receives first: a message that finds its buffer waiting needs no copy.
        operations = [
            dist.P2POp(dist.irecv, buffer, peer, self._from(peer)) for peer, buffer in into.items()
        ] + [dist.P2POp(dist.isend, message, peer, self._to(peer)) for peer, message in out.items()]
        peer = None
        try:
            if not self._host:
                for work in dist.batch_isend_irecv(operations) if operations else []:
                    work.wait()
                return
            works = []
            for operation in operations:
                peer = operation.peer
                works.append(operation.op(operation.tensor, peer, operation.group))
            for operation, work in zip(operations, works, strict=True):
                peer = operation.peer
                work.wait()
        except RuntimeError as error:
            raise PeerError(self.rank, step, peer, str(error)) from error

    def _to(self, peer: int) -> dist.ProcessGroup | None:
        return self._up if peer > self.rank else self._down

    def _from(self, peer: int) -> dist.ProcessGroup | None:
        return self._down if peer > self.rank else self._up

    def _buffer(self, peer: int, like: Tensor) -> Tensor:
        kind = (peer, like.shape, like.dtype)
        if kind not in self._received:
            self._received[kind] = torch.empty_like(like)
        return self._received[kind]


def two_ways() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """A group for messages to higher ranks and one for those to lower; all ranks must call it."""
    up, down = dist.new_group(), dist.new_group()
    assert isinstance(up, dist.ProcessGroup)
    assert isinstance(down, dist.ProcessGroup)
    return up, down


def own_group(groups: Sequence[np.ndarray]) -> dist.ProcessGroup | None:
    """Open a process group for each group of workers; this worker's. All ranks must call it."""
    own = None
    for members in groups:
        group = dist.new_group(members.tolist())
        if dist.get_rank() in members:
            own = group
    assert own is None or isinstance(own, dist.ProcessGroup)
    return own


def _exchange_plan(matrix: csr_array, rank: int) -> tuple[float, dict[int, float], list[int]]:
    """Own weight, {peer heard: weight}, and the peers that hear this worker, from W."""
    row = matrix[[rank], :].tocoo()
    heard = {int(j): float(w) for j, w in zip(row.col, row.data, strict=True)}
    own_weight = heard.pop(rank, 0.0)
    column = matrix[:, [rank]].tocoo()
    hearers = sorted(int(i) for i in column.row if i != rank)
    return own_weight, dict(sorted(heard.items())), hearers
