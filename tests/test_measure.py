"""A cluster, measured: every pair once, the right figures, and a file that the clock reads."""

import itertools
import sys
from types import SimpleNamespace

import hosts
import networkx as nx
import numpy as np
import pytest
import ray

import decentral
from decentral import measure as measuring
from decentral import topology as topologies
from decentral.config import dump, load
from decentral.measure import measure, measure_command, rounds_of, thin, tournament

WHY_NOT = hosts.why_not()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 33])
def test_in_a_tournament_every_two_meet_once_and_nobody_twice_in_a_round(n):
    rounds = tournament(range(n))
    assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(range(n), 2))
    for pairs in rounds:
        players = list(itertools.chain(*pairs))
        assert len(set(players)) == len(players)
    assert len(rounds) == (n if n % 2 else n - 1)


def test_workers_that_share_a_node_measure_its_cards_one_at_a_time():
    rounds = rounds_of(["a", "b", "a", "b", "c", "a"])
    assert len(rounds) == 3 + 3  # three on a, three nodes
    inside = {(0, 2), (0, 5), (2, 5), (1, 3)}
    assert set(itertools.chain(*rounds[:3])) == inside
    assert sorted(itertools.chain(*rounds[3:])) == [(0, 1), (0, 4), (1, 4)]
    assert rounds_of(["a", "b"]) == [[(0, 1)]]


class Wire:
    """An exchange that takes t = latency + passes S / bandwidth, to the nanosecond."""

    rank, n = 1, 4

    def __init__(self, monkeypatch, latency_s, bandwidth, passes=1.0):
        self.latency_s, self.bandwidth, self.passes = latency_s, bandwidth, passes
        self.sizes: list[int] = []
        monkeypatch.setattr(measuring, "_seconds", self.seconds)

    def trade(self, x, peer, step):
        assert peer == 3
        self.sizes.append(x.numel() * x.element_size())
        return x

    def mean(self, x, step, counted):
        assert not counted
        self.sizes.append(x.numel() * x.element_size())
        return x

    def seconds(self, do, device):
        do()
        return self.latency_s + self.passes * self.sizes[-1] / self.bandwidth


@pytest.mark.parametrize("latency_s", [1e-5, 0.05])
@pytest.mark.parametrize("bandwidth", [1e5, 12.5e6, 1e11])
def test_a_link_has_the_latency_and_bandwidth_of_its_wire(monkeypatch, latency_s, bandwidth):
    wire = Wire(monkeypatch, latency_s, bandwidth)
    seen = measuring.link(wire, 3, "cpu", seconds=2)  # type: ignore[arg-type]
    few = latency_s + 8 / bandwidth  # what eight bytes take counts as latency
    # 64 MiB at 1e11 take 0.7 ms: beside 50 ms of latency a hundredth of the whole is taken.
    taken_s = latency_s + max(wire.sizes) / bandwidth
    expected = max(wire.sizes) / max(taken_s - few, 0.01 * taken_s)
    np.testing.assert_allclose(seen, (few, expected), rtol=1e-9)
    if (taken_s - few) > 0.02 * taken_s:
        assert seen[1] == pytest.approx(bandwidth, rel=1e-4)
    assert max(wire.sizes) == measuring.LARGEST or taken_s >= 2 / 8


def test_links_take_about_the_time_that_they_may(monkeypatch):
    wire = Wire(monkeypatch, 0.001, 12.5e6)
    measuring.link(wire, 3, "cpu", seconds=2)  # type: ignore[arg-type]
    assert sum(0.001 + size / 12.5e6 for size in wire.sizes) < 2 * 1.25


def test_an_all_reduce_has_the_bandwidth_of_its_slowest_hop(monkeypatch):
    """Around a ring of four, 2 (n-1)/n of the message pass each hop."""
    wire = Wire(monkeypatch, 0.004, 12.5e6, passes=2 * 3 / 4)
    reached = measuring._all_reduce(wire, "cpu", seconds=2)  # type: ignore[arg-type]
    assert reached == pytest.approx(12.5e6, rel=1e-4)


def figures(nodes, monkeypatch, quick, links):
    """What `measure` makes of figures that workers on these nodes have seen."""

    class Engine:
        addresses = nodes

        def __init__(self, experiment, say):
            self.closed = False

        def ask(self, function, rounds, seconds):
            own = [{p: links[p] for pairs in rounds for p in pairs if p[0] == i} for i in range(4)]
            step_s = [0.002, 0.003, 0.002, 0.004]
            return [
                measuring._Seen("gloo", s, seen, 1e9) for s, seen in zip(step_s, own, strict=True)
            ]

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "decentral.engines.ray", SimpleNamespace(RayEngine=Engine))
    return measure(load(quick))


