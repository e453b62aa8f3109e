"""One exchange with peers over torch.distributed: messages both ways at once, piece by piece."""

from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

# Those that have begun and that nobody has waited for. Kept, for gloo drops a message whose tensor
# is gone, and the receiver would take the next one for it.
_under_way: set["Exchange"] = set()

Piece = list[tuple[int, Tensor]]  # of all messages one way: the peer, and the part


class ExchangeError(Exception):
    """What torch.distributed said of the exchange with `peer`; None: with one of several."""

    def __init__(self, peer: int | None, reason: str):
        super().__init__(reason)
        self.peer = peer


class Exchange:
    """A message for each peer of `out`, and one from each of `into`, all of one length.

    They go in `pieces` of `size` elements, or as they are. Whoever has begun waits once for each
    piece; an ExchangeError ends it.

    ahead: how many pieces may be on their way out, all by default. With few, none of several peers
    is served long before another, which would leave links idle at the end; but the others leave in
    `wait` alone. Each end has a number of its own.

    together: all in one call, as NCCL wants it, and in one piece.
    """

    def __init__(
        self,
        out: Mapping[int, Tensor],
        into: Mapping[int, Tensor],
        size: int | None = None,
        ahead: int | None = None,
        together: bool = False,
    ):
        receives, sends = pieces_of(into, size), pieces_of(out, size)
        self.pieces = len(receives or sends)
        # Of each piece that is not yet through: the works, and whom with.
        self._works: list[list[tuple[int | None, dist.Work]]] = [[] for _ in range(self.pieces)]
        self._unsent = list(zip(self._works, sends, strict=False))
        if together:
            self._post_together(receives, sends)
        else:
            # Receives first: gloo tells the other end of a receive in one queue with what it sends,
            # and behind a large message the two directions would go one after the other.
            for works, piece in zip(self._works, receives, strict=False):
                self._post(dist.irecv, piece, works)
            self._send(len(sends) if ahead is None else ahead)
        _under_way.add(self)

    def wait(self, deadline: timedelta) -> None:
        """Wait for the next piece, of all messages; each no longer than that."""
        _under_way.discard(self)
        works = self._works.pop(0)
        while works:
            peer, work = works.pop(0)
            try:
                work.wait(deadline)
            except RuntimeError as error:
                works.clear()
                del work
                raise self._error(peer, error) from error
        self._send(1)

    def let_go(self) -> None:
        """Of all works. Who holds one, in a frame of a traceback too, holds a connection, which
        must close at once after a failure."""
        _under_way.discard(self)
        self._works.clear()
        self._unsent.clear()

    def _send(self, pieces: int) -> None:
        now, self._unsent = self._unsent[:pieces], self._unsent[pieces:]
        for works, piece in now:
            self._post(dist.isend, piece, works)

    def _post(
        self,
        call: Callable[[Tensor, int], dist.Work | None],
        piece: Piece,
        works: list[tuple[int | None, dist.Work]],
    ) -> None:
        for peer, part in piece:
            try:
                work = call(part, peer)
            except RuntimeError as error:
                works.clear()
                raise self._error(peer, error) from error
            assert work is not None, "this worker is in the group"
            works.append((peer, work))

    def _post_together(self, receives: list[Piece], sends: list[Piece]) -> None:
        self._unsent.clear()
        calls = [
            dist.P2POp(call, part, peer)
            for call, pieces in ((dist.irecv, receives), (dist.isend, sends))
            for piece in pieces
            for peer, part in piece
        ]
        try:
            for work in dist.batch_isend_irecv(calls) if calls else ():
                self._works[0].append((None, work))
        except RuntimeError as error:
            raise self._error(None, error) from error

    def _error(self, peer: int | None, error: RuntimeError) -> ExchangeError:
        self.let_go()
        return ExchangeError(peer, str(error))


def pieces_of(messages: Mapping[int, Tensor], size: int | None = None) -> list[Piece]:
    """Messages cut into pieces, so many elements each or whole: of each, all peers' parts."""
    parts = [
        [(peer, part) for part in (message.split(size) if size else [message])]
        for peer, message in messages.items()
    ]
    return [list(piece) for piece in zip(*parts, strict=True)]
