"""The door to the network: mix along W(k), and the mean of all. Bytes are counted here.

Two sides of one interface. `StackedComm`, here, holds all n workers in one process, as rows of
[n, D]; `PeerComm`, in peer.py, is one worker, [D], and moves tensors through torch.distributed.
Replica is the one caller.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import embedding_bag

if TYPE_CHECKING:
    from decentral.mixing import Mixing


class Event(NamedTuple):
    """One thing that every worker did at a step, for the clock; `size` is bytes a message, `load`
    how much there was to compute, of a step with the batches that the config says."""

    kind: Literal["compute", "neighbours", "group", "everyone"]
    step: int
    size: int
    load: float = 1.0


Decode = Callable[[Tensor], Tensor]
# An exchange under way: call it once, to wait for what it gives. Of one in place: call it with the
# tensor, or with what that has become since a copy of it was sent, whose change comes on top.
Pending = Callable[[], Tensor]
Finish = Callable[[Tensor], None]


class PendingMean(Protocol):
    """A mean under way."""

    def __call__(self, into: Tensor | None = None) -> Tensor:
        """A new tensor; or `into`, which is overwritten: what was averaged, or like it."""
        ...


def as_it_is(message: Tensor) -> Tensor:
    """The decoder of a message that is no code."""
    return message


# Of the columns that `StackedComm.mix_` takes at a time, in all rows and in one, measured with
# benchmarks/mixing.py: a quarter of the second cache of a core; on a GPU so much that launches of
# kernels are few. A row of less than a kilobyte, of memory that lies far apart, is slow to fetch.
BLOCK_BYTES = {"cpu": 2**18, "cuda": 2**28}
LEAST_ROW_BYTES = 2**10

# What is no larger than the second cache of a core is not cut up: in blocks it would be copied
# twice.
WHOLE_BYTES = 2**21

# Of each mixing within a step, by its number: (step, what was mixed), the oldest first.
History = dict[int, list[tuple[int, Tensor]]]


class Comm(Protocol):
    """`bytes_sent` counts what this side sent so far: all workers stacked, or one worker.

    `events` grows by each exchange that is the method's; whoever reads it clears it. `history`
    is what may yet be heard late: it goes into a checkpoint.

    What is started goes on while the caller computes, counts as an event when it is over, and its
    tensor must not change before that. All workers start and end exchanges in the same order.
    """

    n: int
    bytes_sent: int
    events: list[Event]
    history: History

    @property
    def failure(self) -> Exception | None:
        """Of an exchange, after which this worker is alone."""
        ...

    def mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Tensor:
        """sum_j W(step)_ij decode(message_j), a new tensor.

        A message is [n, M] or [M] and goes over the wire as it is; `decode` makes [n, D] or [D]
        of it at the receiver. A worker's own message is decoded too.
        """
        ...

    def start_mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Pending: ...

    def mix_(self, x: Tensor, step: int) -> None:
        """x_i <- sum_j W(step)_ij x_j in place, x [n, D] or [D]."""
        ...

    def start_mix_(self, x: Tensor, step: int) -> Finish: ...

    def mean(self, x: Tensor, step: int, counted: bool = True) -> Tensor:
        """(1/n) sum_j x_j, a new tensor that broadcasts against x.

        `counted=False` for what recording needs and the method does not: it is no traffic of
        the method's, so it stays out of `bytes_sent` and `events`.
        """
        ...

    def start_mean(self, x: Tensor, step: int, counted: bool = True) -> PendingMean: ...

    def mean_of_others(self, x: Tensor, new: Tensor) -> Tensor:
        """The mean of x over the workers that are not `new`, bool [...]; it broadcasts against x.

        Not counted: it is no traffic of the method's.
        """
        ...

    def least(self, x: Tensor, step: int) -> Tensor:
        """min_j x_j, element by element, a new tensor that broadcasts against x."""
        ...

    def mean_of_group(self, x: Tensor, step: int) -> Tensor:
        """The mean of x over the worker's own group, a new tensor like x."""
        ...

    def start_mean_of_group(self, x: Tensor, step: int) -> PendingMean: ...

    # A message of its own for each neighbour, on an undirected static graph: "per link" tensors
    # are [links, M], a row for each (worker, neighbour) in this order, or [neighbours, M].

    def spread(self, x: Tensor) -> Tensor:
        """Per link, the worker's own x."""
        ...

    def collect(self, messages: Tensor) -> Tensor:
        """For each worker, the sum over its links: [links, M] -> [n, M]."""
        ...

    def swap(self, messages: Tensor, step: int) -> Tensor:
        """Send to each neighbour the message for it: per link, what the neighbour sent here."""
        ...