def test_figures_are_those_of_the_pair_or_of_the_first_workers_of_two_nodes(monkeypatch, quick):
    links = {(0, 1): (1e-3, 125e6), (0, 2): (1e-5, 1e10), (1, 3): (2e-5, 2e10)}
    cluster = figures(["a", "b", "a", "b"], monkeypatch, quick, links)
    assert dict(cluster.nodes(data="compute_scale")) == {0: 1, 1: 1.5, 2: 1, 3: 2}
    assert dict(cluster.nodes(data="node")) == {0: "a", 1: "b", 2: "a", 3: "b"}
    between = {"latency_ms": 1.0, "bandwidth_gbps": 1.0}
    for edge in ((0, 1), (0, 3), (1, 2), (2, 3)):
        assert cluster.edges[edge] == between
    assert cluster.edges[0, 2] == {"latency_ms": 0.01, "bandwidth_gbps": 80}
    assert cluster.edges[1, 3] == {"latency_ms": 0.02, "bandwidth_gbps": 160}
    assert cluster.graph["compute_ms"] == 2
    assert cluster.graph["all_reduce_gbps"] == 8
    assert cluster.graph["parameters"] == 64 * 8 + 8 + 8 * 10 + 10


def test_a_thinned_cluster_keeps_what_the_topology_uses(monkeypatch, quick):
    links = {(0, 1): (1e-3, 125e6), (0, 2): (1e-5, 1e10), (1, 3): (2e-5, 2e10)}
    cluster = figures(["a", "b", "a", "b"], monkeypatch, quick, links)
    ring = thin(cluster, topologies.build(4, "ring"))
    assert set(ring.edges()) == {(0, 1), (1, 2), (2, 3), (0, 3)}
    assert ring.edges[1, 2] == cluster.edges[1, 2]
    assert ring.graph == cluster.graph
    assert dict(ring.nodes(data=True)) == dict(cluster.nodes(data=True))
    peers = thin(cluster, topologies.build(4, "one_peer_exponential"))
    assert peers.number_of_edges() == 6  # to i+1 in one step, to i+2 in the other


@pytest.mark.parametrize(
    ("changes", "out", "used", "said"),
    [
        ({"workers": 1}, "c.gml", False, "workers.*two ends.*1 worker.*workers=2"),
        ({}, "c.json", False, r"out.*c\.json.*\.gml"),
        ({}, "missing/c.gml", False, "out.*no folder missing"),
        ({"topology": None, "algorithm": {"name": "parallel_sgd"}}, "c.gml", True, "topology.*use"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    alone, quick, tmp_path, monkeypatch, changes, out, used, said
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(decentral.UserError, match=said):
        measure_command(load(quick, changes), measuring.Path(out), used=used)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_this_machine_measured_is_a_file_that_a_run_reads(alone, quick, tmp_path):
    out = tmp_path / "cluster.gml"
    config = load(quick, {"workers": 3})
    lines: list[str] = []
    measure_command(config, out, lines.append, seconds=3)
    assert not ray.is_initialized()  # its cluster is gone
    assert lines[0].startswith("3 workers on 1 node")
    cluster = topologies.read(out)
    assert sorted(cluster.edges()) == [(0, 1), (0, 2), (1, 2)]
    for _, _, link in cluster.edges(data=True):
        assert 0 < link["latency_ms"] < 1000
        assert link["bandwidth_gbps"] > 0.01
    scales = [float(data["compute_scale"]) for _, data in cluster.nodes(data=True)]
    assert min(scales) == 1
    assert cluster.graph["all_reduce_gbps"] > 0.01
    assert 0 < cluster.graph["compute_ms"] < 1000
    assert cluster.graph["versions"]["ray"] == ray.__version__
    words = measuring.overrides(cluster, out)
    changes = decentral.config.parse_overrides(words)
    result = decentral.run(config.model_dump(exclude_none=True), **changes)
    # 24 steps, all wait for the slowest, and each exchanges at least once.
    least = 24e-3 * cluster.graph["compute_ms"] * max(scales)
    assert result.summary["final"]["sim_time_s"] > least


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_two_hosts_of_two_workers_have_the_rate_of_their_cards_between_them(quick, tmp_path):
    config = load(quick, {"workers": 4})
    (tmp_path / "config.yaml").write_text(dump(config))
    out = tmp_path / "cluster.gml"
    with hosts.ray_hosts(2, rate_mbit=100, cpus=2) as (made, environment):
        address = f"ray.address={made.addresses[0]}:{hosts.RAY_PORT}"
        arguments = ("measure", str(tmp_path / "config.yaml"), address, "--out", str(out))
        command = (sys.executable, "-m", "decentral", *arguments)
        said = made.run(0, *command, environment=environment).stdout
        assert "on 2 nodes of the Ray cluster; 2 of the 4 links of ring cross" in said
    cluster = nx.read_gml(out, destringizer=None)
    node = dict(cluster.nodes(data="node"))
    assert sorted(node.values()) == ["10.77.0.1"] * 2 + ["10.77.0.2"] * 2
    for u, v, link in cluster.edges(data=True):
        if node[u] == node[v]:
            assert link["bandwidth_gbps"] > 0.2
        else:
            # Never more than the cards let through; how much less, busy cores decide.
            assert 0.06 < link["bandwidth_gbps"] < 0.105
    assert 0.05 < cluster.graph["all_reduce_gbps"] < 0.11
