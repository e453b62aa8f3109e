"""Gloo ranks on hosts with slow network cards, and their timings: what such benchmarks share.

Hosts are network namespaces on this machine, as the tests have them: needs root and iproute2.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import hosts

PORT = 5001


def check_hosts() -> None:
    """Exit, and say why, where no hosts can be made; and have them removed if this is ended."""
    reason = hosts.why_not()
    if reason is not None:
        typer.echo(f"no hosts can be made here: {reason}", err=True)
        raise typer.Exit(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def on_hosts(made: hosts.Hosts, script: str, *options: str) -> Any:
    """Run `script --rank=i` on host i, on all at once: what the first one prints at last, JSON."""
    commands = [(sys.executable, script, f"--rank={i}", *options) for i in range(len(made.names))]
    others = [made.start(i, *commands[i]) for i in range(1, len(commands))]
    done = made.run(0, *commands[0], timeout_s=1800)
    for other in others:
        other.wait(timeout=60)
    return json.loads(done.stdout.splitlines()[-1])


def join(rank: int, n: int) -> None:
    """Open the group of n, one on each host, each with a thread for what it computes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    store = dist.TCPStore("10.77.0.1", PORT, n, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)


class Times(NamedTuple):
    """Of each act, round by round, per call: seconds until the last rank is done, and seconds of
    processors, of all ranks together, which other programs on the machine touch less."""

    seconds: dict[str, list[float]]
    processor_s: dict[str, list[float]]


def in_turns(
    acts: Mapping[str, Callable[[int], object]],
    rounds: int,
    in_a_row: int,
    prepare: Callable[[str], object] = lambda name: None,
) -> Times:
    """Time each act, called with 0 .. in_a_row - 1.

    All take turns, round by round, each time in another order, drawn, so that none comes behind the
    same one; a round before is to warm up. `prepare` and a call before each turn are not timed, so
    that what a call leaves under way is so at both ends.
    """
    times = Times({name: [] for name in acts}, {name: [] for name in acts})
    for number in range(rounds + 1):
        for name in random.Random(number).sample([*acts], len(acts)):
            prepare(name)
            dist.barrier()
            acts[name](in_a_row - 1)
            began, worked = time.perf_counter(), time.process_time()
            for step in range(in_a_row):
                acts[name](step)
            took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            work = torch.tensor([time.process_time() - worked], dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            dist.all_reduce(work)
            if number:
                times.seconds[name].append(took.item() / in_a_row)
                times.processor_s[name].append(work.item() / in_a_row)
    return times
