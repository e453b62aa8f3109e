"""One exchange with peers over torch.distributed: messages both ways at once, piece by piece."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

# Those that have begun and that nobody has waited for. Kept, for gloo drops a message whose tensor
# is gone, and the receiver would take the next one for it.
_under_way: set["Exchange"] = set()

Messages = Mapping[int, Sequence[Tensor]]  # of each peer, cut as `pieces_of` does


class ExchangeError(Exception):
    """What torch.distributed said of the exchange with `peer`; None: with one of several."""

    def __init__(self, peer: int | None, reason: str):
        super().__init__(reason)
        self.peer = peer


class Exchange:
    """A message for each peer of `out`, and one from each of `into`, all in as many pieces.

    Whoever has begun it waits once for each of its `pieces`; an ExchangeError ends it.

    ahead: how many pieces may be on their way out, all by default. With few, none of several peers
    is served long before another, which would leave links idle at the end; but the others leave in
    `wait` alone. Each end has a number of its own.

    together: all in one call, as NCCL wants it, and in one piece.
    """

    def __init__(
        self,
        out: Messages,
        into: Messages,
        ahead: int | None = None,
        together: bool = False,
    ):
        self.pieces = max((len(parts) for parts in (*out.values(), *into.values())), default=0)
        self._out, self._sent = out, 0
        # Of each piece that is not yet through: the works, and whom with.
        self._works: list[list[tuple[int | None, dist.Work]]] = [[] for _ in range(self.pieces)]
        if together:
            self._post_together(into)
        else:
            # Receives first: gloo tells the other end of a receive in one queue with what it sends,
            # and behind a large message the two directions would go one after the other.
            for number, works in enumerate(self._works):
                self._post(dist.irecv, into, number, works)
            self._send(self.pieces if ahead is None else ahead)
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
        self._sent = self.pieces

    def _send(self, pieces: int) -> None:
        first, self._sent = self._sent, min(self.pieces, self._sent + pieces)
        through = self.pieces - len(self._works)
        for number in range(first, self._sent):
            self._post(dist.isend, self._out, number, self._works[number - through])

    def _post(
        self,
        call: Callable[[Tensor, int], dist.Work | None],
        messages: Messages,
        number: int,
        works: list[tuple[int | None, dist.Work]],
    ) -> None:
        for peer, parts in messages.items():
            try:
                work = call(parts[number], peer)
            except RuntimeError as error:
                works.clear()
                raise self._error(peer, error) from error
            assert work is not None, "this worker is in the group"
            works.append((peer, work))

    def _post_together(self, into: Messages) -> None:
        calls = [
            dist.P2POp(call, parts[0], peer)
            for call, messages in ((dist.irecv, into), (dist.isend, self._out))
            for peer, parts in messages.items()
        ]
        self._sent = self.pieces
        try:
            for work in dist.batch_isend_irecv(calls) if calls else ():
                self._works[0].append((None, work))
        except RuntimeError as error:
            raise self._error(None, error) from error

    def _error(self, peer: int | None, error: RuntimeError) -> ExchangeError:
        self.let_go()
        return ExchangeError(peer, str(error))


def pieces_of(message: Tensor, size: int | None) -> Sequence[Tensor]:
    """The message in pieces of so many rows each, or whole."""
    return (message,) if size is None or len(message) <= size else message.split(size)
