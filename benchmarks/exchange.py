"""How much of a link do exchanges with neighbours fill? Four hosts, 10 MB a message, beside torch.

Hosts are network namespaces on this machine, whose cards a token bucket holds to a rate in each
direction; one gloo rank on each. What workers do at a step, mixing included, takes turns with
torch's own calls: `batch_isend_irecv` in one group, which moves the bytes and adds nothing up, and
`all_reduce`. Needs root and iproute2.

    nice -n -15 python benchmarks/exchange.py --out benchmarks/results/exchange.json

Of the link means: bytes of parameters that a card sends, and as many that it hears at the same
time, over what the rate would let pass one way. Ethernet, IP and TCP take 66 of 1514 bytes, and
acknowledgements of what comes the other way some more: 0.956 is the most there is.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import ranks
import torch
import torch.distributed as dist
import typer
from ranks import hosts
from rich import box
from rich.console import Console
from rich.table import Table
from segments import median_ratio
from torch import Tensor

HOSTS = 4
IN_A_ROW = 4  # exchanges a timing: whole periods of each sequence, and no pause to save up for
# What is exchanged along; messages that a card sends, and hears, at a step.
TOPOLOGIES = {
    "pair": ("hyper_hypercube", 1),
    "ring": ("ring", 2),
    "one peer": ("one_peer_exponential", 1),
}
TORCHS = "sends first", "receives first"  # as torch's documentation has it, and as decentral does


def main(
    rate: Annotated[list[float] | None, typer.Option(help="Mbit/s; may be repeated.")] = None,
    megabytes: Annotated[float, typer.Option(min=0.001, help="A message.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Of all, after one to warm up.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
    rank: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time exchanges between bandwidth-limited hosts, decentral's and torch's in turns."""
    rates = rate or [200.0, 1000.0]
    floats = round(megabytes * 1e6 / 4)
    if rank is not None:
        print(json.dumps(measure(rank, floats, rounds)))
        return
    ranks.check_hosts()
    load, start = os.getloadavg()[0], time.perf_counter()
    console = Console()
    rows = []
    with hosts.hosts(HOSTS, rates[0]) as made:
        for mbit in rates:
            made.set_rate(mbit)
            sizes = (f"--megabytes={megabytes}", f"--rounds={rounds}")
            seconds = ranks.on_hosts(made, __file__, *sizes)
            rows += [row(name, mbit, 4 * floats, seconds) for name in TOPOLOGIES]
            console.print(table(rows[-len(TOPOLOGIES) :], mbit, megabytes))
    if out is not None:
        result = {
            "benchmark": "exchange",
            "settings": {"hosts": HOSTS, "megabytes": megabytes, "rounds": rounds}
            | {"in_a_row": IN_A_ROW, "network": "namespaces, tbf, reno, MTU 1500"},
            "exchanges": rows,
            "seconds": time.perf_counter() - start,
            "machine": machine.describe(load),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def measure(rank: int, floats: int, rounds: int) -> dict[str, list[float]]:
    """On one host: seconds of each kind of exchange until the last rank is done, round by round."""
    from decentral import topology as topologies
    from decentral.mixing import Mixing
    from decentral.peer import PeerComm

    ranks.join(rank, HOSTS)
    x = torch.ones(floats)
    exchanges: dict[str, Callable[[int], object]] = {}
    for name, (topology, _) in TOPOLOGIES.items():
        mixing = Mixing(topologies.build(HOSTS, topology))
        comm = PeerComm(mixing)
        exchanges[name] = lambda step, comm=comm: comm.mix_(x, step)
        plans = [peers(matrix, rank) for matrix in mixing.matrices]
        for order in TORCHS:
            exchanges[f"{name}, {order}"] = torchs_own(plans, x, order)
    zeros = torch.zeros_like(x)  # which stay so when they are added up
    exchanges["all-reduce"] = lambda step: dist.all_reduce(zeros)
    seconds = ranks.in_turns(exchanges, rounds, IN_A_ROW).seconds
    dist.destroy_process_group()
    return seconds


def peers(matrix: Any, rank: int) -> tuple[list[int], list[int]]:
    """Whom a rank sends to, and whom it hears, along a mixing matrix."""
    W = matrix.toarray()
    others = [i for i in range(len(W)) if i != rank]
    return [i for i in others if W[i, rank]], [j for j in others if W[rank, j]]


def torchs_own(
    plans: list[tuple[list[int], list[int]]], x: Tensor, order: str
) -> Callable[[int], None]:
    """The same messages by one call to torch, in one group, into buffers that are kept."""
    buffers = {peer: torch.empty_like(x) for _, heard in plans for peer in heard}

    def exchange(step: int) -> None:
        hearers, heard = plans[step % len(plans)]
        sends = [dist.P2POp(dist.isend, x, peer) for peer in hearers]
        receives = [dist.P2POp(dist.irecv, buffers[peer], peer) for peer in heard]
        both = sends + receives if order == "sends first" else receives + sends
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return exchange


def row(name: str, mbit: float, size: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What there is to say of one kind of exchange; `size`: bytes of a message."""
    messages = TOPOLOGIES[name][1]
    own, everyone = seconds[name], seconds["all-reduce"]
    torchs = {order.replace(" ", "_"): seconds[f"{name}, {order}"] for order in TORCHS}
    message_s = size * 8 / (mbit * 1e6)
    around = 2 * (HOSTS - 1) / HOSTS  # messages that an all-reduce in a ring sends and hears
    return {
        "exchange": name,
        "mbit": mbit,
        "messages_each_way": messages,
        "ms": statistics.median(own) * 1e3,
        "of_the_link": messages * message_s / statistics.median(own),
        "of_the_link_best": messages * message_s / min(own),
        "ratio_to_all_reduce": median_ratio(own, everyone),
        "all_reduce": {
            "ms": statistics.median(everyone) * 1e3,
            "of_the_link": around * message_s / statistics.median(everyone),
        },
        "torch": {
            order: {
                "ms": statistics.median(times) * 1e3,
                "of_the_link": messages * message_s / statistics.median(times),
                "ratio": median_ratio(own, times),
            }
            for order, times in torchs.items()
        },
        "ms_of_each": [s * 1e3 for s in own],
    }


def table(rows: list[dict[str, Any]], mbit: float, megabytes: float) -> Table:
    everyone = rows[0]["all_reduce"]
    grid = Table(
        title=f"{HOSTS} hosts at {mbit:g} Mbit/s each way, {megabytes:g} MB a message:"
        " ms, and the share of the link",
        caption=f"all-reduce: {everyone['ms']:.0f} ms, {everyone['of_the_link']:.3f}",
        box=box.SIMPLE_HEAD,
    )
    columns = ("", "decentral", "best", "of all-reduce", *(f"torch, {order}" for order in TORCHS))
    for column in columns:
        grid.add_column(column, justify="right" if column else "left")
    for r in rows:
        cells = [f"{r['ms']:.0f} {r['of_the_link']:.3f}", f"{r['of_the_link_best']:.3f}"]
        cells += [f"{r['ratio_to_all_reduce']:.3f}"]
        cells += [f"{t['ms']:.0f} {t['of_the_link']:.3f}" for t in r["torch"].values()]
        grid.add_row(r["exchange"], *cells)
    return grid


if __name__ == "__main__":
    typer.run(main)
