"""`decentral doctor`: can the nodes of a Ray cluster run workers together? Asked before a run.

A probe on each node looks around there, connects to every other node, and exchanges messages with
it as workers do. `findings` says what is wrong with what the probes saw, and how to mend it. A node
that does not answer is named at a deadline: nothing here waits for ever.
"""

import os
import platform
import socket
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.cuda import nccl

from decentral.config import RayConfig
from decentral.engines.worker import interface_of, listen, open_store
from decentral.measure import link, tournament
from decentral.peer import Patience, PeerComm

PACKAGES = ("torch", "ray", "decentral", "numpy", "networkx")
REACH_S = 5.0  # to connect: a packet that is lost is sent again after 1 and after 3 seconds
LINK_S = 20.0  # to meet, and for the first message; a lost one later is missed after 10 s
CLOCK_S = 0.5  # that clocks may differ by
ROUND_S = 2.0  # at most, for a round of pairs that share no node
SLOW = 4  # times slower than the median link is worth a word
PINGS = 5  # a clock

Pair = tuple[str, str]


@dataclass(frozen=True)
class Node:
    """What a probe saw on its node. `interface`: that carries the node's address; None: none does.

    gpus: the names of the cards that torch sees; ray_gpus: how many Ray has there; cuda_error: why
    torch or NCCL cannot use them, where that is so.
    """

    host: str
    resolves_to: tuple[str, ...]
    interface: str | None
    versions: dict[str, str | None]
    gpus: tuple[str, ...] = ()
    ray_gpus: float = 0.0
    nccl: str | None = None
    cuda_error: str | None = None


@dataclass(frozen=True)
class Clock:
    """Seconds that a node's clock is ahead of this process's, and how far off that may be."""

    ahead_s: float
    within_s: float


@dataclass(frozen=True)
class Seen:
    """What there is to judge; nodes by address. `unreached`: from, to; `links`, `broken`: pairs."""

    nodes: dict[str, Node]
    silent: dict[str, str] = field(default_factory=dict)  # and why they do not answer
    clocks: dict[str, Clock] = field(default_factory=dict)
    unreached: dict[Pair, str] = field(default_factory=dict)  # and why
    broken: dict[Pair, str] = field(default_factory=dict)  # connect, but cannot exchange: why
    links: dict[Pair, tuple[float, float]] = field(default_factory=dict)  # seconds, bytes a second


@dataclass(frozen=True)
class Finding:
    """`wrong`: a run would fail, or not be what it seems; else it is only good to know."""

    wrong: bool
    where: str
    what: str
    remedy: str


# What is wrong


def findings(seen: Seen) -> list[Finding]:
    """All that there is to say, what is wrong first."""
    rules = (_silent, _versions, _addresses, _unreached, _broken, _slow, _gpus, _clocks)
    found = [finding for rule in rules for finding in rule(seen)]
    return sorted(found, key=lambda finding: not finding.wrong)


def _silent(seen: Seen) -> Iterator[Finding]:
    for address, why in seen.silent.items():
        yield Finding(
            True,
            address,
            f"does not answer: {why}",
            "see that the machine is up and on the network, and that decentral is installed there;"
            " then `ray stop` and `ray start --address=HEAD:6379` on it",
        )


def _versions(seen: Seen) -> Iterator[Finding]:
    for package in ("python", *PACKAGES):
        there = {address: node.versions.get(package) for address, node in seen.nodes.items()}
        counted = Counter(version for version in there.values() if version is not None)
        if not counted:
            continue
        usual = counted.most_common(1)[0][0]
        install = "run Python" if package == "python" else "pip install"
        equals = " " if package == "python" else f" {package}=="
        for address, version in there.items():
            if version != usual:
                yield Finding(
                    True,
                    address,
                    f"has {package} {version or 'not at all'}, most nodes have {usual}",
                    f"{install}{equals}{usual} there, and start its Ray again",
                )


