"""Hosts on one machine: network namespaces, each with an address and a network card of its own.

A bridge in a namespace of its own joins them; a token bucket (tc tbf) on either end of each cable
holds a card to its rate, in each direction by itself. On top, a Ray cluster with a node per host.
Needs root and iproute2: `why_not` says what is missing. Whatever ran on the hosts is killed, by
process id, and the namespaces are removed, by name, when the context ends.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

RAY_PORT = 6379
SUBNET = "10.77.0."
BURST = 70_000  # bytes: the least that a card lets through at once


def why_not() -> str | None:
    """Why no hosts can be made here, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: install iproute2"
    name = f"dc{secrets.token_hex(3)}"
    try:
        _do("ip", "netns", "add", name)
        pair = ("name", "left", "type", "veth", "peer", "name", "right")
        _do("ip", "-n", name, "link", "add", *pair)
        _do("tc", "-n", name, "qdisc", "add", "dev", "left", "root", *_bucket(100))
    except subprocess.CalledProcessError as error:
        return f"this kernel lets us make no shaped network: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None


class Hosts:
    """k hosts, 10.77.0.1 to 10.77.0.k, on a network of their own. Made by `hosts`.

    `routed`: hosts on a network each for itself, 10.78.i.0/24, with a router between it and the
    others.
    """

    def __init__(self, k: int, routed: Sequence[int] = ()):
        token = secrets.token_hex(3)  # two test runs on one machine do not meet
        self.names = [f"dc{token}-{i}" for i in range(k)]
        self.addresses = [f"10.78.{i}.1" if i in routed else f"10.77.0.{i + 1}" for i in range(k)]
        self._switch = f"dc{token}-switch"
        self._started: list[subprocess.Popen[str]] = []

    def make(self, rate_mbit: float) -> None:
        switch = self._switch
        _do("ip", "netns", "add", switch)
        _do("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _do("ip", "-n", switch, "link", "set", "bridge", "up")
        _do("ip", "-n", switch, "address", "add", f"{SUBNET}254/24", "dev", "bridge")
        _do("ip", "netns", "exec", switch, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            router = address.rpartition(".")[0] + ".254"
            port = f"port{i}"
            _do("ip", "netns", "add", name)
            pair = ("eth0", "netns", name, "type", "veth", "peer", "name", port)
            _do("ip", "-n", switch, "link", "add", *pair)
            if address.startswith(SUBNET):
                _do("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            else:
                _do("ip", "-n", switch, "address", "add", f"{router}/24", "dev", port)
                _do("ip", "-n", switch, "link", "set", port, "up")
            _do("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _do("ip", "-n", name, "link", "set", device, "up")
            # A host with no route to the world does not know its address.
            _do("ip", "-n", name, "route", "add", "default", "via", router)
            # Driven by loss, as Linux's default is, and there in every kernel. A machine whose own
            # is made for other networks (BBR) fills such short and slow links badly.
            control = "net.ipv4.tcp_congestion_control=reno"
            _do("ip", "netns", "exec", name, "sysctl", "-qw", control)
        self.set_rate(rate_mbit)

    def set_rate(self, rate_mbit: float) -> None:
        """Hold every card to `rate_mbit`, in each direction."""
        for i, name in enumerate(self.names):
            for namespace, device in ((name, "eth0"), (self._switch, f"port{i}")):
                where = ("dev", device, "root")
                _do("tc", "-n", namespace, "qdisc", "replace", *where, *_bucket(rate_mbit))

    def part(self, a: int, b: int) -> None:
        """Lose whatever host a sends to host b, as a firewall does."""
        where = (self.addresses[b], "lladdr", "02:00:00:00:00:01", "dev", "eth0")  # nobody's card
        _do("ip", "-n", self.names[a], "neighbour", "replace", *where)
        _do("ip", "-n", self.names[a], "route", "replace", self.addresses[b], "dev", "eth0")

    def mend(self, a: int, b: int) -> None:
        """Take `part` back."""
        _do("ip", "-n", self.names[a], "route", "delete", self.addresses[b], "dev", "eth0")
        _do("ip", "-n", self.names[a], "neighbour", "delete", self.addresses[b], "dev", "eth0")

    def run(
        self,
        host: int,
        *command: str,
        timeout_s: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end. Raises CalledProcessError, with its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.names[host], *command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **(environment or {})},
            check=False,
        )
        if done.returncode != 0:
            print(done.stdout, done.stderr, file=sys.stderr)
            done.check_returncode()
        return done

    def start(self, host: int, *command: str) -> subprocess.Popen[str]:
        """Start a command on a host; it is killed with the host at the latest."""
        exec_there = ["ip", "netns", "exec", self.names[host]]
        process = subprocess.Popen([*exec_there, *command], stdout=subprocess.PIPE, text=True)
        self._started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """Whatever runs on the hosts."""
        found = []
        for name in self.names:
            listed = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for pid in listed.stdout.split():
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(int(pid)))
        return found

    def remove(self) -> None:
        """Kill whatever runs on the hosts, and take the network away."""
        for process in self._started:  # one may be on its way to its host still
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        while running := self.processes():  # until nobody is left who could start another
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(running, timeout=5)
            if all(p.is_running() and p.status() == psutil.STATUS_ZOMBIE for p in running):
                break
        for name in (*self.names, self._switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextlib.contextmanager
def hosts(k: int, rate_mbit: float = 1000, routed: Sequence[int] = ()) -> Iterator[Hosts]:
    """k hosts, gone at the end, also after a failure."""
    made = Hosts(k, routed)
    try:
        made.make(rate_mbit)
        yield made
    finally:
        made.remove()


@contextlib.contextmanager
def ray_hosts(
    k: int, rate_mbit: float = 1000, cpus: int = 1
) -> Iterator[tuple[Hosts, dict[str, str]]]:
    """k hosts, each a node of one Ray cluster with token authentication, and the environment in
    which a driver on host 0 joins it, at `auto` or 10.77.0.1:6379."""
    folder = Path(tempfile.mkdtemp(prefix="dc", dir="/tmp"))  # Ray's socket paths must be short
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",  # 30 are too few on busy cores
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": str(os.nice(0)),  # else 15: workers would yield to all others
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    try:
        with hosts(k, rate_mbit) as made:
            head = f"{made.addresses[0]}:{RAY_PORT}"

            def start(i: int, *where: str) -> None:
                """Ray on host i, whose files are its own; drivers are on the first."""
                own = f"{folder}-{i}" if i else folder
                mounted = ("sh", "-ec", f'mount --bind {own} {folder}; exec "$@"', "start")
                made.run(
                    i,
                    *(*mounted, sys.executable, "-m", "ray.scripts.scripts", "start", *where),
                    f"--node-ip-address={made.addresses[i]}",
                    f"--num-cpus={cpus}",
                    f"--object-store-memory={100 * 2**20}",
                    "--disable-usage-stats",
                    "--include-log-monitor=false",  # each is one more process to start
                    environment=environment,
                )

            start(0, "--head", f"--port={RAY_PORT}", "--include-dashboard=false")
            for i in range(1, k):
                Path(f"{folder}-{i}").mkdir()
            with ThreadPoolExecutor() as others:
                list(others.map(lambda i: start(i, f"--address={head}"), range(1, k)))
            yield made, environment
    finally:
        for own in (folder, *(f"{folder}-{i}" for i in range(1, k))):
            shutil.rmtree(own, ignore_errors=True)


def _bucket(rate_mbit: float) -> list[str]:
    """A token bucket. The kernel's segments of 64 kB pass it whole: where it has to cut them into
    packets of 1500 bytes, busy cores cannot keep up from 200 Mbit/s on. What that costs: a sender
    that was idle has BURST free. The queue behind holds 100 ms, short of that TCP loses packets
    when several send to one.
    """
    burst = max(BURST, round(rate_mbit * 1e6 / 8 * 1e-3))
    return ["tbf", "rate", f"{rate_mbit}mbit", "burst", str(burst), "latency", "100ms"]


def _do(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
