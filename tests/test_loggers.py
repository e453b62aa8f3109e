"""Loggers: what they are given is what is read back, and none of them can end a run."""

import importlib
import importlib.util
import json
import logging
import re
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from processes import run_on_ranks

import decentral
from decentral import UserError, stopwatch, topology
from decentral.config import load
from decentral.experiment import build as build_experiment
from decentral.loggers import LOGGERS, Loggers, build, hyperparameters, kept, scalars
from decentral.mixing import Mixing
from decentral.peer import PeerComm
from decentral.progress import Watcher
from decentral.replica import Averaging, Report, Segment
from decentral.stopwatch import Stopwatch

ROOT = Path(__file__).parents[1]


def needs(package, why):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: {why}")


needs_wandb = needs("wandb", "70 MB, of them a binary for each platform; decentral[wandb] has it")
needs_mlflow = needs("mlflow", "it brings a web server's packages; decentral[mlflow] has it")


class Told(Watcher):
    """Keeps what is said; stops or fails at a step if it is told to."""

    def __init__(self, stop_at=None, fail_at=None):
        self.lines = []
        self._stop_at, self._fail_at, self._now = stop_at, fail_at, 0

    def say(self, line):
        self.lines.append(line)

    def advance(self, step, record):
        self._now = step
        if self._fail_at is not None and step >= self._fail_at:
            raise OSError("the power is gone")

    def wants_stop(self):
        return self._stop_at is not None and self._now >= self._stop_at


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(rows, key):
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())


# What a config may ask for.