def _addresses(seen: Seen) -> Iterator[Finding]:
    for address, node in seen.nodes.items():
        if node.interface is None:
            yield Finding(
                True,
                address,
                f"none of the network interfaces of {node.host} carries this address, so that"
                " workers there can listen on none",
                "start its Ray with --node-ip-address=ADDRESS, one that `ip address` shows there",
            )
        elif any(_is_loopback(resolved) for resolved in node.resolves_to):
            if not _is_loopback(address):
                yield Finding(
                    False,
                    address,
                    f"its host name, {node.host}, resolves to {', '.join(node.resolves_to)}",
                    f"nothing to do: workers take the interface of the address, {node.interface}",
                )
        elif not node.resolves_to:
            yield Finding(
                False,
                address,
                f"its host name, {node.host}, does not resolve",
                f"nothing to do: workers take the interface of the address, {node.interface}",
            )


def _unreached(seen: Seen) -> Iterator[Finding]:
    """One finding a target and reason, so that a machine behind a firewall is not said n times."""
    both = {pair for pair in seen.unreached if pair[::-1] in seen.unreached}
    told: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (source, target), why in seen.unreached.items():
        told[target, why].append(source)
    for (target, why), sources in told.items():
        mutual = [source for source in sources if (source, target) in both]
        if len(mutual) == len(sources) == 1 and told.get((sources[0], why)) == [target]:
            if sources[0] < target:
                what = f"cannot connect to each other: {why}"
                yield Finding(True, f"{sources[0]} and {target}", what, _mend(why, target))
            continue
        what = f"cannot connect to {target}: {why}"
        yield Finding(True, ", ".join(sorted(sources)), what, _mend(why, target))


def _mend(why: str, target: str) -> str:
    if "timed out" in why:
        return (
            "packets are dropped on the way: let all TCP ports through between the nodes, in"
            f" firewalls and security groups, and see with `ip route get {target}` which way they"
            " go"
        )
    if "refused" in why:
        return f"a firewall in front of {target} refuses: let all TCP ports through between nodes"
    return f"there is no way to {target}: see `ip route get {target}`, and that its link is up"


def _broken(seen: Seen) -> Iterator[Finding]:
    for (a, b), why in seen.broken.items():
        yield Finding(
            True,
            f"{a} and {b}",
            f"connect, but cannot exchange messages: {why}",
            "large packets may be lost: give both the same MTU (`ip link`), one that all switches"
            f" and tunnels between them carry (`ping -M do -s 1472 {b}`)",
        )


def _slow(seen: Seen) -> Iterator[Finding]:
    if len(seen.links) < 3:
        return
    usual = statistics.median(bandwidth for _, bandwidth in seen.links.values())
    for (a, b), (_, bandwidth) in seen.links.items():
        if SLOW * bandwidth < usual:
            yield Finding(
                False,
                f"{a} and {b}",
                f"exchange {_gbps(bandwidth)} Gbit/s, the median link {_gbps(usual)}",
                "if it should be as fast as the others, look at cable, duplex and switch port"
                " (`ethtool`); if not, `decentral measure` tells the clock and the planner",
            )


def _gpus(seen: Seen) -> Iterator[Finding]:
    versions = Counter(node.nccl for node in seen.nodes.values() if node.gpus and node.nccl)
    for address, node in seen.nodes.items():
        if len(node.gpus) < node.ray_gpus:
            yield Finding(
                True,
                address,
                f"Ray has {node.ray_gpus:g} GPUs there, torch {node.versions.get('torch')} sees"
                f" {len(node.gpus)}",
                "install a build of torch for the CUDA of the driver that `nvidia-smi` shows:"
                " https://pytorch.org/get-started/locally",
            )
        elif node.cuda_error is not None:
            yield Finding(
                True,
                address,
                f"its GPUs cannot be used: {node.cuda_error}",
                "compare the driver of `nvidia-smi` with the CUDA that torch was built for"
                " (torch.version.cuda)",
            )
        elif node.gpus and node.nccl is None:
            yield Finding(
                True,
                address,
                "has GPUs, but a build of torch without NCCL",
                "install a build of torch for CUDA: https://pytorch.org/get-started/locally",
            )
        elif node.gpus and len(versions) > 1 and node.nccl != versions.most_common(1)[0][0]:
            yield Finding(
                True,
                address,
                f"has NCCL {node.nccl}, most nodes have {versions.most_common(1)[0][0]}",
                "install the same build of torch on all nodes",
            )
        elif len(node.gpus) > node.ray_gpus:
            yield Finding(
                False,
                address,
                f"torch sees {len(node.gpus)} GPUs there, Ray has {node.ray_gpus:g}",
                "to use them all, start its Ray with --num-gpus, and without CUDA_VISIBLE_DEVICES",
            )


