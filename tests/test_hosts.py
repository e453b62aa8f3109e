"""Hosts in network namespaces are what they are taken for: see hosts.py. Tests of launching, of
measuring and of benchmarks run on them."""

import signal
import subprocess
import sys

import hosts
import pytest

REASON = hosts.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def test_hosts_leave_nothing_behind_after_a_failure():
    started = []

    def fail():
        with hosts.hosts(2) as made:
            started.append((made, made.start(1, "sleep", "1000")))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    ((made, sleeper),) = started
    assert sleeper.returncode == -signal.SIGKILL
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert not any(name in listed.stdout for name in made.names)


def test_a_card_is_as_fast_as_its_rate():
    """A megabyte at 20 Mbit/s takes .4 s, but for what passes at once; headers add to it."""
    with hosts.hosts(2, rate_mbit=20) as made:
        sink = made.start(1, sys.executable, "-c", SINK)
        assert sink.stdout is not None
        assert sink.stdout.readline() == "listening\n"
        seconds = float(made.run(0, sys.executable, "-c", SOURCE, made.addresses[1]).stdout)
        assert sink.wait(timeout=10) == 0
    assert (10**6 - hosts.BURST) * 8 / 20e6 < seconds < 1.25 * 10**6 * 8 / 20e6


SINK = """
import socket
server = socket.create_server(("0.0.0.0", 5555))
print("listening", flush=True)
connection, _ = server.accept()
got = 0
while got < 10**6:
    got += len(connection.recv(1 << 16))
connection.send(b"x")
"""

SOURCE = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5555))
start = time.perf_counter()
connection.sendall(bytes(10**6))
connection.recv(1)
print(time.perf_counter() - start)
"""
