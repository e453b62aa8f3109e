"""Plans: step times against published ones and by hand, ranking, the race, and the command."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from test_cli import ROOT, call, place  # noqa: F401
from test_clock import (
    ALL_REDUCE_MS,
    BATCH,
    COMPUTE_MS,
    EPOCHS_AND_HOURS,
    IMAGES,
    MEASURED_MS,
    ONE_PEER_MS,
    PERIOD,
    WORKERS,
)

import decentral
from decentral.clock import Clock
from decentral.config import load
from decentral.plan import (
    Candidate,
    Cluster,
    Estimate,
    Measured,
    Target,
    Work,
    candidates,
    estimate,
    rank,
    search,
)
from decentral.plan.search import Progress, race, undominated
from decentral.topology import build as topology
from decentral.topology import read
from decentral.topology.theory import Transient

# ResNet-50 on ImageNet, as in the tests of the clock.

RESNET50 = 4 * 25_557_032  # bytes


@pytest.fixture(scope="module")
def imagenet():
    measured = Measured(ALL_REDUCE_MS, ONE_PEER_MS)
    cluster = Cluster.build(
        workers=WORKERS, compute_ms=COMPUTE_MS, measured=measured, size=RESNET50
    )
    these = candidates(WORKERS, topologies=["one_peer_exponential"], periods=[PERIOD])
    return {c.method: estimate(c, cluster, RESNET50) for c in these}


IMAGENET = Work(
    epochs={name: epochs for name, (epochs, _) in EPOCHS_AND_HOURS.items()},
    samples=IMAGES,
    batch=BATCH,
)


@pytest.mark.parametrize("method", ["parallel_sgd", "gossip_sgd", "gossip_pga"])
def test_measured_times_give_the_published_step_times_exactly(imagenet, method):
    assert imagenet[method].step_s * 1e3 == pytest.approx(MEASURED_MS[method], rel=1e-9)


def test_local_sgd_pays_for_an_all_reduce_every_sixth_step(imagenet):
    expected = COMPUTE_MS + ALL_REDUCE_MS / 6
    assert imagenet["local_sgd"].step_s * 1e3 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", EPOCHS_AND_HOURS)
def test_the_published_epochs_give_the_published_hours_within_two_percent(imagenet, method):
    seconds = IMAGENET.seconds(imagenet[method])
    assert seconds is not None
    assert seconds / 3600 == pytest.approx(EPOCHS_AND_HOURS[method][1], rel=0.02)


def test_the_published_hours_rank_the_methods(imagenet):
    ranked = [e.candidate.method for e in rank(list(imagenet.values()), IMAGENET)]
    known = sorted(EPOCHS_AND_HOURS, key=lambda name: EPOCHS_AND_HOURS[name][1])
    assert ranked == [*known, "local_sgd"]  # without epochs, it comes after


def test_measured_times_include_the_latencies_that_are_given_too():
    """e = a + S / bandwidth and t = n a + 2 S (n-1)/n / bandwidth, turned around and back."""
    cluster = Cluster.build(
        workers=5, latency_ms=2, compute_ms=1, measured=Measured(100.0, 30.0), size=1000
    )
    clock = Clock(
        np.zeros(5),
        2e-3,
        cluster.network["bandwidth_gbps"] / 8 * 1e9,
        all_reduce=decentral.clock.AllReduce("ring", cluster.network["all_reduce_gbps"] / 8 * 1e9),
    )
    assert clock.link_s(0, 1, 1000) == pytest.approx(30e-3, rel=1e-9)
    assert clock.all_reduce_s(1000) == pytest.approx(100e-3, rel=1e-9)


# By hand. Three workers on equal links: 10 ms of compute, messages of 1 MB that take 8 ms at
# 1 Gbit/s, latency 1 ms. An all-reduce: 2 * 8 * 2/3 + 3 * 1 = 13.667 ms; gossip on the ring of
# three, two neighbours on one card: 16 + 1 = 17 ms.

MB = 1_000_000
ALL_REDUCE = (2 * 8 * 2 / 3 + 3) * 1e-3
RING = 17e-3


def toy(**changes):
    options = {"workers": 3, "latency_ms": 1.0, "bandwidth_gbps": 1.0, "compute_ms": 10.0}
    return Cluster.build(**(options | changes))


BY_HAND = {
    Candidate("parallel_sgd"): 10e-3 + ALL_REDUCE,
    Candidate("local_sgd", None, 4): 10e-3 + ALL_REDUCE / 4,
    Candidate("gossip_sgd", "ring"): 10e-3 + RING,
    Candidate("gossip_pga", "ring", 4): 10e-3 + (3 * RING + ALL_REDUCE) / 4,
    Candidate("gossip_aga", "ring", 4): 10e-3 + (10 * RING + ALL_REDUCE) / 11,
}


@pytest.mark.parametrize("candidate", BY_HAND, ids=str)
def test_steps_of_three_workers_by_hand(candidate):
    assert estimate(candidate, toy(), MB).step_s == pytest.approx(BY_HAND[candidate], rel=1e-9)


@pytest.mark.parametrize(
    ("candidate", "sent"),
    [
        (Candidate("parallel_sgd"), 4 / 3 * MB),  # 2 (n-1)/n
        (Candidate("local_sgd", None, 4), MB / 3),
        (Candidate("gossip_sgd", "ring"), 2 * MB),
        (Candidate("gossip_pga", "ring", 4), (3 * 2 + 4 / 3) / 4 * MB),
    ],
)
def test_bytes_of_three_workers_by_hand(candidate, sent):
    assert estimate(candidate, toy(), MB).step_bytes == pytest.approx(sent, rel=1e-9)


def test_the_parts_of_a_step_by_hand():
    """gossip_pga, H = 4: gossip three times, 16 and 1 ms; an all-reduce once, 10.667 and 3 ms."""
    terms = estimate(Candidate("gossip_pga", "ring", 4), toy(), MB).terms
    expected = {
        "compute": 10e-3,
        "neighbours": 3 / 4 * 16e-3,
        "all_reduce": 2 * 8 * 2 / 3 / 4 * 1e-3,
        "latency": (3 * 1 + 3) / 4 * 1e-3,
    }
    assert terms == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "method", "dominated_by"),
    [
        ({}, "gossip_sgd", "neighbours"),  # 16 ms of 27
        ({"compute_ms": 17.0}, "gossip_sgd", "compute"),  # 17 against 16
        ({"latency_ms": 18.0}, "gossip_sgd", "latency"),
        ({}, "parallel_sgd", "all_reduce"),  # 10.667 against 10
        ({"compute_ms": 11.0}, "parallel_sgd", "compute"),
        ({"latency_ms": 4.0}, "parallel_sgd", "latency"),  # three hops of it, 12 ms
    ],
)
def test_what_dominates_a_step_by_hand(changes, method, dominated_by):
    graph = "ring" if method == "gossip_sgd" else None
    assert estimate(Candidate(method, graph), toy(**changes), MB).dominated_by == dominated_by


def test_an_asynchronous_step_takes_the_longer_of_computing_and_exchanging():
    """Two workers, an exchange a step: 10 ms of compute hide 9 ms of it, or are hidden by 29."""
    pair = Candidate("ad_psgd", "ring")
    network = {"workers": 2, "latency_ms": 1.0, "compute_ms": 10.0}
    fast = estimate(pair, Cluster.build(bandwidth_gbps=1.0, **network), MB)
    slow = estimate(pair, Cluster.build(bandwidth_gbps=8 / 28, **network), MB)
    assert fast.step_s == pytest.approx(10e-3, rel=0.02)  # the last exchange ends alone
    assert slow.step_s == pytest.approx(29e-3, rel=0.02)
    assert slow.dominated_by == "neighbours"
    assert fast.step_bytes == MB


@pytest.mark.parametrize("file", ["house5", "homes8"])
@pytest.mark.parametrize(
    "candidate",
    [
        Candidate("parallel_sgd"),
        Candidate("local_sgd", None, 4),
        Candidate("gossip_sgd", "one_peer_exponential"),
        Candidate("gossip_pga", "ring", 4),
        pytest.param(Candidate("ad_psgd", "ring"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_takes_the_time_and_sends_the_bytes_of_its_estimate(candidate, file):
    """On unequal links and workers; the clock of the run is told by the method itself."""
    cluster = Cluster.build(ROOT / f"topologies/{file}.gml", compute_ms=3)
    n, dim = cluster.workers, 1000
    made = estimate(candidate, cluster, 8 * dim)
    # A whole number of periods and turns, as in the estimate; random pairs take a longer mean.
    steps = 120 if candidate.method == "ad_psgd" else 12
    result = decentral.run(
        {
            "workers": n,
            "steps": 4 * steps,
            "task": {"name": "quadratic", "dim": dim, "samples_per_worker": 1, "batch_size": 1},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "dtype": "float64",
            "network": cluster.section,
            "record": {"every": 2 * steps},
            **candidate.config,
        }
    )
    half, whole = (result.metrics.iloc[k] for k in (0, 1))
    # Rounds have other pairs there and here, and all wait for all at a record.
    tolerance = 0.15 if candidate.method == "ad_psgd" else 1e-9
    step_s = (whole["sim_time_s"] - half["sim_time_s"]) / (2 * steps)
    assert made.step_s == pytest.approx(step_s, rel=tolerance)
    sent = (whole["bytes_sent"] - half["bytes_sent"]) / (2 * steps) / n
    assert made.step_bytes == pytest.approx(sent, rel=tolerance)


# A cluster's cables under a topology of another shape.


def test_a_topologys_messages_take_the_path_of_least_latency_over_the_cables(tmp_path):
    """Cables 0 - 1 - 2: what 0 and 2 exchange on the ring goes over both, 1 + 2 ms."""
    (tmp_path / "line.gml").write_text(
        "graph [ node [ id 0 ] node [ id 1 ] node [ id 2 ]"
        " edge [ source 0 target 1 latency_ms 1.0 bandwidth_gbps 1.0 ]"
        " edge [ source 1 target 2 latency_ms 2.0 bandwidth_gbps 0.5 ] ]"
    )
    cables = read(tmp_path / "line.gml")
    clock = Clock(np.zeros(3), 9.0, 9.0, topology(3, "ring"), cluster=cables)
    assert clock.link_s(0, 2, MB) == pytest.approx(3e-3 + 16e-3)
    # Two messages each way on a card: 16 ms at 1 Gbit/s, at 2 of half the speed 32 ms.
    cluster = Cluster.build(tmp_path / "line.gml", compute_ms=0)
    ring = estimate(Candidate("gossip_sgd", "ring"), cluster, MB)
    assert ring.step_s == pytest.approx(32e-3 + 3e-3, rel=1e-9)


@pytest.mark.parametrize("name", ["house5", "homes8", "abilene"])
def test_a_cluster_whose_cables_are_the_topology_is_that_topology(name):
    file = str(ROOT / f"topologies/{name}.gml")
    n = len(read(file))
    config = {
        "workers": n,
        "steps": 9,
        "task": {"name": "quadratic"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"file": file},
        "network": {"compute_ms": 1},
        "record": {"every": 1},
    }
    alone = decentral.run(config).metrics.sim_time_s
    both = decentral.run(config | {"network": {"compute_ms": 1, "file": file}}).metrics.sim_time_s
    np.testing.assert_array_equal(alone, both)


# Ranking.


def row(name, step_s, transient):
    both = None if transient is None else Transient(transient, 10 * transient)
    return Estimate(Candidate("local_sgd", name), step_s, 0.0, {"compute": step_s}, None, both)


ROWS = [
    row("quick", 1.0, 900.0),
    row("nearly as quick", 1.09, 90.0),
    row("slower", 1.2, 9.0),
    row("slow", 3.0, 0.0),
    row("unknown", 0.5, None),
]


@pytest.mark.parametrize(
    ("work", "order"),
    [
        # within 10% of the shortest step the shorter stage; the others by step; unknown last
        (Work(), ["nearly as quick", "quick", "slower", "slow", "unknown"]),
        # 100 steps: 900 do not fit
        (Work(steps=100), ["nearly as quick", "slower", "slow", "unknown", "quick"]),
        # nor do ten times 90, unlike data
        (Work("non_iid", 100), ["slower", "slow", "unknown", "quick", "nearly as quick"]),
        (Work(steps=1000), ["quick", "nearly as quick", "slower", "slow", "unknown"]),
    ],
)
def test_the_order_of_a_plan_by_hand(work, order):
    assert [e.candidate.topology for e in rank(ROWS, work)] == order


def test_only_those_that_others_beat_in_all_that_counts_are_left_out():
    beaten = row("beaten", 1.1, 95.0)
    rows = [*ROWS, beaten]
    assert [e.candidate.topology for e in undominated(rows)] == [
        "quick", "nearly as quick", "slower", "slow", "unknown",
    ]  # fmt: skip


# The race.


def racing(curves, max_time=1e9):
    """Arms whose shortfall is a function of time; they are looked at once a second."""
    costs = dict.fromkeys(curves, 0)

    def advance(arms, budget_s):
        made = []
        for arm in arms:
            for now in range(costs[arm] + 1, math.floor(min(budget_s, max_time)) + 1):
                costs[arm] = now
                if curves[arm](now) <= 0:
                    break
            now = costs[arm]
            short = curves[arm](now) if now else None
            there = short is not None and short <= 0
            over = there or now >= max_time
            made.append(Progress(short, float(now) if there else None, over, now))
        return made

    return advance, costs


def test_halving_keeps_the_best_and_spends_little():
    """Arm i closes a gap of 1 at 1 / (40 + 10 i) a second: arm 0 is there at 40."""
    curves = {i: lambda t, i=i: 1 - t / (40 + 10 * i) for i in range(32)}
    advance, costs = racing(curves)
    latest = race(list(curves), advance, 2.0, lambda line: None)
    there = {arm: p.reached_s for arm, p in latest.items() if p.reached_s is not None}
    assert min(there.values()) == there[0] == 40
    assert sum(costs.values()) < sum(40 + 10 * i for i in range(32)) / 10


def test_an_arm_too_slow_to_be_looked_at_is_not_dropped():
    """`late` shows nothing before 50 s, and is there then; the others end at half the way."""
    curves = {i: lambda t: 1 - 0.5 * t / 200 for i in range(16)}

    def late(t):
        return 0.0 if t >= 50 else None

    advance, _ = racing(curves)
    before = Progress()

    def with_late(arms, budget_s):
        others = iter(advance([arm for arm in arms if arm != "late"], budget_s))
        done = Progress(0.0, 50.0, True, 1) if late(budget_s) is not None else before
        return [done if arm == "late" else next(others) for arm in arms]

    latest = race([*curves, "late"], with_late, 2.0, lambda line: None)
    assert latest["late"].reached_s == 50


def test_those_that_were_dropped_go_on_if_no_other_gets_there():
    """Eight lead early and stall; the last begins slowly and alone arrives."""
    curves = {i: lambda t: max(0.2, 1 - t / 5) for i in range(8)}
    curves[8] = lambda t: 1 - (t / 60) ** 3
    advance, _ = racing(curves, max_time=100)
    latest = race(list(curves), advance, 2.0, lambda line: None)
    assert latest[8].reached_s == 60
    assert all(latest[i].reached_s is None for i in range(8))


QUADRATIC = {
    "workers": 3,
    "dtype": "float64",
    "task": {"name": "quadratic", "dim": 1, "noise": 0.0, "heterogeneity": 0.0, "condition": 1},
}


def test_a_search_finds_the_time_that_the_closed_form_has():
    """f = (x - 1)^2 / 2 from 0 in steps of lr 0.1: f_k = 0.9^2k / 2 <= 0.01 from k = 19 on."""
    cluster = toy()
    base = QUADRATIC | {"network": cluster.section}
    these = [Candidate("parallel_sgd"), Candidate("local_sgd", None, 4)]
    estimates = [estimate(c, cluster, 8) for c in these]
    found, steps = search(
        base, estimates, Target("loss", 0.01), lrs=[0.01, 0.1], seeds=2, max_steps=40, every=1,
        jobs=1, say=lambda line: None,
    )  # fmt: skip
    assert (found[0].candidate, found[0].lr) == (Candidate("local_sgd", None, 4), 0.1)
    all_reduce = 3e-3 + 2 * 8 * 2 / 3 / 1.25e8
    assert found[0].times_s == pytest.approx([19 * 10e-3 + 4 * all_reduce] * 2)  # at 4, 8, 12, 16
    assert found[0].spread_s == pytest.approx(0)
    assert steps <= 4 * 40


def test_a_search_says_who_never_gets_there():
    cluster = toy()
    estimates = [estimate(Candidate("parallel_sgd"), cluster, 8)]
    found, steps = search(
        QUADRATIC | {"network": cluster.section}, estimates, Target("loss", 0.01), lrs=[0.01],
        max_steps=20, every=5, jobs=1, say=lambda line: None,
    )  # fmt: skip
    assert found[0].time_s is None
    assert not found[0].dropped
    assert steps == found[0].steps == 20
    assert found[0].shortfall == pytest.approx(0.99**40 / 2 - 0.01, rel=1e-6)


# The command.

CLUSTER = [
    "--workers", "4", "--bandwidth-gbps", "1", "--latency-ms", "0.5", "--compute-ms", "2",
]  # fmt: skip
FAST = ["--method", "gossip_pga", "--method", "local_sgd", "--topology", "ring", "--period", "4"]
DIGITS = ["--task", "digits", "task.model={name: mlp, hidden: [8]}"]


def test_json_has_everything(capsys):
    said = json.loads(call(capsys, "plan", *CLUSTER, "--parameters", "1e6", "--json"))
    assert set(said) == {
        "workers", "network", "message_bytes", "work", "estimates", "search", "best",
    }  # fmt: skip
    assert (said["workers"], said["message_bytes"]) == (4, 4_000_000)
    assert said["network"] == {"compute_ms": 2.0, "latency_ms": 0.5, "bandwidth_gbps": 1.0}
    assert said["search"] is said["best"] is None
    keys = {
        "method", "topology", "period", "step_s", "bytes_per_worker_and_step", "terms_s",
        "dominated_by", "beta", "transient_steps", "seconds", "too_short",
    }  # fmt: skip
    assert all(set(row) == keys for row in said["estimates"])
    assert {row["method"] for row in said["estimates"]} == {
        "parallel_sgd", "local_sgd", "gossip_sgd", "gossip_pga", "gossip_aga", "ad_psgd",
    }  # fmt: skip
    (ring,) = [
        r for r in said["estimates"] if (r["method"], r["topology"]) == ("gossip_sgd", "ring")
    ]
    assert ring["beta"] == pytest.approx(1 / 3)
    assert ring["transient_steps"]["iid"] == pytest.approx(4**3 / 3**4 / (2 / 3) ** 2)


def test_a_table_marks_steps_that_the_transient_stage_may_outlast(capsys):
    said = call(capsys, "plan", *CLUSTER, *FAST, "--parameters", "1e6", "--steps", "700")
    local = next(line for line in said.splitlines() if line.strip().startswith("local_sgd"))
    pga = next(line for line in said.splitlines() if line.strip().startswith("gossip_pga"))
    assert "!" in local  # 4^3 4^2 = 1024
    assert "!" not in pga


def test_a_written_config_loads_runs_and_is_the_best(capsys, place):  # noqa: F811
    said = call(capsys, "plan", *CLUSTER, *FAST, *DIGITS, "--json", "--write", "best.yaml",
                "--max-steps", "8", "task.batch_size=4", "--lr", "0.2")  # fmt: skip
    best = json.loads(said)["estimates"][0]
    config = load("best.yaml")
    assert config.algorithm.name == best["method"]
    assert (config.task.batch_size, config.steps) == (4, 8)
    assert config.optimizer.options == {"lr": 0.2}
    assert yaml.safe_load((place / "best.yaml").read_text())["network"]["latency_ms"] == 0.5
    result = decentral.run("best.yaml")
    final = result.summary["final"]
    assert final["sim_time_s"] == pytest.approx(8 * best["step_s"], rel=1e-9)
    assert final["bytes_sent"] == pytest.approx(8 * 4 * best["bytes_per_worker_and_step"])


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_an_interrupted_search_ends_its_processes_and_shows_no_traceback():
    words = [*CLUSTER, *DIGITS, "--target", "accuracy=0.999", "--max-steps", "4000"]
    words += [*FAST, "--lr", "0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "decentral", "plan", *words, "--jobs", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:  # the second budget: the processes are there
            if line.startswith("up to"):
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while group_lives(process.pid):  # soon nobody is left of it
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_search_from_the_command_line_writes_what_it_found(capsys, place):  # noqa: F811
    said = call(capsys, "plan", *CLUSTER, *FAST, *DIGITS, "--json", "--write", "best.yaml",
                "--target", "accuracy=0.5", "--max-steps", "60", "--seeds", "2", "--lr", "0.3",
                "--jobs", "2")  # fmt: skip
    found = json.loads(said)["search"]["found"][0]
    config = load("best.yaml")
    assert config.algorithm.name == found["method"]
    metrics = decentral.run(config.model_dump(exclude_none=True)).metrics
    there = metrics[metrics.eval_accuracy >= 0.5].iloc[0]
    assert there["sim_time_s"] == found["times_s"][0]


SIZED = [*CLUSTER, "--parameters", "10"]
WRONG = {
    "--epochs: no plan has a method 'pga'": [*SIZED, "--epochs", "pga=9"],
    "--epochs: is METHOD=NUMBER": [*SIZED, "--epochs", "gossip_pga=many"],
    "--samples: epochs become steps": [*SIZED, "--epochs", "gossip_pga=9"],
    "--parameters: say how large": CLUSTER,
    "--target: needs a task": [*SIZED, "--target", "accuracy=0.9"],
    "--write: needs a task": [*SIZED, "--write", "best.yaml"],
    "--task: key=value changes": [*SIZED, "task.batch_size=3"],
    "--parameters: digits brings its own": [*SIZED, "--task", "digits"],
    "--target: is accuracy=0.95": [*CLUSTER, *DIGITS, "--target", "f1=0.9"],
    "algorithm.name: is the plan's own": [*CLUSTER, *DIGITS, "algorithm.name=d2"],
    "optimizer.lr: is the plan's own": [*CLUSTER, *DIGITS, "optimizer.lr=1"],
    "--write: good.yaml is there": [*CLUSTER, *DIGITS, "--write", "good.yaml"],
    "--method: there is no method to plan with 'd2'": [*SIZED, "--method", "d2"],
    "--cluster: a cluster is a graph file or": ["--parameters", "9", "--compute-ms", "1"],
    "--bandwidth-gbps: says the same as --exchange-ms": [*SIZED, "--exchange-ms", "3"],
    "--exchange-ms: must be longer": [
        "-n", "4", "--latency-ms", "9", "--exchange-ms", "3", "--compute-ms", "1",
        "--parameters", "9",
    ],
    "--compute-ms: say what": ["-n", "4", "--parameters", "9"],
    "--data: there is no kind of data 'skewed'; allowed: iid, non_iid": [
        *SIZED, "--data", "skewed",
    ],
    "--cluster: 4 of the 4 edges of square4.gml have no latency_ms": [
        "--cluster", str(ROOT / "topologies/square4.gml"), "--parameters", "9",
        "--compute-ms", "1",
    ],
    "--cluster: there is no topology file": [
        "--cluster", "nowhere.gml", "--parameters", "9", "--compute-ms", "1"
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_with_its_option(message, capsys, place):  # noqa: F811
    assert f"error: {message}" in call(capsys, "plan", *WRONG[message], code=2)


def test_a_plan_may_measure_first(capsys, place, monkeypatch):  # noqa: F811
    """The file that is measured is the cluster of the plan; measuring itself has its own tests."""
    from decentral import measure

    def measured(config, out, say):
        say(f"measuring {config.workers} workers")
        text = (ROOT / "topologies/racks16.gml").read_text()
        out.write_text(text.replace("graph [", "graph [\n compute_ms 5.5", 1))

    monkeypatch.setattr(measure, "measure_command", measured)
    words = (
        "plan",
        "--measure",
        "good.yaml",
        "--cluster",
        "new.gml",
        "--parameters",
        "9",
        "--json",
    )
    said = json.loads(call(capsys, *words))
    assert said["network"]["compute_ms"] == 5.5
    assert "--cluster: new.gml is there already" in call(capsys, *words, code=2)
    alone = ("plan", "--measure", "good.yaml", "--parameters", "9")
    assert "--measure: writes what it measures" in call(capsys, *alone, code=2)


def test_attributes_that_a_file_lacks_may_come_from_options(capsys):
    file = str(ROOT / "topologies/square4.gml")
    said = call(capsys, "plan", "--cluster", file, "--parameters", "9", "--compute-ms", "1",
                "--latency-ms", "1", "--bandwidth-gbps", "1", "--json")  # fmt: skip
    assert json.loads(said)["network"]["file"] == file


def test_a_measured_file_brings_its_compute_time_and_all_reduce(tmp_path):
    text = (ROOT / "topologies/racks16.gml").read_text()
    file = tmp_path / "measured.gml"
    file.write_text(text.replace("graph [", "graph [\n compute_ms 5.5\n all_reduce_gbps 2.5", 1))
    cluster = Cluster.build(file)
    assert cluster.network == {"compute_ms": 5.5, "all_reduce_gbps": 2.5}
    told = Cluster.build(file, compute_ms=7.0, all_reduce_gbps=1.0)
    assert told.network == {"compute_ms": 7.0, "all_reduce_gbps": 1.0}
    file.write_text(text.replace("graph [", "graph [\n compute_ms -1", 1))
    with pytest.raises(decentral.UserError, match=r"--cluster: compute_ms of measured.gml must be"):
        Cluster.build(file)