def _clocks(seen: Seen) -> Iterator[Finding]:
    for address, clock in seen.clocks.items():
        if abs(clock.ahead_s) - clock.within_s > CLOCK_S:
            way = "ahead of" if clock.ahead_s > 0 else "behind"
            yield Finding(
                True,
                address,
                f"its clock is {abs(clock.ahead_s):.1f} s {way} that of this machine",
                "run a time service there (`timedatectl set-ntp true`, or chrony): logs and"
                " checkpoints of several machines cannot be put in order otherwise",
            )


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


# Looking


def diagnose(
    config: RayConfig,
    say: Callable[[str], None],
    seconds: float = 20,
    timeout_s: float = 60,
) -> Seen:
    """Look at all nodes of the cluster that `config` means.

    seconds     for measuring all links together, about
    timeout_s   that a node has to start its probe, and to look around

    Raises UserError if there is no such cluster.
    """
    import ray  # slow to import, and not for reading what was found

    from decentral.engines.ray import connect

    with connect(config, workers=1, logs=False):  # beside --json there is nothing else
        alive, silent = {}, {}
        for node in ray.nodes():
            address = node["NodeManagerAddress"]
            if node["Alive"]:
                alive[f"{address}#{len(alive)}" if address in alive else address] = node
            elif node.get("DeathReason", 0) != 1:  # 1: it was stopped, and said so
                why = node.get("DeathReasonMessage") or "it is gone"
                silent[address] = f"Ray has given it up ({why})"
        silent = {address: why for address, why in silent.items() if address not in alive}
        say(f"looking at {len(alive) + len(silent)} nodes")
        probes = {address: _start(node) for address, node in alive.items()}
        try:
            return _look(probes, silent, say, seconds, timeout_s)
        finally:
            for probe in probes.values():
                ray.kill(probe)


def _start(node: dict[str, Any]) -> Any:
    """A probe on a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    make = ray.remote(Probe).options(num_cpus=0, scheduling_strategy=there, max_restarts=0)
    address, gpus = node["NodeManagerAddress"], node["Resources"].get("GPU", 0.0)
    return make.remote(address, gpus)


def _look(
    probes: Mapping[str, Any],
    silent: dict[str, str],
    say: Callable[[str], None],
    seconds: float,
    timeout_s: float,
) -> Seen:
    from ray.exceptions import RayError

    nodes, mute = _answers({a: probe.look.remote() for a, probe in probes.items()}, timeout_s)
    silent |= mute
    clocks = {}
    for address in nodes:
        with suppress(RayError):
            clocks[address] = clock(_now_at(probes[address]))
    able = [address for address, node in nodes.items() if node.interface is not None]
    ports, mute = _answers({a: probes[a].listen.remote() for a in able}, timeout_s)
    silent |= mute
    doors = {a: (a.partition("#")[0], port) for a, port in ports.items()}
    others = {a: {b: door for b, door in doors.items() if b != a} for a in doors}
    reached, mute = _answers({a: probes[a].reach.remote(others[a]) for a in doors}, timeout_s)
    silent |= mute
    unreached = {
        (a, b): why for a, tried in reached.items() for b, why in tried.items() if why is not None
    }
    links, broken = {}, {}
    apart = {frozenset(pair) for pair in unreached}
    there = list(reached)
    rounds = tournament(range(len(there))) if len(there) > 1 else []
    each = min(ROUND_S, seconds / max(1, len(rounds)))
    if rounds:
        say(f"measuring the links between them in {len(rounds)} rounds of {each:.2g} s at most")
    for pairs in rounds:
        meeting = [(there[i], there[j]) for i, j in pairs]
        meeting = [pair for pair in meeting if frozenset(pair) not in apart]
        measured, failed = _measured(probes, meeting, each, timeout_s)
        links |= measured
        broken |= failed
    return Seen(nodes, silent, clocks, unreached, broken, links)


def _measured(
    probes: Mapping[str, Any], pairs: list[Pair], seconds: float, timeout_s: float
) -> tuple[dict[Pair, tuple[float, float]], dict[Pair, str]]:
    """The links of pairs that share no node, all at the same time; and why some have failed."""
    ports, failed = _answers({(a, b): probes[a].open.remote() for a, b in pairs}, timeout_s)
    calls = {}
    for (a, b), port in ports.items():
        where = a.partition("#")[0]
        calls[a, b] = probes[a].link.remote(where, port, 0, seconds)
        calls[b, a] = probes[b].link.remote(where, port, 1, seconds)
    answers, errors = _answers(calls, 3 * LINK_S + 10 * seconds)
    for a, b in ports:
        if (a, b) not in answers:
            failed[a, b] = errors[a, b]
    return {pair: answers[pair] for pair in ports if pair in answers}, failed


def _answers(calls: dict[Any, Any], limit_s: float) -> tuple[dict[Any, Any], dict[Any, str]]:
    """What was answered in time, and why the rest was not."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    answers, failed = {}, {}
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=limit_s)
    for who, call in calls.items():
        try:
            answers[who] = ray.get(call, timeout=0)
        except GetTimeoutError:
            failed[who] = f"nothing came within {limit_s:.0f} s"
        except RayTaskError as error:
            failed[who] = _line(f"{type(error.cause).__name__}: {error.cause}")
        except RayError as error:
            failed[who] = _line(str(error))
    return answers, failed


