"""What you simulate is what you launch: both engines give the same run, record by record."""

import os
import signal
import time
from typing import Any

import numpy as np
import pandas
import psutil
import pytest
import torch

import decentral
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.ray import RayEngine
from decentral.experiment import build

pytestmark = pytest.mark.slow

QUICKSTART = "configs/quickstart.yaml"
ALGORITHMS = {
    "parallel_sgd": {},
    "local_sgd": {"period": 8},
    "gossip_sgd": {},
    "gossip_pga": {"period": 8},
    "gossip_aga": {"initial_period": 4, "warmup": 20},
}
TOPOLOGIES = {
    "ring": {"name": "ring"},
    "one_peer_exponential": {"name": "one_peer_exponential"},
    "file": {4: {"file": "topologies/square4.gml"}, 5: {"file": "topologies/house5.gml"}},
}
COLUMNS = ["loss", "consensus_distance", "eval_loss"]
DIAGNOSTICS = ("gradient_square", "sharpness", "hessian", "two_over_lr", "drift")


def launched(config, cluster):
    """The metrics of a run on the actors that tests share."""
    experiment = build(config)
    engine = RayEngine(experiment, actors=cluster.actors(config.workers))
    try:
        records = list(Coordinator(experiment, engine).run())
    finally:
        engine.close()
    return pandas.DataFrame([record for record in records if record is not None])


def both(cluster, **overrides: Any):
    """The quickstart, changed, on both engines: their metrics."""
    config = load(QUICKSTART, overrides)
    sim = decentral.run(QUICKSTART, engine="sim", **overrides)
    return sim.metrics, launched(config, cluster)


def assert_equal(sim, launched, rtol, atol, until=None):
    if until is not None:
        sim, launched = sim[sim.step <= until], launched[launched.step <= until]
    assert len(sim) == len(launched) > 0
    assert list(sim.columns) == list(launched.columns)
    figures = [c for c in sim.columns if c.startswith(DIAGNOSTICS)]
    near = [*COLUMNS, *(c for c in sim.columns if c == "validation_loss"), *figures]
    exact = [c for c in sim.columns if c not in (*near, "time_s", "sim_time_s")]
    for column in exact:
        if "accuracy" not in column:
            assert list(sim[column]) == list(launched[column]), column
    np.testing.assert_allclose(sim.sim_time_s, launched.sim_time_s, rtol=1e-12)
    for column in near:
        a, b = sim[column].dropna(), launched[column].dropna()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=column)


# Who exchanges with no neighbours does the same over each topology.
ALONE = ("parallel_sgd", "local_sgd", "post_local_sgd", "qsr", "hierarchical_sgd", "slowmo")
ALONE += ("diloco", "zo_sgd")
WHOLE = [
    (algorithm, topology, workers)
    for algorithm in ALGORITHMS
    for topology in TOPOLOGIES
    for workers in (4, 5)
    if algorithm not in ALONE or topology == "ring"
]


@pytest.mark.parametrize(("algorithm", "topology", "workers"), WHOLE)
def test_engines_agree_over_a_whole_run(cluster, algorithm, topology, workers):
    chosen = TOPOLOGIES[topology]
    overrides = {
        "workers": workers,
        "steps": 80,
        "lr_schedule.milestones": [40],
        "record.evaluate_every": 20,
        "algorithm": {"name": algorithm, **ALGORITHMS[algorithm]},
        "topology": chosen.get(workers, chosen),
        "dtype": "float64",
        "task.validation": 0.1,
    }
    sim, launched = both(cluster, **overrides)
    # atol: parallel replicas differ by nothing but the rounding of their mean, 1e-16 of x.
    assert_equal(sim, launched, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("algorithm", "topology", "workers"), [case for case in WHOLE if case[2] == 5]
)
def test_engines_agree_in_float32_over_the_first_steps(cluster, algorithm, topology, workers):
    """Rounding differs between a stacked and a single product, and grows from step to step."""
    chosen = TOPOLOGIES[topology]
    sim, launched = both(
        cluster,
        workers=workers,
        steps=50,
        algorithm={"name": algorithm, **ALGORITHMS[algorithm]},
        topology=chosen.get(workers, chosen),
    )
    assert_equal(sim, launched, rtol=1e-4, atol=1e-6)


