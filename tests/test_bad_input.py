"""Every wrong input ends with exit code 2 and one clear message, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from decentral.cli import main

ROOT = Path(__file__).parents[1]
OWN = """
import torch
from decentral import Task
from decentral.algorithms import Algorithm, Averaging, gossip_sgd
from decentral.algorithms.adapt_then_combine import AdaptThenCombine
from decentral.algorithms.schedules import Never

def raises(workers, seed):
    raise OSError("no such disk")

def returns_nothing(workers, seed):
    pass

def diverges(workers, seed):
    nan = torch.full((8, 2), float("nan"))
    return Task(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, (nan, torch.zeros(8, 1)))

def mismatched(workers, seed):
    return Task(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss,
                (torch.zeros(8, 2), torch.zeros(8, 1)))

def frozen(workers, seed):
    model = torch.nn.Linear(2, 1).requires_grad_(False)
    return Task(model, torch.nn.functional.mse_loss, (torch.zeros(8, 2), torch.zeros(8, 1)))

not_callable = 3

def method(share: float = 0.5):
    if share > 1:
        raise ArithmeticError("a share above 1")
    return gossip_sgd()

def no_method():
    return "gossip"

class Silent:
    equation = source = sends = "of mine"
    def step(self, replica):
        pass

class Vague(AdaptThenCombine):
    requires = "symmetric"

def silent():
    return Algorithm(Silent(), Averaging.NEIGHBOURS, Never())

def vague():
    return Algorithm(Vague(), Averaging.NEIGHBOURS, Never())