def _line(text: str) -> str:
    """The end of a long text, which has the cause of an error, in a line."""
    words = " ".join(text.split())
    return words if len(words) <= 300 else "... " + words[-300:]


def _now_at(probe: Any) -> Callable[[], float]:
    import ray

    return lambda: ray.get(probe.now.remote(), timeout=10)


def clock(now: Callable[[], float], here: Callable[[], float] = time.time) -> Clock:
    """How far the clock that `now` asks is ahead of `here`.

    The answer is as old as half of what the question took, give or take the same; the quickest of
    a few is the most exact.
    """
    asked = []
    for _ in range(PINGS):
        before = here()
        theirs = now()
        after = here()
        asked.append(Clock(theirs - (before + after) / 2, (after - before) / 2))
    return min(asked, key=lambda each: each.within_s)


class Probe:
    """The doctor on one node, an actor of Ray; `address`: the node's."""

    def __init__(self, address: str, ray_gpus: float):
        self._address = address
        self._ray_gpus = ray_gpus

    def look(self) -> Node:
        try:
            interface = interface_of(self._address)
        except RuntimeError:
            interface = None
        host = socket.gethostname()
        # Ray hides all cards from who asks for none.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        cards = range(torch.cuda.device_count())
        gpus = tuple(torch.cuda.get_device_name(card) for card in cards)
        has_nccl = bool(gpus) and dist.is_nccl_available()
        return Node(
            host,
            _resolved(host),
            interface,
            _versions_here(),
            gpus,
            self._ray_gpus,
            nccl=".".join(map(str, nccl.version())) if has_nccl else None,
            cuda_error=_cuda_error(has_nccl) if gpus else None,
        )

    def now(self) -> float:
        return time.time()

    def listen(self) -> int:
        """A port that others may connect to."""
        listening = listen(self._address)
        threading.Thread(target=_hang_up, args=(listening,), daemon=True).start()
        return listening.getsockname()[1]

    def reach(self, others: dict[str, tuple[str, int]]) -> dict[str, str | None]:
        """Why each of the others cannot be connected to; None: it can."""
        with ThreadPoolExecutor(max_workers=64) as pool:
            return dict(zip(others, pool.map(_unreachable, others.values()), strict=True))

    def open(self) -> int:
        """A port at which the next pair meets."""
        self._store, port = open_store(self._address, timedelta(seconds=LINK_S))
        return port

    def link(self, address: str, port: int, rank: int, seconds: float) -> tuple[float, float]:
        """Latency, seconds, and bytes a second each way, of the link to the other of two."""
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(self._address)
        timeout = timedelta(seconds=LINK_S)
        store = self._store if rank == 0 else dist.TCPStore(address, port, timeout=timeout)
        # As in Worker: a count that goes on after a failure would keep the next two apart.
        dist.distributed_c10d._world.group_count = 0
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
            comm = PeerComm(None, patience=Patience(10.0, LINK_S))
            return link(comm, 1 - rank, "cpu", seconds)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _versions_here() -> dict[str, str | None]:
    """The versions on this node."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _resolved(host: str, limit_s: float = 3.0) -> tuple[str, ...]:
    """The addresses that a host name stands for; none if it resolves to none, or not in time."""
    found: list[str] = []

    def ask() -> None:
        with suppress(OSError):
            found.extend(str(entry[4][0]) for entry in socket.getaddrinfo(host, None))

    asking = threading.Thread(target=ask, daemon=True)  # a name server may be out of reach
    asking.start()
    asking.join(limit_s)
    return tuple(dict.fromkeys(found))


def _hang_up(listening: socket.socket) -> None:
    """Take every call, and end it."""
    while True:
        listening.accept()[0].close()


def _unreachable(door: tuple[str, int]) -> str | None:
    try:
        socket.create_connection(door, timeout=REACH_S).close()
    except OSError as error:
        return str(error)
    return None


def _cuda_error(nccl: bool) -> str | None:
    """Why a card cannot compute, or NCCL not start; None if all is well."""
    try:
        x = torch.ones(1, device="cuda")
        if nccl:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
            try:
                dist.all_reduce(x)
            finally:
                dist.destroy_process_group()
        x.item()
    except RuntimeError as error:
        return _line(str(error))
    return None


# Showing


def as_json(seen: Seen, found: list[Finding]) -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "well": not any(finding.wrong for finding in found),
        "findings": [asdict(finding) for finding in found],
        "nodes": {
            address: asdict(node)
            | {"clock": asdict(seen.clocks[address]) if address in seen.clocks else None}
            for address, node in seen.nodes.items()
        },
        "links": [
            {
                "nodes": list(pair),
                "latency_ms": latency_s * 1e3,
                "bandwidth_gbps": bandwidth * 8 / 1e9,
            }
            for pair, (latency_s, bandwidth) in seen.links.items()
        ],
    }


def show(seen: Seen, found: list[Finding], console: Console) -> None:
    """Print what was seen, and then what there is to say about it."""
    console.print(_nodes_table(seen))
    if seen.links:
        console.print(_links_table(seen))
    for finding in found:
        word = "[red]wrong[/red]" if finding.wrong else "[dim]note[/dim]"
        said = f"[bold]{escape(finding.where)}[/bold] {escape(finding.what)}"
        console.print(f"{word} {said}\n      {escape(finding.remedy)}", highlight=False)
    wrong = sum(finding.wrong for finding in found)
    if wrong:
        console.print(f"[red]{wrong} wrong[/red]", highlight=False)
    else:
        console.print("[green]all is well[/green]: workers can run on all of these nodes")


def _nodes_table(seen: Seen) -> Table:
    table = Table(title=f"{len(seen.nodes)} nodes", box=box.SIMPLE_HEAD)
    for column in ("node", "host", "interface", "python", "torch", "ray", "GPUs", "clock, s"):
        table.add_column(column)
    for address, node in seen.nodes.items():
        versions = (node.versions.get(name) or "-" for name in ("python", "torch", "ray"))
        cards = ", ".join(f"{k} {name}" for name, k in Counter(node.gpus).items())
        clock = seen.clocks.get(address)
        ahead = "-" if clock is None else f"{clock.ahead_s:+.3f} ± {clock.within_s:.3f}"
        table.add_row(address, node.host, node.interface or "-", *versions, cards or "-", ahead)
    return table


def _links_table(seen: Seen, most: int = 12) -> Table:
    """The slowest links."""
    slowest = sorted(seen.links.items(), key=lambda item: item[1][1])[:most]
    left = len(seen.links) - len(slowest)
    caption = f"{left} faster ones: --json" if left else None
    table = Table(
        title=f"{len(seen.links)} links, both ways at once", caption=caption, box=box.SIMPLE_HEAD
    )
    for column in ("between", "latency, ms", "Gbit/s"):
        table.add_column(column, justify="left" if column == "between" else "right")
    for (a, b), (latency_s, bandwidth) in slowest:
        table.add_row(f"{a}, {b}", f"{latency_s * 1e3:.3g}", _gbps(bandwidth))
    return table


def _gbps(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e9:.3g}"