WRONG = {
    "no such logger": (["tensorbord"], "loggers.0.name: .*did you mean 'tensorboard'"),
    "an option that it does not take": (
        ["tensorboard", {"name": "mlflow", "experimnt": "x"}],
        r"loggers.1.experimnt: mlflow takes no option .*did you mean 'experiment'",
    ),
    "a value that it does not take": (
        [{"name": "wandb", "mode": "of"}],
        "loggers.0.mode: .*'online' or 'offline'; got 'of'",
    ),
    "one twice": (
        ["tensorboard", {"name": "tensorboard"}],
        "loggers.1: tensorboard is there twice",
    ),
    "no list": ("tensorboard", "loggers: input should be a valid list"),
    "Ray's metrics of a simulation": (["ray"], "loggers: sets metrics of a Ray cluster"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_logger_is_refused_before_anything_is_written(case, quick, tmp_path):
    loggers, message = WRONG[case]
    for name in ("wandb", "mlflow"):
        if name in str(loggers):
            pytest.importorskip(name)
    with pytest.raises(UserError, match=message):
        decentral.run(quick | {"loggers": loggers}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_directory_has_no_loggers(quick):
    with pytest.raises(UserError, match=r"loggers: tensorboard goes with a run directory.*out="):
        decentral.run(quick | {"loggers": ["tensorboard"]})


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow"),
     ("ray", "prometheus_client")],
)  # fmt: skip
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name, package, quick, tmp_path, monkeypatch
):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, LOGGERS[name][0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    config = load(quick | {"loggers": [name], "engine": "ray"})
    with pytest.raises(UserError, match=rf"{package}.*pip install 'decentral\[{name}\]'"):
        build(config, tmp_path)


def test_every_logger_is_an_extra_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    for name in LOGGERS:
        assert f"\n{name} = [" in text, name


@pytest.mark.slow
def test_no_logger_is_imported_unless_it_is_asked_for():
    code = "import sys, decentral.api; print([m for m in sys.modules if m.split('.')[0] in"
    code += " ('tensorboard', 'wandb', 'mlflow', 'ray') or m.startswith('decentral.loggers.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_hyperparameters_are_the_resolved_config(quick):
    flat = hyperparameters(load(quick | {"loggers": ["ray"]}))
    assert flat["algorithm.name"] == "gossip_pga"
    assert flat["task.partition.alpha"] == 0.3
    assert flat["task.model.hidden"] == "[8]"
    assert flat["checkpoint.keep"] == 2  # a default
    assert not any(key.startswith("loggers") for key in flat)


def test_the_scalars_of_a_record_leave_out_its_step_and_what_is_no_number():
    assert scalars({"step": 3, "loss": 0.5, "period": None}) == {"loss": 0.5}


def test_an_id_is_made_once(tmp_path):
    assert kept(tmp_path / "id", lambda: "first") == "first"
    assert kept(tmp_path / "id", lambda: "second") == "first"


# What a failing logger does to a run.


class Steady:
    """A logger that works; `opened` are those that were started."""

    opened: ClassVar[list[Any]] = []

    def __init__(self, config, directory):
        self.records, self.status, self.step = [], None, None

    def start(self, step):
        Steady.opened.append(self)
        self.step = step
        return "here"

    def log(self, record):
        self.records.append(record)

    def close(self, status):
        self.status = status


class Fails(Steady):
    def log(self, record):
        super().log(record)
        if len(self.records) == 2:
            raise OSError("the server is gone\nwith a page of advice")


class CannotStart(Steady):
    def start(self, step):
        super().start(step)
        raise OSError("no key")


@pytest.fixture
def own(monkeypatch):
    """Loggers of the tests by name; those that were started."""
    for kind in (Steady, Fails, CannotStart):
        monkeypatch.setitem(LOGGERS, kind.__name__.lower(), (__name__, kind.__name__))
    monkeypatch.setattr(Steady, "opened", [])
    return Steady.opened


def test_a_logger_gets_every_record_and_how_the_run_ended(own, quick, tmp_path):
    result = decentral.run(quick | {"loggers": ["steady"]}, out=tmp_path / "out")
    (logger,) = own
    assert [r["step"] for r in logger.records] == list(result.metrics.step)
    assert [r["loss"] for r in logger.records] == list(result.metrics.loss)
    assert (logger.step, logger.status) == (0, "done")


def test_a_logger_that_fails_is_told_of_once_and_the_run_and_the_others_go_on(own, quick, tmp_path):
    told = Told()
    config = quick | {"loggers": ["fails", "steady"]}
    result = decentral.run(config, out=tmp_path / "out", watcher=told)
    assert result.summary["status"] == "done"
    fails, steady = own
    assert (len(fails.records), fails.status) == (2, None)
    assert (len(steady.records), steady.status) == (8, "done")
    assert [line for line in told.lines if "fails" in line] == [
        "fails: here",
        "fails failed, and the run goes on without it: OSError: the server is gone",
    ]


def test_a_logger_that_cannot_start_ends_the_run_and_closes_the_others(own, quick, tmp_path):
    config = quick | {"loggers": ["steady", "cannotstart"]}
    with pytest.raises(UserError, match="loggers: cannotstart cannot start: OSError: no key; mend"):
        decentral.run(config, out=tmp_path / "out")
    assert own[0].status == "failed"
    assert rows_of(tmp_path / "out") == []


@pytest.mark.parametrize("stop", [True, False])
def test_a_logger_hears_how_a_run_ended_early(stop, own, quick, tmp_path):
    config = quick | {"loggers": ["steady"]}
    if stop:
        decentral.run(config, out=tmp_path / "out", watcher=Told(stop_at=12))
    else:
        with pytest.raises(OSError, match="power"):
            decentral.run(config, out=tmp_path / "out", watcher=Told(fail_at=12))
    (logger,) = own
    assert logger.status == ("stopped" if stop else "failed")
    assert [r["step"] for r in logger.records] == [3, 6, 9, 12]


def test_the_run_waits_for_no_logger_and_leaves_one_that_hangs(monkeypatch):
    monkeypatch.setattr("decentral.loggers.CLOSE_S", 0.05)
    free, lines = threading.Event(), []

    class Hangs(Steady):
        def log(self, record):
            free.wait()
            super().log(record)

    logger = Hangs(None, None)
    loggers = Loggers({"slow": logger}, lines.append)
    loggers.start(0)
    (thread,) = loggers._threads
    for step in range(1000):
        loggers.log({"step": step})
    assert logger.records == []  # and this line was reached
    loggers.close("done")
    assert lines[1:] == ["slow has not ended after 0.05 s and is left alone"]
    free.set()
    thread.join(10)
    assert (len(logger.records), logger.status) == (1000, "done")


# Each logger, read back.


def tensorboard_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def assert_in_tensorboard(folder):
    events, rows = tensorboard_of(folder), rows_of(folder)
    keys = {key for row in rows for key, value in row.items() if value is not None} - {"step"}
    assert set(events.Tags()["scalars"]) == keys
    for key in keys:
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        expected = series(rows, key)
        assert [step for step, _ in shown] == [step for step, _ in expected], key
        # TensorBoard keeps float32: 24 bits.
        np.testing.assert_allclose(
            [v for _, v in shown], [v for _, v in expected], rtol=2**-24, err_msg=key
        )


def test_tensorboard_shows_every_record_at_its_step(quick, tmp_path):
    decentral.run(quick | {"loggers": ["tensorboard"]}, out=tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 8
    assert_in_tensorboard(tmp_path / "out")


def test_tensorboard_has_the_config_as_hyperparameters_and_as_text(quick, tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import (
        HParamsPluginData,  # pyright: ignore[reportAttributeAccessIssue]
    )

    decentral.run(quick | {"loggers": ["tensorboard"]}, out=tmp_path / "out")
    events = tensorboard_of(tmp_path / "out")
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["optimizer.lr"].number_value == 0.1
    assert hparams["algorithm.name"].string_value == "gossip_pga"
    (text,) = events.Tensors("config/text_summary")
    text = text.tensor_proto.string_val[0].decode().removeprefix("```yaml\n").removesuffix("```")
    assert load(yaml.safe_load(text)) == load(tmp_path / "out/config.yaml")


def test_tensorboard_of_a_resumed_run_has_each_step_once(quick, tmp_path):
    """A crash at step 21, two records after the checkpoint of step 15."""
    out = tmp_path / "out"
    config = quick | {"loggers": ["tensorboard"], "checkpoint": {"every": 5}}
    with pytest.raises(OSError, match="power"):
        decentral.run(config, out=out, watcher=Told(fail_at=19))
    assert rows_of(out)[-1]["step"] == 18
    decentral.resume(out)
    assert [row["step"] for row in rows_of(out)] == list(range(3, 25, 3))
    assert len(list((out / "tensorboard").iterdir())) == 2  # each run's own file
    assert_in_tensorboard(out)


def wandb_records(file):
    """The records of a W&B file: LevelDB's log format, with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import (  # pyright: ignore[reportMissingImports]
        Record,  # pyright: ignore[reportAttributeAccessIssue]
    )

    block, content, position, parts = 32768, file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_of(folder):
    """Files of a run in the order of their making: id, config, history rows and summary of each."""
    runs = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        run = {"id": None, "config": {}, "rows": [], "exit": None}
        for record in wandb_records(file):
            if record.HasField("run"):
                run["id"] = record.run.run_id
                config = {item.key: item.value_json for item in record.run.config.update}
                run["config"] |= {key: json.loads(value) for key, value in config.items()}
            elif record.HasField("history"):
                items = record.history.item
                named = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                run["rows"].append({k: v for k, v in named.items() if not k.startswith("_")})
            elif record.HasField("exit"):
                run["exit"] = record.exit.exit_code
        runs.append(run)
    return runs


@needs_wandb
def test_wandb_offline_keeps_every_record_and_the_config(quick, tmp_path):
    out = tmp_path / "out"
    logger = {"name": "wandb", "mode": "offline", "project": "tests"}
    told = Told()
    decentral.run(quick | {"loggers": [logger]}, out=out, watcher=told)
    (run,) = wandb_of(out)
    expected = [{k: v for k, v in row.items() if v is not None} for row in rows_of(out)]
    assert run["rows"] == expected
    assert run["id"] == (out / "wandb.id").read_text().strip()
    assert run["config"]["optimizer"]["lr"] == 0.1
    assert run["config"]["algorithm"] == {"name": "gossip_pga", "period": 4}
    assert run["exit"] == 0
    assert any(line.startswith("wandb: offline; wandb sync ") for line in told.lines)


@needs_wandb
def test_wandb_of_a_resumed_run_is_the_same_run(quick, tmp_path):
    out = tmp_path / "out"
    config = quick | {"loggers": ["wandb"], "checkpoint": {"every": 6}}
    decentral.run(config, out=out, watcher=Told(stop_at=12))
    time.sleep(1.1)  # W&B names folders by the second
    decentral.resume(out)
    first, second = wandb_of(out)
    assert first["id"] == second["id"]
    assert [row["step"] for row in first["rows"] + second["rows"]] == list(range(3, 25, 3))


def mlflow_of(out):
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient()
    return client, client.get_run((out / "mlflow.id").read_text().strip())


@needs_mlflow
def test_mlflow_has_every_record_the_config_and_the_status(quick, tmp_path):
    out = tmp_path / "out"
    decentral.run(quick | {"loggers": [{"name": "mlflow", "experiment": "tests"}]}, out=out)
    client, run = mlflow_of(out)
    assert client.get_experiment(run.info.experiment_id).name == "tests"
    assert (run.info.run_name, run.info.status) == ("quick", "FINISHED")
    assert run.data.params["algorithm.period"] == "4"
    assert run.data.params["task.model.hidden"] == "[8]"
    for key in ("loss", "consensus_distance", "bytes_sent", "sim_time_s", "eval_accuracy"):
        history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        assert history == series(rows_of(out), key), key


@needs_mlflow
def test_mlflow_of_a_resumed_run_is_the_same_run_and_says_what_changed(quick, tmp_path):
    out = tmp_path / "out"
    config = quick | {"loggers": ["mlflow"]}
    decentral.run(config, out=out, watcher=Told(stop_at=12))
    client, run = mlflow_of(out)
    assert run.info.status == "KILLED"
    decentral.resume(out, steps=30)
    client, again = mlflow_of(out)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == list(range(3, 31, 3))
    assert (again.data.params["steps"], again.data.tags["steps"]) == ("24", "30")


@needs_wandb
@needs_mlflow
def test_three_loggers_at_once_have_the_same_run(quick, tmp_path):
    out = tmp_path / "out"
    decentral.run(quick | {"loggers": ["tensorboard", "wandb", "mlflow"]}, out=out)
    assert_in_tensorboard(out)
    (run,) = wandb_of(out)
    client, mlflow_run = mlflow_of(out)
    losses = client.get_metric_history(mlflow_run.info.run_id, "loss")
    assert series(run["rows"], "loss") == series(rows_of(out), "loss")
    assert [(m.step, m.value) for m in losses] == series(rows_of(out), "loss")


# Where a worker's time goes.


def test_a_stopwatch_adds_up_what_passes_inside(monkeypatch):
    now = iter([1.0, 1.5, 10.0, 10.25, 20.0, 21.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    for _ in range(2):
        with watch:
            pass
    assert watch.take() == 0.75
    assert watch.take() == 0.0
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert watch.take() == 1.0


def _waits(rank):
    comm = PeerComm(Mixing(topology.build(2, "complete")))
    x = torch.ones(4)
    comm.mean(x, 0)
    comm.mix(x, 0)  # the first opens connections
    comm.stopwatch.take()
    for _ in range(4):
        for exchange in (comm.mean, comm.mix):
            if rank == 1:
                time.sleep(0.05)
            exchange(x, 0)
    return comm.stopwatch.take()


@pytest.mark.slow
def test_who_is_early_waits_for_who_is_late():
    """Worker 1 is late by 50 ms at each of four all-reduces and four exchanges of neighbours."""
    early, late = run_on_ranks(2, _waits)
    assert early > 0.3  # of 0.4: either kind alone has 0.2
    assert late < early / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_stopwatch_on_a_gpu_sees_what_is_queued_and_not_only_the_call():
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        torch.mm(x, x)
    torch.cuda.synchronize()
    started = time.perf_counter()
    watch = Stopwatch("cuda")
    with watch:
        for _ in range(50):
            torch.mm(x, x)
    called_s = time.perf_counter() - started
    torch.cuda.synchronize()
    passed_s = time.perf_counter() - started
    assert called_s < 0.5 * passed_s  # the calls return before the work is done
    assert watch.take() == pytest.approx(passed_s, rel=0.2)
    with watch:
        time.sleep(0.1)  # as an exchange through the host: the queue stands idle
    assert watch.take() == pytest.approx(0.1, rel=0.2)


# Ray's metrics.


class FakeGauge:
    """Keeps what is set: {(name, tags): value}."""

    values: ClassVar[dict[Any, float]] = {}

    def __init__(self, name, description="", tag_keys=()):
        assert description
        self._name, self._keys = name, tag_keys

    def set(self, value, tags):
        assert isinstance(value, float)
        assert set(tags) == set(self._keys)
        self.values[self._name, tuple(sorted(tags.items()))] = value


@pytest.fixture
def gauges(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", sys)  # the agent's, as if it were there
    # By its name in sys.modules: another test may have had it imported anew.
    module = importlib.import_module("decentral.loggers.ray")
    monkeypatch.setattr(module, "Gauge", FakeGauge)
    monkeypatch.setattr(FakeGauge, "values", {})
    return FakeGauge.values


def report(loss, compute_s, wait_s, deviation=None, bytes_sent=0, stop=0):
    return Report(
        stop=stop,
        loss=np.array([loss]),
        deviation=None if deviation is None else np.array([deviation]),
        bytes_sent=bytes_sent,
        events=[],
        lr=0.1,
        next_lr=0.1,
        compute_s=np.array([compute_s]),
        wait_s=np.array([wait_s]),
    )


def segment(start, stop, record):
    return Segment(start, stop, Averaging.NOBODY, global_average=False, record=record)


def test_a_workers_gauges_are_means_over_the_steps_since_the_last_record(gauges):
    from decentral.loggers.ray import WorkerGauges

    mine = WorkerGauges("night", 3)
    mine.show(
        segment(0, 3, False), report(loss=6.0, compute_s=0.3, wait_s=0.0, stop=3), seconds=0.6
    )
    assert gauges == {}
    mine.show(segment(3, 4, True), report(2.0, 0.1, 0.4, deviation=9.0, bytes_sent=80, stop=4), 0.6)
    tags = (("run", "night"), ("worker", "3"))
    assert gauges == {
        ("decentral_worker_loss", tags): 2.0,  # (6 + 2) / 4
        ("decentral_worker_consensus_distance", tags): 3.0,
        ("decentral_worker_bytes_sent", tags): 80.0,
        ("decentral_worker_step_s", tags): pytest.approx(0.3),
        ("decentral_worker_compute_s", tags): pytest.approx(0.1),
        ("decentral_worker_wait_s", tags): pytest.approx(0.1),
    }
    mine.show(segment(4, 6, True), report(1.0, 0.1, 0.2, deviation=4.0, bytes_sent=90, stop=6), 0.4)
    assert gauges["decentral_worker_loss", tags] == 0.5
    assert gauges["decentral_worker_wait_s", tags] == pytest.approx(0.1)


def test_a_records_numbers_are_gauges_of_the_run(gauges, quick, tmp_path):
    from decentral.loggers.ray import RayMetrics

    config = load(quick | {"loggers": ["ray"], "engine": "ray"})
    logger = RayMetrics(config, tmp_path)
    logger.log({"step": 3, "loss": 0.5, "period": None})
    logger.log({"step": 6, "loss": 0.25, "period": 4, "eval_accuracy": 0.75})
    assert gauges == {
        ("decentral_step", (("run", "quick"),)): 6.0,
        ("decentral_loss", (("run", "quick"),)): 0.25,
        ("decentral_period", (("run", "quick"),)): 4.0,
        ("decentral_eval_accuracy", (("run", "quick"),)): 0.75,
    }


def test_a_cluster_whose_nodes_export_nothing_is_refused(gauges, quick, tmp_path, monkeypatch):
    from decentral.loggers.ray import RayMetrics

    def node(address, port, alive=True):
        return {"NodeManagerAddress": address, "MetricsExportPort": port, "Alive": alive}

    logger = RayMetrics(load(quick | {"loggers": ["ray"], "engine": "ray"}), tmp_path)
    nodes = [node("10.0.0.2", 8080), node("10.0.0.1", 8081), node("10.0.0.3", -1, alive=False)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert logger.start(0) == "metrics on http://10.0.0.1:8081/metrics, and on 1 other nodes"
    nodes.append(node("10.0.0.4", -1))
    with pytest.raises(RuntimeError, match=r"10.0.0.4: pip install 'ray\[default\]' there"):
        logger.start(0)


def test_the_grafana_dashboard_shows_what_is_exported_and_all_a_worker_exports(
    gauges, quick, tmp_path
):
    from decentral.loggers.ray import RayMetrics, WorkerGauges

    logger = RayMetrics(load(quick | {"loggers": ["ray"], "engine": "ray"}), tmp_path)
    for record in rows_of_a_run(quick, tmp_path):
        logger.log(record)
    WorkerGauges("x", 0).show(segment(0, 1, True), report(1.0, 0.1, 0.1, 1.0, 8, 1), 0.3)
    exported = {f"ray_{name}" for name, _ in gauges}
    dashboard = json.loads((ROOT / "launch/grafana.json").read_text())
    named = set()
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            here = set(re.findall(r"ray_\w+", target["expr"]))
            assert here, panel["title"]
            assert here <= exported, panel["title"]
            assert set(re.findall(r"\{(.*?)\}", target["expr"])) == {'run=~"$run"'}
            named |= here
    assert {name for name in exported if "_worker_" in name} <= named
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def rows_of_a_run(config, folder):
    decentral.run(config, out=folder / "out")
    return rows_of(folder / "out")


@pytest.mark.slow
def test_workers_of_a_cluster_report_where_their_time_went(cluster, quick):
    from decentral.engines.ray import RayEngine

    config = load(quick | {"engine": "ray"})
    engine = RayEngine(build_experiment(config), actors=cluster.actors(config.workers))
    try:
        engine.run(segment(0, 1, True))
        started = time.perf_counter()
        report = engine.run(Segment(1, 9, Averaging.NEIGHBOURS, False, record=True))
        passed = time.perf_counter() - started
    finally:
        engine.close()
    assert report.compute_s is not None
    assert report.wait_s is not None
    assert report.compute_s.shape == report.wait_s.shape == (4,)
    assert (report.compute_s > 0).all()
    assert (report.wait_s > 0).all()
    assert (report.compute_s + report.wait_s < passed).all()


class Scrapes(Told):
    """At the last step, asks the node's agent until the metrics are those of that step."""

    def __init__(self, steps):
        super().__init__()
        self._steps, self.found, self.record = steps, {}, None

    def advance(self, step, record):
        if step < self._steps:
            return
        self.record = record
        (line,) = [line for line in self.lines if line.startswith("ray: ")]
        url = line.split()[-1]
        deadline = time.monotonic() + 60
        sent = 0.0
        while self.found.get("ray_decentral_step") != {None: step} or sent != record["bytes_sent"]:
            assert time.monotonic() < deadline, self.found
            time.sleep(0.2)  # the agent has no way to tell that it has news
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            self.found = {}
            for name, tags, value in re.findall(r"^(ray_decentral_\w+)\{(.*)\} (.*)$", text, re.M):
                assert 'run="quick"' in tags
                worker = re.search(r'worker="(\d+)"', tags)
                shown = self.found.setdefault(name, {})
                shown[worker.group(1) if worker else None] = float(value)
            sent = sum(self.found.get("ray_decentral_worker_bytes_sent", {}).values())


@pytest.mark.slow
@needs("aiohttp_cors", "Ray's agents export metrics with ray[default] alone; decentral[ray] has it")
def test_rays_agent_exports_the_metrics_of_run_and_workers(alone, quick, tmp_path):
    import ray

    from decentral.loggers.ray import WORKER_GAUGES

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level=logging.ERROR,
        object_store_memory=128 * 2**20,
        _system_config={"metrics_report_interval_ms": 200},
    )
    try:
        told = Scrapes(24)
        config = quick | {"engine": "ray", "loggers": ["ray"]}
        decentral.run(config, out=tmp_path / "out", watcher=told)
    finally:
        ray.shutdown()
    found, record = told.found, told.record
    assert record is not None
    for key, value in scalars(record).items():
        assert found[f"ray_decentral_{key}"] == {None: pytest.approx(value)}, key
    each = {key: found[f"ray_decentral_worker_{key}"] for key in WORKER_GAUGES}
    assert all(set(shown) == {"0", "1", "2", "3"} for shown in each.values())
    assert np.mean(list(each["loss"].values())) == pytest.approx(record["loss"])
    distances = np.array(list(each["consensus_distance"].values()))
    assert np.sqrt(np.mean(distances**2)) == pytest.approx(record["consensus_distance"])
    assert sum(each["bytes_sent"].values()) == record["bytes_sent"]
    for worker in "0123":
        assert 0 < each["compute_s"][worker] < each["step_s"][worker]
        assert 0 < each["wait_s"][worker] < each["step_s"][worker]
