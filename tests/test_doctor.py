"""What is wrong with a cluster is said by name, with its remedy; and nothing where all is well.

On hosts whose packets are dropped, and on one that is cut off: test_launch.py.
"""

import dataclasses
import itertools
import json
import socket

import pytest
from typer.testing import CliRunner

from decentral import doctor
from decentral.cli import app
from decentral.doctor import Clock, Finding, Node, Seen, clock, findings

A, B, C = ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
VERSIONS: dict[str, str | None] = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"}
VERSIONS |= {"decentral": "0.1.0", "numpy": "2.1", "networkx": "3.4"}
CARDS = {"gpus": ("H100", "H100"), "ray_gpus": 2.0, "nccl": "2.27.3"}


def seen(**changes) -> Seen:
    """Three nodes that are well, but for changes to the fields of B."""
    nodes = {
        address: Node(f"node{i}", (address,), "eth0", VERSIONS)
        for i, address in enumerate(ADDRESSES)
    }
    nodes[B] = dataclasses.replace(nodes[B], **changes)
    return Seen(
        nodes,
        clocks=dict.fromkeys(ADDRESSES, Clock(0.1, 0.01)),
        links=dict.fromkeys(itertools.combinations(ADDRESSES, 2), (1e-4, 1e8)),
    )


def with_cards(**changes) -> Seen:
    made = seen()
    nodes = {address: dataclasses.replace(node, **CARDS) for address, node in made.nodes.items()}
    nodes[B] = dataclasses.replace(nodes[B], **changes)
    return dataclasses.replace(made, nodes=nodes)


@pytest.mark.parametrize("well", [seen(), with_cards(), Seen({A: seen().nodes[A]})])
def test_of_a_cluster_that_is_well_there_is_nothing_to_say(well):
    assert findings(well) == []


