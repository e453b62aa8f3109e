"""Configs: how they are read, overridden, checked and written, and that every shipped one works."""

import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml

import decentral
from decentral import UserError
from decentral.config import dump, load, parse_overrides
from decentral.experiment import build
from decentral.sweep.spec import read_sweep

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SWEEPS = [path for path in CONFIGS if "compare" in yaml.safe_load(path.read_text())]
SHIPPED = [path for path in CONFIGS if path not in SWEEPS]
LEAST = {
    "workers": 2,
    "steps": 5,
    "task": {"name": "quadratic"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "algorithm": {"name": "parallel_sgd"},
}


def written(folder, text, name="config.yaml"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_defaults():
    config = load(LEAST)
    assert (config.name, config.seed, config.engine, config.dtype) == ("run", 0, "sim", "float32")
    assert (config.topology, config.lr_schedule, config.checkpoint.every) == (None, None, None)
    assert (config.record.every, config.record.evaluate_every) == (10, None)
    assert (config.task.batch_size, config.task.sampling) == (32, "shuffle")
    assert (config.network.latency_ms, config.network.bandwidth_gbps) == (0.1, 10.0)
    assert config.network.compute_ms is None
    assert (config.sim.device, config.ray.address) == ("cpu", None)
    assert (config.ray.cpus_per_worker, config.ray.gpus_per_worker) == (1.0, 0.0)


def test_a_file_and_the_mapping_it_holds_are_the_same_config(tmp_path, quick):
    assert load(written(tmp_path, yaml.safe_dump(quick))) == load(quick)
    assert load(str(tmp_path / "config.yaml")) == load(MappingProxyType(quick))


def test_an_override_reaches_any_depth_and_leaves_its_neighbours(quick):
    config = load(quick, {"workers": 6, "task.model.hidden": [3], "algorithm.period": 9})
    assert config.workers == 6
    assert config.task.options["model"] == {"name": "mlp", "hidden": [3]}
    assert (config.algorithm.name, config.algorithm.options) == ("gossip_pga", {"period": 9})
    assert config.task.batch_size == 8


def test_an_override_makes_the_section_that_is_not_there():
    config = load(LEAST, {"topology.name": "ring", "lr_schedule.name": "step"})
    assert config.topology is not None
    assert config.topology.name == "ring"
    assert config.lr_schedule is not None


def test_a_whole_section_may_be_replaced(quick):
    config = load(quick, {"algorithm": {"name": "gossip_sgd"}})
    assert config.algorithm.options == {}


def test_later_overrides_win(quick):
    config = load(quick, {"algorithm": {"name": "local_sgd"}, "algorithm.period": 2})
    assert config.algorithm.options == {"period": 2}


def test_null_takes_a_key_away(tmp_path, quick):
    config = load(quick, {"algorithm.period": None, "topology": None, "record.every": None})
    assert config.algorithm.options == {}
    assert config.topology is None
    assert config.record.every == 10  # the default
    empty = yaml.safe_dump(LEAST) + "record:\ntopology: null\n"
    assert load(written(tmp_path, empty)) == load(LEAST)


def test_neither_load_nor_run_changes_a_mapping(quick):
    before = copy.deepcopy(quick)
    load(quick, {"task.model.hidden": [3], "algorithm.period": None, "topology.name": "star"})
    assert quick == before
    overrides: dict[str, Any] = {"algorithm": {"name": "local_sgd", "period": 2}}
    decentral.run(quick, steps=2, **overrides)
    assert quick == before
    assert overrides == {"algorithm": {"name": "local_sgd", "period": 2}}


def test_a_config_does_not_change_with_the_mapping_it_was_read_from(quick):
    override = {"name": "mlp", "hidden": [4]}
    config = load(quick, {"task.model": override})
    override["hidden"].append(5)
    quick["task"]["partition"]["alpha"] = 7
    assert config.task.options["model"]["hidden"] == [4]
    assert config.task.partition is not None
    assert config.task.partition.options == {"alpha": 0.3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-1E+2", -100.0),
        ("2.5e-1", 0.25),
        ("5.e3", 5000.0),
        ("1_0e1", 100.0),
        ("7", 7),
        ("0.5", 0.5),
        ("e3", "e3"),
        ("1e", "1e"),
        ("1e-3s", "1e-3s"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2e1]", [1, 20.0]),
        ("{name: mlp, hidden: []}", {"name": "mlp", "hidden": []}),
        ("a=b", "a=b"),
    ],
)
def test_a_value_is_read_as_yaml_with_its_exponents(tmp_path, text, value):
    parsed = parse_overrides([f"a.b={text}"])["a.b"]
    assert parsed == value
    assert type(parsed) is type(value)
    path = written(tmp_path, yaml.safe_dump(LEAST) + f"lr_schedule: {{name: step, x: {text}}}\n")
    if "=" not in text:
        schedule = load(path).lr_schedule
        assert schedule is not None
        assert schedule.options.get("x") == value


def test_a_config_written_and_read_is_equal(tmp_path, quick):
    quick["lr_schedule"] = {"name": "step", "milestones": [10, 20], "gamma": 1e-7}
    quick["name"] = "1e3"  # a text that looks like a number
    quick["optimizer"] |= {"lr": 1e-5, "weight_decay": 1e20}
    config = load(quick, {"checkpoint.every": 4, "ray.address": "null"})
    again = load(written(tmp_path, dump(config)))
    assert again == config
    assert dump(again) == dump(config)


def test_a_written_config_holds_the_defaults(tmp_path):
    held = yaml.safe_load(dump(load(LEAST)))
    assert held["record"] == {"every": 10}
    assert held["network"] == {
        "latency_ms": 0.1,
        "bandwidth_gbps": 10.0,
        "overhead": 0.0,
        "all_reduce": "ring",
    }
    assert held["seed"] == 0


def test_a_number_from_a_numpy_grid_can_be_written_and_read(tmp_path):
    """`for lr in np.linspace(...)` is how sweeps are written."""
    (lr,) = np.linspace(0.05, 0.1, 1)
    config = load(LEAST, {"optimizer.lr": lr})
    assert load(written(tmp_path, dump(config))).optimizer.options == {"lr": 0.05}


def test_a_graph_file_is_looked_up_beside_the_config(tmp_path, monkeypatch):
    text = yaml.safe_dump(LEAST | {"workers": 4, "topology": {"file": "graphs/square.gml"}})
    path = written(tmp_path / "experiments", text)
    graphs = path.parent / "graphs"
    written(graphs, (ROOT / "topologies/square4.gml").read_text(), "square.gml")
    monkeypatch.chdir(tmp_path)
    topology = build(load("experiments/config.yaml")).topology
    assert topology is not None
    assert topology.n == 4

    # A file under the working directory comes first, as for every other command.
    nearer = (ROOT / "topologies/house5.gml").read_text()
    written(tmp_path / "graphs", nearer, "square.gml")
    with pytest.raises(UserError, match="has 5 nodes"):
        build(load("experiments/config.yaml"))


def test_a_graph_file_that_is_nowhere_is_named_as_it_was_written(tmp_path):
    path = written(tmp_path, yaml.safe_dump(LEAST | {"topology": {"file": "no/such.gml"}}))
    with pytest.raises(UserError, match=r"no/such\.gml"):
        build(load(path))


@pytest.mark.parametrize(
    ("text", "got"), [("- a\n- b\n", "['a', 'b']"), ("", "None"), ("just words", "just words")]
)
def test_a_file_must_hold_a_mapping(tmp_path, text, got):
    with pytest.raises(UserError, match=r"must hold a mapping") as refused:
        load(written(tmp_path, text))
    assert got in refused.value.message


@pytest.mark.parametrize("content", [b"a: [1\n", b"\xff\xfe\x00", b"!!python/object:os.system {}"])
def test_what_is_not_plain_yaml_is_refused(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.yaml is not YAML"):
        load(tmp_path / "bad.yaml")


def test_there_are_configs_to_test():
    assert ROOT / "configs/quickstart.yaml" in SHIPPED
    assert ROOT / "configs/compare/digits.yaml" in SWEEPS


def test_every_sweep_begins_with_a_comment_and_its_points_build(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in SWEEPS:
        assert path.read_text().startswith("# ")
        methods = {point.method: point for point in read_sweep(path).points}
        assert len(methods) > 1
        if path.stem == "deep_images":  # whose data come from elsewhere: test_images runs it
            continue
        for point in methods.values():
            build(point.config)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
class TestShippedConfig:
    def test_begins_with_a_comment(self, path):
        assert path.read_text().startswith("# ")

    def test_builds_as_it_is(self, path, monkeypatch):
        monkeypatch.chdir(ROOT)
        assert build(load(path)).config.workers >= 1

    def test_runs_in_the_simulator(self, path, monkeypatch):
        monkeypatch.chdir(ROOT)
        result = decentral.run(path, engine="sim", steps=3, lr_schedule=None)
        assert list(result.metrics.step) == [3]
        assert result.metrics.loss.notna().all()