SYNCHRONOUS = {
    "post_local_sgd": {"period": 6, "start": 5},
    "qsr": {"base_period": 2, "alpha": 0.2},
    "hierarchical_sgd": {"period": 8, "group_period": 2, "groups": 2},
    "slowmo": {"period": 6},
    "diloco": {"period": 6},
    "consensus_control": {"fraction": 0.3},
    "gossip_cta": {},
    "gradient_tracking": {},
    "gt_pga": {"period": 6},
    "d2": {},
    "qg_dsgdm": {},
    "decentlam": {},
    "sgp": {},
    "relay_sgd": {},
    "noloco": {"period": 3},
    "choco_sgd": {"compression": {"name": "random_k", "fraction": 0.2}, "consensus_step": 0.4},
    "zo_sgd": {"directions": 3, "mu": 0.01},
    "cbo": {"neighbours": True},
    "gossip_sgd": {"wire": {"name": "int8"}, "gossip_period": 2},
    "gossip_pga": {"period": 6, "outer": {"name": "slowmo"}, "wire": {"name": "bfloat16"}},
}
STATIC = ("d2", "choco_sgd")
OWN_MOMENTUM = ("qg_dsgdm", "decentlam", "cbo")


@pytest.mark.parametrize("topology", ["path", "exponential", "one_peer_exponential"])
@pytest.mark.parametrize("algorithm", SYNCHRONOUS)
def test_engines_agree_on_every_method(cluster, algorithm, topology):
    if (
        (algorithm in STATIC and topology == "one_peer_exponential")
        or (algorithm == "d2" and topology == "exponential")
        or (algorithm == "relay_sgd" and topology != "path")
        or (algorithm in ALONE and topology != "path")
    ):
        pytest.skip(f"{algorithm} does not take {topology}, or does the same over each")
    sim, launched = both(
        cluster,
        workers=4,
        steps=30,
        dtype="float64",
        algorithm={"name": algorithm, **SYNCHRONOUS[algorithm]},
        topology={"name": topology},
        optimizer={"name": "sgd", "lr": 0.1}
        if algorithm in OWN_MOMENTUM
        else {"name": "adam", "lr": 0.01},
        lr_schedule={"name": "step", "milestones": [15], "gamma": 0.5},
        record={"every": 4, "evaluate_every": 12},
    )
    assert_equal(sim, launched, rtol=1e-9, atol=1e-13)