DROPPED = {(B, C): "timed out", (C, B): "timed out"}
FAR = "[Errno 113] No route to host"
WRONG = {
    "a node that does not answer": (
        dataclasses.replace(seen(), silent={"10.0.0.4": "nothing came within 60 s"}),
        "10.0.0.4",
        "does not answer: nothing came within 60 s",
        "ray start --address",
    ),
    "another torch": (
        seen(versions=VERSIONS | {"torch": "2.12.1"}),
        B,
        "has torch 2.12.1, most nodes have 2.13.0",
        "pip install torch==2.13.0",
    ),
    "another Python": (
        seen(versions=VERSIONS | {"python": "3.10.2"}),
        B,
        "has python 3.10.2, most nodes have 3.11.7",
        "run Python 3.11.7",
    ),
    "no decentral": (
        seen(versions=VERSIONS | {"decentral": None}),
        B,
        "has decentral not at all, most nodes have 0.1.0",
        "pip install decentral==0.1.0",
    ),
    "an address of no interface": (
        seen(interface=None),
        B,
        "none of the network interfaces of node1 carries this address",
        "--node-ip-address",
    ),
    "dropped packets": (
        dataclasses.replace(seen(), unreached=DROPPED),
        f"{B} and {C}",
        "cannot connect to each other: timed out",
        "all TCP ports",
    ),
    "one way only": (
        dataclasses.replace(seen(), unreached={(B, A): "[Errno 111] Connection refused"}),
        B,
        f"cannot connect to {A}: [Errno 111] Connection refused",
        f"a firewall in front of {A} refuses",
    ),
    "a node that none reaches": (
        dataclasses.replace(seen(), unreached={(A, C): FAR, (B, C): FAR}),
        f"{A}, {B}",
        f"cannot connect to {C}: {FAR}",
        f"ip route get {C}",
    ),
    "messages that do not pass": (
        dataclasses.replace(seen(), broken={(A, C): "PeerError: timed out"}),
        f"{A} and {C}",
        "connect, but cannot exchange messages: PeerError: timed out",
        "MTU",
    ),
    "fewer cards for torch than for Ray": (
        with_cards(gpus=("H100",)),
        B,
        "Ray has 2 GPUs there, torch 2.13.0 sees 1",
        "nvidia-smi",
    ),
    "cards that cannot be used": (
        with_cards(cuda_error="CUDA driver version is insufficient"),
        B,
        "its GPUs cannot be used: CUDA driver version is insufficient",
        "torch.version.cuda",
    ),
    "no NCCL": (with_cards(nccl=None), B, "a build of torch without NCCL", "build of torch"),
    "another NCCL": (
        with_cards(nccl="2.26.0"),
        B,
        "has NCCL 2.26.0, most nodes have 2.27.3",
        "same build of torch",
    ),
    "a clock ahead": (
        dataclasses.replace(seen(), clocks={A: Clock(0.0, 0.01), B: Clock(3.21, 0.01)}),
        B,
        "its clock is 3.2 s ahead of",
        "chrony",
    ),
    "a clock behind": (
        dataclasses.replace(seen(), clocks={B: Clock(-3.21, 0.01)}),
        B,
        "its clock is 3.2 s behind",
        "chrony",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_remedy(name):
    broken, where, what, remedy = WRONG[name]
    (finding,) = findings(broken)
    assert finding.wrong
    assert finding.where == where
    assert what in finding.what
    assert remedy in finding.remedy


NOTES = {
    "a host name that is loopback": (
        seen(resolves_to=("127.0.1.1",)),
        "its host name, node1, resolves to 127.0.1.1",
        "nothing to do: workers take the interface of the address, eth0",
    ),
    "a host name that is nothing": (seen(resolves_to=()), "does not resolve", "nothing to do"),
    "more cards than Ray has": (
        with_cards(ray_gpus=1.0),
        "torch sees 2 GPUs there, Ray has 1",
        "--num-gpus",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_does_no_harm_is_said_and_not_wrong(name):
    noted, what, remedy = NOTES[name]
    (finding,) = findings(noted)
    assert not finding.wrong
    assert finding.where == B
    assert what in finding.what
    assert remedy in finding.remedy


def test_a_link_much_slower_than_the_median_is_said():
    links = seen().links | {(A, C): (1e-4, 0.2e8)}
    (finding,) = findings(dataclasses.replace(seen(), links=links))
    assert not finding.wrong
    assert finding.where == f"{A} and {C}"
    assert "exchange 0.16 Gbit/s, the median link 0.8" in finding.what
    links[A, C] = (1e-4, 0.26e8)
    assert findings(dataclasses.replace(seen(), links=links)) == []


def test_a_clock_that_cannot_be_told_from_a_right_one_is_not_wrong():
    """The question took two seconds, and the answer may be of any moment of them."""
    assert findings(dataclasses.replace(seen(), clocks={B: Clock(1.4, 1.0)})) == []


def test_the_quickest_question_tells_how_far_a_clock_is_ahead():
    """A clock 5 s ahead, and answers that take 1, .2, 2, .5 and 1 s there and as long back."""
    time_s, ways = [100.0], iter([1.0, 0.2, 2.0, 0.5, 1.0])

    def now():
        way = next(ways)
        time_s[0] += 2 * way
        return time_s[0] - way + 5 + way / 10  # it takes a little longer there than back

    told = clock(now, lambda: time_s[0])
    assert told.within_s == pytest.approx(0.2)
    assert told.ahead_s == pytest.approx(5.02)


def test_what_is_wrong_comes_first():
    found = findings(dataclasses.replace(seen(resolves_to=("127.0.1.1",)), unreached=DROPPED))
    assert [finding.wrong for finding in found] == [True, False]


def test_a_closed_port_is_refused_and_an_open_one_is_not():
    listening = socket.create_server(("127.0.0.1", 0))
    door = listening.getsockname()
    assert doctor._unreachable(door) is None
    listening.close()
    told = doctor._unreachable(door)
    assert told is not None
    assert "refused" in told


@pytest.mark.parametrize(
    ("made", "code"), [(seen(resolves_to=("127.0.1.1",)), 0), (WRONG["no NCCL"][0], 1)]
)
def test_the_command_ends_with_0_if_nothing_is_wrong_else_with_1(made, code, monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "diagnose", lambda *arguments: asked.append(arguments) or made)
    done = CliRunner().invoke(app, ["doctor", "--address", "10.0.0.1:6379", "--timeout", "7"])
    assert done.exit_code == code
    assert asked[0][0].address == "10.0.0.1:6379"
    assert asked[0][-1] == 7
    assert ("all is well" in done.stdout) == (code == 0)
    assert B in done.stdout
    told = CliRunner().invoke(
        app, ["doctor", "configs/quickstart.yaml", "ray.address=auto", "--json"]
    )
    assert told.exit_code == code
    assert asked[1][0].address == "auto"
    result = json.loads(told.stdout)
    assert result["well"] == (code == 0)
    assert Finding(**result["findings"][0]) == findings(made)[0]
    assert set(result["nodes"]) == set(ADDRESSES)
    assert len(result["links"]) == 3
