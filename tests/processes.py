"""Run a function on n gloo ranks, each a process: for tests of what crosses processes.

The processes stay for the next call, for each takes seconds to import torch. On Linux they are
forked from one that has done so, but not where there is CUDA, of which a fork may have halves.
"""

import multiprocessing
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_S = 120.0
IMPORTED = ["pytest", "pandas", "torch._dynamo", "decentral.engines.worker"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class _Process:
    """One process that serves as a rank, call after call."""

    def __init__(self) -> None:
        context = _context()
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _context() -> ForkServerContext | SpawnContext:
    """What processes come from."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


_PROCESSES: list[_Process] = []


def run_on_ranks(
    n: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = PATIENCE_S
) -> list[Any]:
    """`function(rank, *arguments)` on every rank, in a gloo group; its results by rank.

    `function` must be importable; an error on any rank is raised here with its traceback.
    """
    while len(_PROCESSES) < n:
        _PROCESSES.append(_Process())
    port, deadline = free_port(), time.monotonic() + timeout_s
    ranks = {process.connection: rank for rank, process in enumerate(_PROCESSES[:n])}
    results: dict[int, Any] = {}
    try:
        for connection, rank in ranks.items():
            connection.send((rank, n, port, function, arguments))
        while len(results) < n:
            awaited = [connection for connection in ranks if ranks[connection] not in results]
            ready = wait(awaited, deadline - time.monotonic())
            assert ready, f"only ranks {sorted(results)} have come to an end"
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    results[rank], error = connection.recv()
                except EOFError:
                    error = "its process died"
                if error:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
    except BaseException:  # who knows what the others wait for
        while _PROCESSES:
            _PROCESSES.pop().end()
        raise
    return [results[rank] for rank in range(n)]


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        connection.send(_answer(*call))


def _answer(rank, n, port, function, arguments):
    try:
        # Groups meet under a number that each process counts up by itself, in other groups too.
        dist.distributed_c10d._world.group_count = 0
        store = dist.TCPStore("127.0.0.1", port, n, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
        result = function(rank, *arguments)
        _meet(store, rank, n)  # not in the group, which may be what the function has broken
        dist.destroy_process_group()
        return result, None
    except BaseException:
        return None, traceback.format_exc()


def _meet(store, rank, n):
    """Return when all ranks are here; rank 0, whose store it is, when all the others have left."""
    store.set(f"here {rank}", "")
    store.wait([f"here {other}" for other in range(n)])
    store.set(f"left {rank}", "")
    if rank == 0 and n > 1:
        store.wait([f"left {other}" for other in range(1, n)])