"""

# Overrides of the base config, and what the message must say.
WRONG = {
    "unknown key": (["wrokers=4"], "wrokers: is not a known key; did you mean workers?"),
    "unknown nested key": (["record.evry=4"], "did you mean record.every?"),
    "key of a scalar": (["steps.every=4"], "steps.every: cannot be set"),
    "wrong type": (["workers=many"], "workers: input should be a valid integer; got 'many'"),
    "wrong type of a float": (["network.latency_ms=fast"], "network.latency_ms"),
    "a section that is no section": (["record=5"], "record: "),
    "missing key": (["workers=null"], "workers: is required"),
    "no workers": (["workers=0"], "workers: input should be greater than 0; got 0"),
    "no steps": (["steps=0"], "steps: "),
    "negative seed": (["seed=-1"], "seed: "),
    "name with a slash": (["name=a/b"], "name: "),
    "unknown engine": (["engine=mpi"], "engine: input should be 'sim' or 'ray'; got 'mpi'"),
    "unknown dtype": (["dtype=float8"], "dtype: "),
    "unknown algorithm": (["algorithm.name=gosip_pga"], "did you mean 'gossip_pga'?"),
    "period zero": (["algorithm.period=0"], "algorithm.period: "),
    "period of the wrong type": (["algorithm.period=often"], "algorithm.period: "),
    "period missing": (["algorithm.period=null"], "algorithm.period: is required"),
    "period where there is none": (["algorithm.name=gossip_sgd"], "gossip_sgd takes no option"),
    "no topology": (["topology=null"], "topology: gossip_pga averages over a graph"),
    "unknown topology": (["topology.name=rign"], "did you mean 'ring'?"),
    "option of another topology": (["topology.degree=3"], "ring takes no option 'degree'"),
    "impossible size": (["topology.name=hypercube", "workers=6"], "4 or 8"),
    "weights that do not fit": (
        ["topology.name=exponential", "topology.weights=metropolis"],
        "weights: uniform",
    ),
    "not doubly stochastic": (["topology.name=star", "topology.weights=uniform"], "gossip_pga"),
    "missing graph file": (["topology.name=null", "topology.file=no.gml"], "no.gml"),
    "graph of another size": (
        ["topology.name=null", "topology.file=house5.gml"],
        "workers is 4; set workers: 5",
    ),
    "disconnected graph": (["topology.name=null", "topology.file=apart.gml"], "connected"),
    "name and file": (["topology.file=house5.gml"], "both"),
    "unknown optimizer": (["optimizer.name=sdg"], "did you mean 'sgd'?"),
    "negative learning rate": (["optimizer.lr=-0.1"], "optimizer.lr: must be at least 0"),
    "no learning rate": (["optimizer.lr=null"], "optimizer.lr: is required"),
    "unknown optimizer option": (["optimizer.momentun=0.9"], "did you mean 'momentum'?"),
    "option that torch refuses": (["optimizer.momentum=-1"], "optimizer: sgd refuses"),
    "lbfgs": (["optimizer.name=lbfgs", "optimizer.momentum=null"], "lbfgs refuses"),
    "adafactor": (["optimizer.name=adafactor", "optimizer.momentum=null"], "not element-wise"),
    "unknown schedule": (["lr_schedule.name=stepp"], "did you mean 'step'?"),
    "schedule without its option": (["lr_schedule.name=step"], "lr_schedule.milestones"),
    "schedule too short": (
        ["lr_schedule.name=one_cycle", "lr_schedule.max_lr=1", "lr_schedule.total_steps=3"],
        "lr_schedule: torch refuses it",
    ),
    "unknown task": (["task.name=digit"], "did you mean 'digits'?"),
    "unknown task option": (["task.batchsize=3"], "did you mean"),
    "unknown model": (["task.model.name=resnet"], "task.model"),
    "unknown model option": (["task.model.hiden=[3]"], "task.model.hiden"),
    "no samples for a worker": (["workers=4000"], "4000"),
    "unknown partition": (["task.partition.kind=dirichlett"], "did you mean 'dirichlet'?"),
    "negative alpha": (["task.partition.alpha=-1"], "task.partition.alpha"),
    "partition of a task that has its own": (
        ["task.name=quadratic", "task.model=null"],
        "task.partition",
    ),
    "task that cannot be imported": (["task.name=nowhere:make", "task.model=null"], "nowhere"),
    "task that is not in its module": (["task.name=mine:make", "task.model=null"], "'make'"),
    "task that is no function": (["task.name=mine:not_callable", "task.model=null"], "no function"),
    "task that raises": (["task.name=mine:raises", "task.model=null"], "no such disk"),
    "task that returns nothing": (
        ["task.name=mine:returns_nothing", "task.model=null"],
        "must return a decentral.Task",
    ),
    "task whose loss is not finite": (
        ["task.name=mine:diverges", "task.model=null", "task.partition=null"],
        "nan at the start",
    ),
    "task whose shapes do not fit": (
        ["task.name=mine:mismatched", "task.model=null", "task.partition=null"],
        "first batch",
    ),
    "task with nothing to train": (
        ["task.name=mine:frozen", "task.model=null", "task.partition=null"],
        "no parameter",
    ),
    "method that cannot be imported": (
        ["algorithm={name: nowhere:make}"],
        "algorithm.name: cannot import 'nowhere:make': No module named 'nowhere'",
    ),
    "method that is not in its module": (["algorithm={name: mine:gossip}"], "no function 'gossip'"),
    "option of an own method": (
        ["algorithm={name: mine:method, shar: 1}"],
        "mine:method takes no option 'shar'; did you mean 'share'?",
    ),
    "option of the wrong type": (["algorithm={name: mine:method, share: much}"], "share: "),
    "method that raises": (
        ["algorithm={name: mine:method, share: 2.0}"],
        "mine:method failed: ArithmeticError: a share above 1",
    ),
    "method that is none": (["algorithm={name: mine:no_method}"], "must return a decentral.algor"),
    "rule without what it asks of W": (
        ["algorithm={name: mine:silent}"],
        "Silent has no requires",
    ),
    "rule that asks what nobody knows": (
        ["algorithm={name: mine:vague}"],
        "its `requires` is 'symmetric'",
    ),
    "simulator on a GPU that is not there": (["sim.device=cuda"], "sim.device"),
    "a tree of parts that is none": (["algorithm.schedule=often"], "algorithm.schedule: must name"),
    "unknown part": (["algorithm.outer={name: slomo}"], "did you mean 'slowmo'?"),
    "option of a part": (["algorithm.schedule={name: every, period: 0}"], "schedule.period"),
    "more groups than workers": (
        ["algorithm={name: hierarchical_sgd, period: 8, group_period: 2, groups: 9}"],
        "algorithm.groups: 4 workers cannot fall into 9 groups",
    ),
    "relay on a graph that is no tree": (
        ["algorithm={name: relay_sgd}"],
        "relay_sgd needs a tree: n - 1 undirected links that join all n workers, but topology ring"
        " has 4 for 4; use path, star or tree",
    ),
    "relay on a directed graph": (
        ["algorithm={name: relay_sgd}", "topology={name: exponential}"],
        "directed",
    ),
    "relay over time": (
        ["algorithm={name: relay_sgd}", "topology={name: one_peer_exponential}"],
        "needs the same W at every step",
    ),
    "relay with a wire format": (
        ["algorithm={name: relay_sgd}", "topology.name=path", "algorithm.wire={name: int8}"],
        "takes no wire format",
    ),
    "pauses in a method that has none": (
        ["algorithm={name: d2}", "algorithm.gossip_period=3", "topology.weights=lazy"],
        "algorithm.gossip_period: d2 has no steps without",
    ),
    "gossip period zero": (["algorithm.gossip_period=0"], "algorithm.gossip_period: "),
    "consensus control of a method that does not show": (
        ["algorithm={name: gradient_tracking}", "algorithm.schedule={name: consensus_control}"],
        "use it with gossip_sgd",
    ),
    "consensus control without neighbours": (
        ["algorithm={name: local_sgd, period: 3}", "algorithm.schedule={name: consensus_control}"],
        "use it with gossip_sgd",
    ),
    "asynchronous on a directed graph": (
        ["algorithm={name: ad_psgd}", "topology={name: exponential}"],
        "ad_psgd needs undirected links",
    ),
    "asynchronous over time": (
        ["algorithm={name: a2cid2}", "topology={name: one_peer_exponential}"],
        "needs the same W at every step",
    ),
    "asynchronous with groups": (
        [
            "algorithm={name: ad_psgd}",
            "algorithm.schedule={name: hierarchical, period: 8, group_period: 2, groups: 2}",
        ],
        "have no groups",
    ),
    "asynchronous with a wire format": (
        ["algorithm={name: ad_psgd}", "algorithm.wire={name: int8}"],
        "takes no wire format",
    ),
    "norm test of one batch": (
        ["norm_test={tolerance: 1, max_accumulate: 8}"],
        "gradient.accumulate: the norm test compares the batches of a step",
    ),
    "norm test that cannot grow": (
        ["norm_test={tolerance: 1, max_accumulate: 2}", "gradient.accumulate=4"],
        "norm_test.max_accumulate: must be at least gradient.accumulate",
    ),
    "norm test of clipped gradients": (
        [
            "norm_test={tolerance: 1, max_accumulate: 8}",
            "gradient={accumulate: 2, clip_norm: 1}",
        ],
        "gradient.clip_norm: the norm test needs gradients as they are",
    ),
    "norm test without common steps": (
        ["norm_test={tolerance: 1, max_accumulate: 8}", "algorithm={name: ad_psgd}"],
        "norm_test: the norm test looks at",
    ),
    "outer optimizer of a method that has none": (
        ["algorithm={name: d2}", "algorithm.outer={name: slowmo}"],
        "d2 takes no outer optimizer",
    ),
    "outer optimizer without averages": (
        ["algorithm={name: gossip_sgd, outer: {name: slowmo}}"],
        "steps at global averages",
    ),
    "schedule of a method that averages gradients": (
        ["algorithm={name: parallel_sgd, schedule: {name: every, period: 2}}"],
        "averages gradients",
    ),
    "wire format of a method that does not gossip": (
        ["algorithm.name=local_sgd", "algorithm.wire={name: int8}"],
        "takes no wire format",
    ),
    "wire format that loses the mean": (
        ["algorithm.wire={name: top_k, fraction: 0.1}"],
        "there is no wire 'top_k'",
    ),
    "momentum beside quasi-global momentum": (
        ["algorithm={name: qg_dsgdm}"],
        "brings its own momentum and needs plain SGD",
    ),
    "d2 on an eigenvalue below -1/3": (
        ["algorithm={name: d2}", "topology.name=exponential"],
        "d2 needs a symmetric W",
    ),
    "d2 on a time-varying graph": (
        ["algorithm={name: d2}", "topology.name=one_peer_exponential"],
        "the same W at every step",
    ),
    "push-sum without column-stochastic weights": (
        ["algorithm={name: sgp}", "topology={name: star, weights: uniform}"],
        "use weights: push",
    ),
    "gossip with weights that push": (
        ["topology={name: star, weights: push}"],
        "doubly stochastic",
    ),
    "choco without a compressor": (
        ["algorithm={name: choco_sgd, consensus_step: 0.4}"],
        "algorithm.compression: is required",
    ),
    "choco with an unknown compressor": (
        ["algorithm={name: choco_sgd, consensus_step: 0.4, compression: {name: top}}"],
        "top_k",
    ),
    "an override without a value": (["steps"], "an override is key=value"),
}


@pytest.fixture
def place(tmp_path, monkeypatch, quick):
    """A working directory with a good config, and files that are wrong in one way each."""
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(quick))
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "house5.gml").write_text((ROOT / "topologies/house5.gml").read_text())
    nodes = "".join(f"node [ id {i} ]\n" for i in range(4))
    (tmp_path / "apart.gml").write_text(f"graph [\n{nodes}edge [ source 0 target 1 ]\n]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


def refused(capsys, arguments):
    """Run the command line, which must refuse; its message."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize("case", WRONG)