def test_engines_agree_on_push_sum_over_a_graph_that_is_not_regular(cluster):
    sim, launched = both(
        cluster,
        workers=4,
        steps=30,
        dtype="float64",
        algorithm={"name": "sgp"},
        topology={"name": "star", "weights": "push"},
    )
    assert_equal(sim, launched, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("algorithm", ["parallel_sgd", "local_sgd"])
def test_engines_agree_on_batches_that_grow(cluster, algorithm):
    sim, launched = both(
        cluster,
        workers=3,
        steps=30,
        dtype="float64",
        algorithm={"name": algorithm} | ({"period": 6} if algorithm == "local_sgd" else {}),
        gradient={"accumulate": 2},
        norm_test={"tolerance": 0.2, "every": 5, "max_accumulate": 8},
    )
    assert sim.batch_size.iloc[-1] > 2 * 32
    assert_equal(sim, launched, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("algorithm", ["ad_psgd", "a2cid2"])
def test_asynchronous_methods_train_on_both_engines(cluster, algorithm):
    """Who does which gradient is up to the machine there, and to the queue here: what is sent and
    the clock are the same, and both learn."""
    sim, launched = both(
        cluster,
        workers=4,
        steps=300,
        algorithm={"name": algorithm, "schedule": {"name": "every", "period": 150}},
        record={"every": 50},
    )
    assert list(sim.bytes_sent) == list(launched.bytes_sent)
    np.testing.assert_allclose(sim.sim_time_s, launched.sim_time_s, rtol=1e-12)
    assert list(sim.lr) == list(launched.lr)
    for metrics in (sim, launched):
        assert metrics.eval_accuracy.iloc[-1] > 0.9


@pytest.mark.parametrize("buffers", ["average", "local", "recalibrate"])
def test_engines_agree_on_models_with_buffers(on_shared_actors, tmp_path, monkeypatch, buffers):
    (tmp_path / "normed.py").write_text(NORMED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {
        "workers": 3,
        "steps": 12,
        "dtype": "float64",
        "buffers": buffers,
        "task": {"name": "normed:make", "batch_size": 8},
        "optimizer": {"name": "adam", "lr": 0.01},
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"name": "path"},
        "network": {"compute_ms": 1},
        "record": {"every": 3, "evaluate_every": 6},
        "diagnostics": {
            "every": 6,
            "gradient_norms": {"batches": 3},
            "sharpness": {},
            "trace": {"vectors": 3},
            "drift": True,
        },
    }
    results = [decentral.run(config, engine=e) for e in ("sim", "ray")]
    assert_equal(*(r.metrics for r in results), rtol=1e-9, atol=1e-13)
    assert results[1].metrics.filter(regex="^(sharpness|drift)").notna().sum().min() == 2
    sim, launched = (r.model.state_dict() for r in results)
    assert sim["1.running_mean"].abs().max() > 0.01  # the statistics did move
    for name, value in sim.items():
        np.testing.assert_allclose(value, launched[name], rtol=1e-9, err_msg=name)


def test_engines_agree_on_a_method_of_the_users_own(cluster, quick, tmp_path, monkeypatch):
    (tmp_path / "drifting.py").write_text(DRIFTING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load(quick | {"algorithm": {"name": "drifting:drift", "share": 0.5}, "steps": 6})
    sim = decentral.run(config.model_dump(exclude_none=True)).metrics
    assert_equal(sim, launched(config, cluster), rtol=1e-9, atol=1e-13)


DRIFTING = """
from decentral.algorithms import Algorithm, Averaging
from decentral.algorithms.schedules import Every

class Drift:
    equation = "s <- W (s + g);  x <- W (x - gamma (g + share s))"
    source, sends, requires = "made up", "2 D to each neighbour", "doubly stochastic"

    def __init__(self, share):
        self.share = share

    def step(self, replica):
        gradient, state = replica.gradient(), replica.state
        total = state["sum"] + gradient if state else gradient.clone()
        replica.mix_(total)
        state["sum"] = total
        replica.descend(gradient + self.share * total)
        replica.average()

def drift(share: float, period: int = 4) -> Algorithm:
    return Algorithm(Drift(share), Averaging.NEIGHBOURS, Every(period))
"""


NORMED = """
import torch
from torch import nn
from decentral import Task

def make(workers, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(90, 6, generator=generator) * 3 + 1
    y = (x[:, 0] > x[:, 1]).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(6, 6), nn.Linear(6, 2)
        tied = nn.Linear(6, 6)
        tied.weight = first.weight
        frozen = nn.Linear(6, 6).requires_grad_(False)
        model = nn.Sequential(first, nn.BatchNorm1d(6), tied, frozen, nn.Tanh(), last)
    return Task(model, nn.functional.cross_entropy, (x, y), (x, y))
"""


@pytest.mark.parametrize("exclude", ["none", "norms_and_biases"])
def test_engines_agree_on_a_model_with_every_kind_of_parameter(
    on_shared_actors, tmp_path, monkeypatch, exclude
):
    """Weights, biases, norms and an embedding that the output shares; some are frozen."""
    (tmp_path / "language.py").write_text(LANGUAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {
        "workers": 3,
        "steps": 12,
        "dtype": "float64",
        "task": {"name": "language:make", "batch_size": 4},
        "optimizer": {
            "name": "adamw",
            "lr": 0.001,
            "weight_decay": 20.0,
            "weight_decay_exclude": exclude,
        },
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"name": "path"},
        "network": {"compute_ms": 1},
        "record": {"every": 3, "evaluate_every": 6},
    }
    results = [decentral.run(config, engine=e) for e in ("sim", "ray")]
    assert_equal(*(r.metrics for r in results), rtol=1e-9, atol=1e-13)
    sim, launched = (r.model.state_dict() for r in results)
    start = build(load(config)).task.model.state_dict()
    for name, value in sim.items():
        np.testing.assert_allclose(value, launched[name], rtol=1e-9, err_msg=name)
        frozen = name in ("mixer.bias", "first_norm.weight")
        assert torch.equal(value, start[name].double()) == frozen, name
    assert torch.equal(sim["embedding.weight"], sim["head.weight"])
    # Twelve steps shrink what decays by 0.98^12 = 0.785; Adam itself moves it by about 0.012.
    for name in ("embedding.weight", "mixer.weight", "last_norm.weight"):
        decays = name != "last_norm.weight" or exclude == "none"
        expected = start[name] * (0.98**12 if decays else 1)
        assert (sim[name] - expected).abs().max() < 0.02, name


LANGUAGE = """
import torch
from torch import nn
from decentral import Task

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.first_norm, self.last_norm = nn.LayerNorm(6), nn.LayerNorm(6)
        self.mixer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.mixer.bias.requires_grad_(False)
        self.first_norm.weight.requires_grad_(False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.last_norm(x + torch.tanh(self.mixer(self.first_norm(x)))))

def loss(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

def accuracy(output, target):
    return (output.argmax(-1) == target).double().mean()

def make(workers, seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(7, (60, 9), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Language()
    data = (text[:, :-1], (text[:, :-1] * 3 + 1) % 7)
    return Task(model, loss, data, data, accuracy=accuracy)
"""


def assert_gone(pids):
    """No such process is left, or comes to an end within ten seconds."""
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 10)
    assert not alive


def test_a_killed_worker_is_named_at_once(cluster):
    config = load(
        QUICKSTART,
        {
            "workers": 4,
            "steps": 10_000,
            "record.every": 5_000,
            "on_worker_failure": "stop",
        },
    )
    experiment = build(config)
    engine = RayEngine(experiment)
    try:
        coordinator = Coordinator(experiment, engine)
        segments = coordinator.run()
        next(segments)
        _, pid = engine._nodes[2]
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(decentral.WorkerError, match=rf"worker 2 \(process {pid}.*died.*step"):
            for _ in segments:
                pass
        assert time.monotonic() - killed < 15
    finally:
        pids = [pid for _, pid in engine._nodes.values()]
        engine.close()
    assert_gone(pids)


FAILING = """
import torch
from decentral import Task

class Fails(torch.nn.Linear):
    calls = 0

    def forward(self, x):
        Fails.calls += 1
        if Fails.calls > 20:
            raise OSError("the disk is gone")
        return super().forward(x)

def make(workers, seed):
    return Task(Fails(2, 1), torch.nn.functional.mse_loss, (torch.ones(9, 2), torch.ones(9, 1)))
"""


def test_an_error_on_a_worker_is_told_and_the_records_are_kept(
    on_shared_actors, tmp_path, monkeypatch
):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {
        "workers": 2,
        "steps": 1000,
        "engine": "ray",
        "task": {"name": "failing:make", "batch_size": 4},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "algorithm": {"name": "local_sgd", "period": 5},
        "network": {"compute_ms": 1},
        "record": {"every": 5},
    }
    with pytest.raises(decentral.WorkerError, match=r"worker \d failed at step \d+.*disk is gone"):
        decentral.run(config, out=tmp_path / "out")
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 2
    assert '"status": "failed"' in (tmp_path / "out/summary.json").read_text()


def test_one_worker_runs_on_ray(cluster):
    sim, launched = both(cluster, workers=1, steps=20, dtype="float64")
    assert_equal(sim, launched, rtol=1e-9, atol=1e-13)
    assert launched.consensus_distance.abs().max() == 0


def test_bfloat16_runs_on_both_engines(cluster):
    sim, launched = both(cluster, workers=3, steps=24, dtype="bfloat16", **{"record.every": 8})
    assert launched.loss.iloc[-1] < 0.7 * launched.loss.iloc[0]
    np.testing.assert_allclose(sim.loss, launched.loss, rtol=0.2)  # eight bits of mantissa
