"""The mixing matrix in force at a step: the topology's, less what faults take out of it.

`StackedComm` multiplies with it, `PeerComm` sends along it; experiment.py makes one for each.

What a link that is out does to W. The share W_ij that i gives to what it hears from j goes to
somebody's own share, so that no mass appears or vanishes:

    the receiver keeps    W_ii += W_ij    rows still sum to 1: each worker has an average
    the sender keeps      W_jj += W_ij    columns still sum to 1: the sum over workers is kept

An exchange that is out takes W_ij and W_ji. Where W is symmetric, as that of an undirected graph
with weights that mix to the mean is, row and column i then change by -W_ij + W_ij = 0, the same
by either rule: W stays symmetric and doubly stochastic, and the mean is kept exactly.

A single message, or W not symmetric (directed graphs): the rule keeps its own sums alone. Where
the receiver keeps, each entry off the diagonal is out with the same probability p, so
E[W'] = (1 - p) W + p I, which is doubly stochastic if W is: the mean is kept in expectation, and
walks at random. Where the sender keeps, as push-sum needs it, sums are kept, and x / w still goes
to the true mean.
"""

from collections.abc import Collection, Sequence

import numpy as np
from scipy.sparse import csr_array

from decentral.faults import Faults, MessageFaults
from decentral.topology import Topology


class Mixing:
    """W(k) among `members`, whose ids are sorted; row r of the topology is worker members[r].

    members: by default all, row by row. turn_steps: the steps that one turn of the topology's
    sequence lasts. sender_keeps: of a share that is lost, the sender has it, not the receiver.
    """

    def __init__(
        self,
        topology: Topology,
        faults: Faults | None = None,
        members: Sequence[int] | None = None,
        turn_steps: int = 1,
        sender_keeps: bool = False,
    ):
        self.matrices = topology.matrices
        self.delays = faults.delays if faults is not None else ()
        self._faults = faults
        self._ids = np.arange(topology.n) if members is None else np.array(members, dtype=np.int64)
        self._turn_steps = turn_steps
        self._sender_keeps = sender_keeps
        self._entries: dict[int, tuple[_Entries, MessageFaults]] = {}  # by turn of the sequence
        self._last: dict[int, tuple[np.ndarray, csr_array]] = {}  # what was out, and W without it
        self._now: tuple[int, csr_array] | None = None  # the last step asked for

    def matrix(self, step: int) -> csr_array:
        """W(step), csr_array [m, m].

        The topology's own object where no link is out, and as long as the same ones are, the same
        object as before.
        """
        turn = step // self._turn_steps % len(self.matrices)
        if self._faults is None or not self._faults.touches_links(step):
            return self.matrices[turn]
        if self._now is None or self._now[0] != step:
            self._now = step, self._drawn(turn, step)
        return self._now[1]

    def _drawn(self, turn: int, step: int) -> csr_array:
        entries, messages = self._entries_of(turn)
        lost = messages.lost(step)
        if not lost.any():
            return self.matrices[turn]
        last = self._last.get(turn)
        if last is None or not np.array_equal(last[0], lost):
            last = self._last[turn] = lost, entries.without(lost, self._sender_keeps)
        return last[1]

    def split(self, step: int, there: Collection[int]) -> tuple[csr_array, dict[int, csr_array]]:
        """W(step) as what is heard now, and by its delay what is heard as it was then.

        Together they have rows that sum to 1. A message whose delay is not `there`, for want of an
        older one, is lost.
        """
        turn = step // self._turn_steps % len(self.matrices)
        if self._faults is None or not self._faults.touches_links(step):
            return self.matrices[turn], {}
        entries, messages = self._entries_of(turn)
        lost, late = messages.lost(step), messages.late(step)
        lost |= (late > 0) & ~np.isin(late, list(there))
        late[lost] = 0
        if not (lost.any() or late.any()):
            return self.matrices[turn], {}
        now = entries.without(lost, self._sender_keeps, late > 0)
        return now, {int(d): entries.only(late == d) for d in np.unique(late[late > 0])}

    def _entries_of(self, turn: int) -> "tuple[_Entries, MessageFaults]":
        assert self._faults is not None
        if turn not in self._entries:
            entries = _Entries(self.matrices[turn])
            messages = self._faults.of_messages(
                self._ids[entries.sender], self._ids[entries.receiver]
            )
            self._entries[turn] = entries, messages
        return self._entries[turn]


class _Entries:
    """The entries of a W, row by row, every diagonal one among them; messages are the others."""

    def __init__(self, W: csr_array):
        self._n = n = len(W.indptr) - 1
        entries = W.tocoo()
        between = entries.row != entries.col
        row = np.concatenate([entries.row[between], np.arange(n)]).astype(np.int64)
        col = np.concatenate([entries.col[between], np.arange(n)]).astype(np.int64)
        order = np.lexsort((col, row))
        self._row, self._col = row[order], col[order]
        self._data = np.concatenate([entries.data[between], W.diagonal()])[order]
        self._own = np.flatnonzero(self._row == self._col)
        self._message = np.flatnonzero(self._row != self._col)
        self.receiver, self.sender = self._row[self._message], self._col[self._message]

    def without(
        self, lost: np.ndarray, sender_keeps: bool, elsewhere: np.ndarray | None = None
    ) -> csr_array:
        """W less the `lost` messages, whose shares are kept, and less those `elsewhere`."""
        keeper = (self.sender if sender_keeps else self.receiver)[lost]
        share = self._data[self._message[lost]]
        data = self._data.copy()
        data[self._own] += np.bincount(keeper, weights=share, minlength=self._n)
        stays = np.ones(len(data), dtype=bool)
        stays[self._message] = ~lost if elsewhere is None else ~(lost | elsewhere)
        return self._matrix(data, stays)

    def only(self, heard: np.ndarray) -> csr_array:
        """The shares of these messages."""
        stays = np.zeros(len(self._data), dtype=bool)
        stays[self._message] = heard
        return self._matrix(self._data, stays)

    def _matrix(self, data: np.ndarray, stays: np.ndarray) -> csr_array:
        ends = np.cumsum(np.bincount(self._row[stays], minlength=self._n))
        starts = np.concatenate([[0], ends])
        return csr_array((data[stays], self._col[stays], starts), shape=(self._n, self._n))