class StackedComm:
    """All workers in one process. Mixing is W times [n, D], the mean a mean of rows.

    What is started is computed when it is asked for: it takes no memory until then.

    groups: the members of each group, [k] each; every worker is in one, or there are none.
    """

    def __init__(
        self,
        n: int,
        mixing: "Mixing | None",
        dtype: torch.dtype,
        device: str = "cpu",
        groups: Sequence[np.ndarray] = (),
    ):
        self.n = n
        self.bytes_sent = 0
        self.events: list[Event] = []
        self.failure = None
        self.history: History = {}
        self._mixing = mixing
        self._dtype, self._device = accumulation_dtype(dtype), device
        # By id: those of the topology stay, and of the others the last, with its matrix.
        self._intact = {id(W): self._plan(W) for W in mixing.matrices} if mixing else {}
        self._other: tuple[csr_array, _Plan] | None = None
        self._at, self._call = -1, 0  # step and number of the last mixing
        self._groups = [torch.from_numpy(members).to(device) for members in groups]

    def mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Tensor:
        plan = self._counted(message, step)
        x = decode(message).to(self._dtype)
        return self._mix_late(x, step) if self._late else plan.apply(x)

    def mix_(self, x: Tensor, step: int) -> None:
        """As `mix`, a block of columns at a time: whole columns, since each row is still read."""
        plan = self._counted(x, step)
        if self._late:
            x.copy_(self._mix_late(x.to(self._dtype), step))
            return
        whole = self._fits(x) and nbytes(x) <= WHOLE_BYTES
        for block in (x,) if whole else x.split(self._columns, dim=1):
            block.copy_(plan.apply(self._staged(block)))

    def _counted(self, message: Tensor, step: int) -> "_Plan":
        """The plan of a step, whose messages are counted."""
        assert self._mixing is not None, "the method has a topology"
        plan = self._plan_of(self._mixing.matrix(step))
        self.bytes_sent += plan.messages * nbytes(message[0])
        self.events.append(Event("neighbours", step, nbytes(message[0])))
        return plan

    @property
    def _late(self) -> bool:
        assert self._mixing is not None, "the method has a topology"
        return bool(self._mixing.delays)

    def _staged(self, block: Tensor) -> Tensor:
        """Some columns as they are mixed: together, in the dtype of sums; good until the next.

        In memory that stays: an allocator may hand back what is freed, and each page that it
        fetches anew costs more than the sums on it.
        """
        if self._fits(block):
            return block
        staged = self._stage[: block.numel()].view(block.shape)
        return staged.copy_(block)

    def _fits(self, block: Tensor) -> bool:
        """Whether it is mixed as it is: on a GPU rows may lie apart."""
        together = self._device != "cpu" or block.is_contiguous()
        return together and block.dtype == self._dtype

    @cached_property
    def _columns(self) -> int:
        """Of a block: they stay in the cache, but for many workers' sake no row is cut finer."""
        block, row = BLOCK_BYTES[self._device], LEAST_ROW_BYTES
        return max(row, block // self.n) // self._dtype.itemsize

    @cached_property
    def _stage(self) -> Tensor:
        return torch.empty(self.n * self._columns, dtype=self._dtype, device=self._device)

    def start_mix(self, message: Tensor, step: int, decode: Decode = as_it_is) -> Pending:
        return lambda: self.mix(message, step, decode)

    def start_mix_(self, x: Tensor, step: int) -> Finish:
        def finish(own: Tensor) -> None:
            if own is x:
                self.mix_(x, step)
            else:
                own.sub_(x).add_(self.mix(x, step))

        return finish

    def _mix_late(self, x: Tensor, step: int) -> Tensor:
        """As `mix`, each message that is late as it was: the newest that is old enough."""
        assert self._mixing is not None
        delays = self._mixing.delays
        self._call = self._call + 1 if self._at == step else 0
        self._at = step
        past = self.history.setdefault(self._call, [])
        heard = {
            delay: [mixed for at, mixed in past if at <= step - delay][-1]
            for delay in delays
            if past and past[0][0] <= step - delay
        }
        now, late = self._mixing.split(step, heard)
        mixed = self._plan_of(now).apply(x)
        for delay, W in late.items():
            mixed += self._plan(W).apply(heard[delay])
        # What the most delayed message of the next step could be, and all since.
        past.append((step, x.clone()))
        while len(past) > 1 and past[1][0] <= step + 1 - max(delays):
            past.pop(0)
        return mixed

    def _plan_of(self, W: csr_array) -> "_Plan":
        intact = self._intact.get(id(W))
        if intact is not None:
            return intact
        if self._other is None or self._other[0] is not W:
            self._other = W, self._plan(W)
        return self._other[1]

    def _plan(self, W: csr_array) -> "_Plan":
        return _Plan(W, self._dtype, self._device)

    def mean(self, x: Tensor, step: int, counted: bool = True) -> Tensor:
        if counted:
            self.bytes_sent += all_reduce_bytes(nbytes(x[0]), self.n)
            self.events.append(Event("everyone", step, nbytes(x[0])))
        return x.mean(dim=0, keepdim=True)

    def start_mean(self, x: Tensor, step: int, counted: bool = True) -> PendingMean:
        return _later(lambda: self.mean(x, step, counted=counted))

    def mean_of_others(self, x: Tensor, new: Tensor) -> Tensor:
        return x[~new].mean(dim=0, keepdim=True)

    def least(self, x: Tensor, step: int) -> Tensor:
        self.bytes_sent += all_reduce_bytes(nbytes(x[0]), self.n)
        self.events.append(Event("everyone", step, nbytes(x[0])))
        return x.amin(dim=0, keepdim=True)

    def mean_of_group(self, x: Tensor, step: int) -> Tensor:
        self.events.append(Event("group", step, nbytes(x[0])))
        mean = torch.empty_like(x)
        for members in self._groups:
            self.bytes_sent += all_reduce_bytes(nbytes(x[0]), len(members))
            mean[members] = x[members].mean(dim=0)
        return mean

    def start_mean_of_group(self, x: Tensor, step: int) -> PendingMean:
        return _later(lambda: self.mean_of_group(x, step))

    def difference(self, x: Tensor, other: Tensor) -> Tensor:
        """What two workers that meet see: the other's x [D] minus one's own."""
        self.bytes_sent += 2 * nbytes(x)
        return other - x

    def spread(self, x: Tensor) -> Tensor:
        return x[self._links[0]]

    def collect(self, messages: Tensor) -> Tensor:
        total = messages.new_zeros(self.n, *messages.shape[1:])
        return total.index_add_(0, self._links[0], messages)

    def swap(self, messages: Tensor, step: int) -> Tensor:
        self.bytes_sent += nbytes(messages)
        size = nbytes(messages) // max(1, len(messages))
        self.events.append(Event("neighbours", step, size))
        return messages[self._links[1]]

    @cached_property
    def _links(self) -> tuple[Tensor, Tensor]:
        """Of each link (worker, neighbour), sorted: the worker, and the place of the reverse."""
        assert self._mixing is not None, "the method has a topology"
        entries = self._mixing.matrices[0].tocoo()
        between = entries.row != entries.col
        owner, other = entries.row[between], entries.col[between]
        order = np.lexsort((other, owner))
        owner, other = owner[order].astype(np.int64), other[order]
        back = np.lexsort((owner, other))
        return torch.from_numpy(owner).to(self._device), torch.from_numpy(back).to(self._device)


def _later(mean: Pending) -> PendingMean:
    def finish(into: Tensor | None = None) -> Tensor:
        return mean() if into is None else into.copy_(mean())

    return finish


def consecutive_groups(n: int, groups: int | None) -> list[np.ndarray]:
    """Workers 0 .. n-1 in so many blocks of neighbouring numbers, sizes equal or one apart.

    A block each where there are fewer workers than that.
    """
    return np.array_split(np.arange(n), min(groups, n)) if groups else []


def all_reduce_bytes(size: int, n: int) -> int:
    """Bytes that all n workers together send in a ring all-reduce of `size` bytes."""
    return 2 * (n - 1) * size


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of bfloat16 are taken in float32: eight bits would lose the mean."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def nbytes(x: Tensor) -> int:
    """Bytes of one message that carries x."""
    return x.numel() * x.element_size()


class _Plan:
    """A mixing matrix as what multiplies by it takes it; `messages` is how many it takes."""

    def __init__(self, W: csr_array, dtype: torch.dtype, device: str):
        entries = W.tocoo()
        self.messages = int(np.count_nonzero(entries.row != entries.col))
        self._columns = torch.from_numpy(W.indices.astype(np.int64)).to(device)
        ends = torch.from_numpy(W.indptr.astype(np.int64)).to(device)  # of rows, and before them 0
        self._starts = ends[:-1]
        self._weights = torch.from_numpy(W.data).to(device, dtype)
        self._sparse = None if device == "cpu" else _sparse(ends, self._columns, self._weights)

    def apply(self, x: Tensor) -> Tensor:
        """W x: on CPUs as weighted sums of rows, several times faster than a sparse product; on
        GPUs it is the other way round."""
        if self._sparse is not None:
            return torch.mm(self._sparse, x)
        return embedding_bag(
            self._columns, x, self._starts, mode="sum", per_sample_weights=self._weights
        )


def _sparse(ends: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    n = len(ends) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the format a beta
        return torch.sparse_csr_tensor(ends, columns, weights, (n, n), check_invariants=False)