def test_wrong_config_is_refused(case, place, capsys):
    if case == "simulator on a GPU that is not there":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    overrides, message = WRONG[case]
    said = refused(capsys, ["run", "good.yaml", *overrides, "--out", "out"])
    assert said.startswith("error: ")
    assert message in said
    assert not (place / "out").exists()


@pytest.mark.slow
def test_more_gpus_than_the_cluster_has_are_refused(cluster, place, capsys):
    overrides = ["engine=ray", "ray.gpus_per_worker=64"]
    said = refused(capsys, ["run", "good.yaml", *overrides, "--out", "out"])
    assert said.startswith("error: ray.gpus_per_worker: 4 workers x 64 GPU asked, the cluster has")
    assert not (place / "out").exists()


@pytest.mark.slow
def test_a_ray_cluster_that_is_not_there_is_refused(alone, place, capsys):
    overrides = ["engine=ray", "ray.address=127.0.0.1:1"]
    said = refused(capsys, ["run", "good.yaml", *overrides, "--out", "out"])
    assert said.startswith("error: ray.address: ")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no.yaml"], "cannot read the config no.yaml"),
        (["run", "mine.py"], "mine.py"),
        (["run", "."], "cannot read the config"),
        (["run"], "name a config"),
        (["run", "good.yaml", "--out", "good.yaml/run"], "cannot write"),
        (["run", "good.yaml", "--out", "held"], "holds a run"),
        (["run", "--resume", "nowhere"], "not a run directory"),
        (["run", "--resume", "held"], "holds no checkpoint"),
        (["run", "good.yaml", "--resume", "held"], "leave CONFIG"),
        (["run", "good.yaml", "--speed", "9"], "--speed"),
        (["fly"], "fly"),
        (["topology", "rign", "-n", "4"], "did you mean 'ring'?"),
        (["topology", "ring"], "set workers"),
        (["topology", "no.gml"], "no.gml"),
        (["topology", "ring", "-n", "4", "--period", "0"], "--period"),
        (["topology", "ring", "-n", "4", "rows=2"], "ring takes no option"),
    ],
)
def test_wrong_command_line_is_refused(arguments, message, place, capsys):
    (place / "held").mkdir()
    (place / "held/config.yaml").write_text((place / "good.yaml").read_text())
    before = sorted(place.rglob("*"))
    assert message in refused(capsys, arguments)
    assert [p for p in sorted(place.rglob("*")) if "__pycache__" not in str(p)] == before


def test_every_wrong_key_is_named_at_once(place, capsys):
    said = refused(capsys, ["run", "good.yaml", "workers=0", "steps=-1"])
    assert "workers: " in said
    assert "steps: " in said


def test_a_process_exits_with_2(place):
    process = subprocess.run(
        [sys.executable, "-m", "decentral", "run", "good.yaml", "algorithm.period=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: algorithm.period: ")
    assert process.stdout == ""
