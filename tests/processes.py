"""Run a function on n gloo ranks, each a spawned process: for tests of what crosses processes."""

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_on_ranks(n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on every rank, in a gloo group; its results by rank.

    `function` must be importable; an error on any rank is raised here with its traceback.
    """
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_main, args=(rank, n, port, queue, function, arguments), daemon=True)
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(n):
            rank, result, error = queue.get(timeout=120)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(n)]


def _main(rank, n, port, queue, function, arguments):
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, n, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
        result = function(rank, *arguments)
        _meet(store, rank, n)  # not in the group, which may be what the function has broken
        queue.put((rank, result, None))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def _meet(store, rank, n):
    """Return when all ranks are here; rank 0, whose store it is, when all the others have left."""
    store.set(f"here {rank}", "")
    store.wait([f"here {other}" for other in range(n)])
    store.set(f"left {rank}", "")
    if rank == 0 and n > 1:
        store.wait([f"left {other}" for other in range(1, n)])
