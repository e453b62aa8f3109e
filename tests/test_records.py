"""The run directory and its checkpoints: what a run leaves, whatever ends it, and going on."""

import hashlib
import json
import math
import os
import pickle

import numpy as np
import pandas
import pytest
import torch
from torch import nn

import decentral
from decentral import UserError, records
from decentral.checkpoints import Checkpoints
from decentral.config import load
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.optimizers import LR_SCHEDULES
from decentral.progress import Watcher
from decentral.storage import Storage
from decentral.tasks import labels

RECORD = [
    "step",
    "loss",
    "consensus_distance",
    "period",
    "lr",
    "bytes_sent",
    "time_s",
    "sim_time_s",
    "workers",
]
SUMMARY = [
    "name",
    "status",
    "engine",
    "algorithm",
    "topology",
    "workers",
    "parameters",
    "final",
    "failures",
    "seconds",
    "versions",
    "machine",
]
ALGORITHMS = {
    "parallel_sgd": {},
    "local_sgd": {"period": 4},
    "gossip_sgd": {},
    "gossip_pga": {"period": 4},
    "gossip_aga": {"initial_period": 2, "warmup": 3},
}
OPTIMIZERS = {
    "momentum and schedule": {
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
        "lr_schedule": {"name": "step", "milestones": [7, 14], "gamma": 0.5},
    },
    "adam": {"optimizer": {"name": "adam", "lr": 0.05}},
}


@pytest.fixture
def small():
    return small_config()


def small_config():
    """Twenty steps that take no time; a checkpoint at every fifth, out of step with all else."""
    return {
        "name": "small",
        "workers": 4,
        "steps": 20,
        "dtype": "float64",
        "task": {
            "name": "quadratic",
            "dim": 3,
            "samples_per_worker": 10,
            "curvature_spread": 0.5,
            "batch_size": 4,
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"name": "ring"},
        "network": {"compute_ms": 1},
        "record": {"every": 3, "evaluate_every": 6},
        "checkpoint": {"every": 5},
    }


class StopAt(Watcher):
    """The user's Ctrl-C: a clean stop after step `step`."""

    def __init__(self, step):
        self._step, self._now = step, 0

    def advance(self, step, record):
        self._now = step

    def wants_stop(self):
        return self._now >= self._step


class PowerCut(Exception):
    pass


class CrashAt(Watcher):
    """The end of everything, once step `step` is finished and recorded."""

    def __init__(self, step):
        self._step = step

    def advance(self, step, record):
        if step >= self._step:
            raise PowerCut


def crash(config, out, step):
    with pytest.raises(PowerCut):
        decentral.run(config, out=out, watcher=CrashAt(step))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def newest(folder):
    return Checkpoints(Storage(folder / "checkpoints"), keep=1).newest()


def coordinator_of(folder, step):
    return json.loads((folder / f"checkpoints/step-{step:08d}/coordinator.json").read_text())


def state_of(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def assert_same_run(one, other):
    """Metrics but wall-clock time, and model: bit for bit."""
    frames = [result.metrics.drop(columns="time_s") for result in (one, other)]
    pandas.testing.assert_frame_equal(*frames, check_exact=True)
    ours, theirs = (result.model.state_dict() for result in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, theirs[name]), name


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "time_s"} for row in rows]


# What a run directory holds.


def test_a_run_directory_holds_these_files(small, tmp_path):
    decentral.run(small, out=tmp_path / "run", **{"checkpoint.every": None})
    files = ["config.yaml", "metrics.jsonl", "model.pt", "split.npz", "summary.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files


def test_the_written_config_is_the_resolved_one(small, tmp_path):
    result = decentral.run(small, out=tmp_path, steps=6)
    assert load(tmp_path / "config.yaml") == result.config == load(small, {"steps": 6})


def test_records_have_these_keys_and_evaluations_more(quick, tmp_path):
    decentral.run(quick, out=tmp_path, steps=14)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 14]
    evaluation = ["eval_loss", "eval_accuracy", "eval_accuracy_workers"]
    for row in rows:
        assert list(row) == RECORD + (evaluation if row["step"] in (12, 14) else [])


def test_a_task_without_accuracy_or_test_set_records_none(small, tmp_path, monkeypatch):
    decentral.run(small, out=tmp_path / "no-accuracy")
    assert list(rows_of(tmp_path / "no-accuracy")[-1]) == [*RECORD, "eval_loss"]

    def make(workers, seed):
        return decentral.Task(
            nn.Linear(1, 1), nn.functional.mse_loss, (torch.ones(8, 1), torch.ones(8, 1))
        )

    monkeypatch.setattr("decentral.experiment.TASKS", {"mine": make})
    small["task"] = {"name": "mine", "batch_size": 2}
    decentral.run(small, out=tmp_path / "no-test")
    assert list(rows_of(tmp_path / "no-test")[-1]) == RECORD


def test_what_adds_up_rises_from_record_to_record(small, tmp_path):
    result = decentral.run(small, out=tmp_path)
    for column in ("step", "bytes_sent", "time_s", "sim_time_s"):
        assert result.metrics[column].diff().dropna().gt(0).all(), column


def test_the_loss_of_a_record_is_the_mean_since_the_one_before(small):
    small["optimizer"] = {"name": "sgd", "lr": 0.0}
    thirds = decentral.run(small).metrics.loss
    small["record"] = {"every": 1}
    each = decentral.run(small).metrics.loss
    np.testing.assert_allclose(thirds[:6], each[:18].to_numpy().reshape(6, 3).mean(1))
    np.testing.assert_allclose(thirds[6], each[18:].mean())  # steps 19 and 20 alone


def test_the_lr_of_a_record_is_that_of_its_last_step(small):
    small["lr_schedule"] = {"name": "step", "milestones": [7], "gamma": 0.5}
    small["record"] = {"every": 1}
    metrics = decentral.run(small).metrics
    assert metrics.lr.tolist() == [0.1] * 7 + [0.05] * 13


def test_the_result_is_what_the_files_hold(small, tmp_path):
    result = decentral.run(small, out=tmp_path)
    assert result.directory == tmp_path
    assert result.summary == summary_of(tmp_path)
    from_file = pandas.DataFrame(rows_of(tmp_path))
    pandas.testing.assert_frame_equal(from_file, result.metrics, check_exact=True)


def test_a_summary_has_these_fields(small, tmp_path):
    decentral.run(small, out=tmp_path)
    summary = summary_of(tmp_path)
    assert list(summary) == SUMMARY
    assert [summary[key] for key in SUMMARY[:7]] == [
        "small", "done", "sim", "gossip_pga", "ring", 4, 3
    ]  # fmt: skip
    assert summary["final"] == rows_of(tmp_path)[-1]
    assert summary["seconds"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert {"python", "decentral", "ray", "networkx", "numpy"} < set(summary["versions"])
    assert summary["machine"]["cpus"] == os.cpu_count()


def test_the_saved_model_loads_without_code_and_is_the_result(quick, tmp_path):
    result = decentral.run(quick, out=tmp_path, steps=3)
    state, model = state_of(tmp_path), result.model.state_dict()
    assert state.keys() == model.keys()
    assert all(torch.equal(state[name], model[name]) for name in state)
    assert next(iter(state.values())).dtype == torch.float64


def test_the_saved_split_gives_the_shards_back(quick, tmp_path):
    decentral.run(quick, out=tmp_path, steps=1)
    with np.load(tmp_path / "split.npz", allow_pickle=False) as split:
        shards = np.split(split["indices"], np.cumsum(split["sizes"])[:-1])
        classes, counts = split["classes"], split["label_counts"]
    experiment = build(load(quick))
    expected = experiment.shards
    of = labels(experiment.task.train)
    assert classes.tolist() == list(range(10))
    for shard, own in zip(expected, counts, strict=True):
        assert own.tolist() == [int((of[shard] == label).sum()) for label in classes]
    assert len(shards) == len(expected) == 4
    assert len({len(shard) for shard in shards}) > 1  # a skewed split: sizes matter
    for shard, own in zip(shards, expected, strict=True):
        np.testing.assert_array_equal(shard, own)


# When a run does not go well.


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_that_diverges_ends_with_null_in_its_records(small, tmp_path, name):
    """First infinite, then not a number: neither is JSON."""
    small |= {"steps": 80, "dtype": "float32", "optimizer": {"name": "sgd", "lr": 10.0}}
    small["algorithm"] = {"name": name, **ALGORITHMS[name]}
    if name == "gossip_aga":
        small["algorithm"]["warmup"] = 24  # the loss is infinite before and after its end
    result = decentral.run(small, out=tmp_path)
    assert math.isnan(result.metrics.loss.iloc[-1])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line, parse_constant=refuse) for line in lines][-1]
    assert last["loss"] is last["consensus_distance"] is last["eval_loss"] is None
    assert last["step"] == 80
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["final"] == last


def test_a_run_that_fails_keeps_its_records_and_says_so(small, tmp_path):
    crash(small, tmp_path, 11)
    assert [row["step"] for row in rows_of(tmp_path)] == [3, 6, 9, 12]
    summary = summary_of(tmp_path)
    assert summary["status"] == "failed"
    assert list(summary) == [*SUMMARY, "error"]
    assert summary["final"]["step"] == 12
    assert not (tmp_path / "model.pt").exists()


def test_the_reason_of_a_failure_is_in_the_summary(small, tmp_path, monkeypatch):
    def fail(self, *segments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Simulator, "run", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        decentral.run(small, out=tmp_path)
    assert summary_of(tmp_path)["error"] == "the disk is gone"
    assert summary_of(tmp_path)["final"] is None


def test_a_folder_that_holds_a_run_is_left_alone(small, tmp_path):
    decentral.run(small, out=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"--out: .* holds a run"):
        decentral.run(small, out=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    records.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        records.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_the_old_file_and_no_other(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        decentral.run(small, out=tmp_path, **{"checkpoint.every": None})
    assert not (tmp_path / "model.pt").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


# Checkpoints.


def test_only_the_newest_two_checkpoints_are_kept(small, tmp_path):
    decentral.run(small, out=tmp_path)
    assert saved(tmp_path) == ["step-00000015", "step-00000020"]


def test_a_run_without_checkpoints_cannot_go_on(small, tmp_path):
    decentral.run(small, out=tmp_path, **{"checkpoint.every": None})
    with pytest.raises(UserError, match="holds no checkpoint"):
        decentral.resume(tmp_path)
    with pytest.raises(UserError, match="not a run directory"):
        decentral.resume(tmp_path / "elsewhere")


@pytest.mark.parametrize("end", ["stopped by the user", "crashed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(small, tmp_path, name, optimizer, end):
    small |= OPTIMIZERS[optimizer] | {"algorithm": {"name": name, **ALGORITHMS[name]}}
    whole = decentral.run(small, out=tmp_path / "whole")
    part = tmp_path / "part"
    if end == "crashed":
        crash(small, part, 14)
        assert saved(part) == ["step-00000005", "step-00000010"]
    else:
        stopped = decentral.run(small, out=part, watcher=StopAt(10))
        assert stopped.summary["status"] == "stopped"
        assert saved(part)[-1] == "step-00000010"
    resumed = decentral.resume(part)
    assert resumed.summary["status"] == summary_of(part)["status"] == "done"
    assert_same_run(whole, resumed)
    assert without_time(rows_of(part)) == without_time(rows_of(tmp_path / "whole"))
    assert resumed.metrics.time_s.diff().dropna().gt(0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_a_resumed_classifier_is_the_uninterrupted_one(quick, tmp_path, dtype, partition):
    quick |= {"dtype": dtype, "checkpoint": {"every": 8}}
    quick["task"]["partition"] = {"kind": partition} | (
        {"alpha": 0.3} if partition == "dirichlet" else {}
    )
    whole = decentral.run(quick)
    crash(quick, tmp_path, 10)
    assert_same_run(whole, decentral.resume(tmp_path))


def test_running_statistics_and_counters_survive_a_checkpoint(small, tmp_path, monkeypatch):
    use(monkeypatch, nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
    whole = decentral.run(small, task=MINE, optimizer=GENTLE)
    crash(small | {"task": MINE, "optimizer": GENTLE}, tmp_path, 14)
    resumed = decentral.resume(tmp_path)
    assert_same_run(whole, resumed)
    assert resumed.model.state_dict()["1.num_batches_tracked"] == 20


def test_a_model_that_draws_goes_on_with_the_same_draws(small, tmp_path, monkeypatch):
    use(monkeypatch, nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 1)))
    whole = decentral.run(small, task=MINE, optimizer=GENTLE)
    crash(small | {"task": MINE, "optimizer": GENTLE}, tmp_path, 14)
    assert_same_run(whole, decentral.resume(tmp_path))


MINE = {"name": "mine", "batch_size": 4}
GENTLE = {"name": "adam", "lr": 0.01}


def use(monkeypatch, model):
    """Let the task `mine` be a regression on this model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=generator)
    y = x.sum(1, keepdim=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)

    def make(workers, seed):
        return decentral.Task(model, nn.functional.mse_loss, (x, y), (x, y))

    monkeypatch.setattr("decentral.experiment.TASKS", {"mine": make})


SCHEDULE_OPTIONS = {
    "cosine": {"T_max": 20},
    "cosine_warm_restarts": {"T_0": 6},
    "cyclic": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},
    "every": {"step_size": 6},
    "exponential": {"gamma": 0.9},
    "one_cycle": {"max_lr": 0.1, "total_steps": 25},
    "step": {"milestones": [8, 12]},
}


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_every_lr_schedule_goes_on_where_it_was(small, tmp_path, name):
    small["lr_schedule"] = {"name": name, **SCHEDULE_OPTIONS.get(name, {})}
    whole = decentral.run(small)
    crash(small, tmp_path, 13)
    assert_same_run(whole, decentral.resume(tmp_path))


@pytest.mark.parametrize("options", [{"initial_period": 2, "warmup": 3}, {"warmup": 100}])
def test_a_checkpoint_within_an_adaptive_period_keeps_its_phase(small, tmp_path, options):
    """At step 15 a period is under way since the average before, and the loss since then counts:
    for the next period after the warm-up, in it for the loss that they are measured against."""
    small["algorithm"] = {"name": "gossip_aga", **options}
    small["record"] = {"every": 1}
    whole = decentral.run(small, out=tmp_path / "whole")
    crash(small, tmp_path / "part", 16)
    schedule = coordinator_of(tmp_path / "part", 15)["schedule"]
    assert 0 < 14 - schedule["last"] < schedule["period"]
    assert_same_run(whole, decentral.resume(tmp_path / "part"))
    ends = [coordinator_of(tmp_path / folder, 20)["schedule"] for folder in ("whole", "part")]
    assert ends[0] == ends[1]


def test_records_beyond_the_checkpoint_are_dropped(small, tmp_path):
    crash(small, tmp_path, 14)
    assert rows_of(tmp_path)[-1]["step"] == 15
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "loss": 0.1}\n{"step": 19, "lo')  # the last line is torn
    decentral.resume(tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [3, 6, 9, 12, 15, 18, 20]
    assert all(set(RECORD) <= set(row) for row in rows_of(tmp_path))


def test_a_torn_checkpoint_is_never_loaded(small, tmp_path):
    whole = decentral.run(small)
    crash(small, tmp_path, 14)
    for name in ("step-00000015", "step-00000099"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "workers.pt").write_bytes(b"torn")
        (tmp_path / "checkpoints" / name / "worker-0.pt").write_bytes(b"of another engine")
    assert newest(tmp_path) == 10
    assert_same_run(whole, decentral.resume(tmp_path))
    assert saved(tmp_path) == ["step-00000015", "step-00000020"]
    files = ["checksums.json", "coordinator.json", "workers.pt"]
    assert sorted(f.name for f in (tmp_path / "checkpoints/step-00000015").iterdir()) == files


def truncate(folder):
    content = (folder / "workers.pt").read_bytes()
    (folder / "workers.pt").write_bytes(content[: len(content) // 2])


def flip_a_bit(folder):
    content = bytearray((folder / "workers.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "workers.pt").write_bytes(content)


def lose_a_file(folder):
    (folder / "workers.pt").unlink()


def tear_the_checksums(folder):
    content = (folder / "checksums.json").read_bytes()
    (folder / "checksums.json").write_bytes(content[:-1])


def empty_the_checksums(folder):
    (folder / "checksums.json").write_text("")


def name_too_few_files(folder):
    rows = json.loads((folder / "checksums.json").read_text())
    del rows["workers.pt"]
    (folder / "checksums.json").write_text(json.dumps(rows))


def lose_the_checksums(folder):
    (folder / "checksums.json").unlink()


def add_a_file(folder):
    (folder / "more.pt").write_bytes(b"what is this?")


def point_elsewhere(folder):
    rows = json.loads((folder / "checksums.json").read_text())
    rows["../../model.pt"] = rows.pop("workers.pt")
    (folder / "checksums.json").write_text(json.dumps(rows))


def sign(folder):
    """Let checksums.json fit what is there."""
    rows = {}
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.name != "checksums.json":
            rows[file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "checksums.json").write_text(json.dumps(rows))


def forge_a_pickle(folder):
    class Bomb:
        def __reduce__(self):
            return open, (str(folder / "exploded"), "w")

    (folder / "workers.pt").write_bytes(pickle.dumps(Bomb()))
    sign(folder)


def forge_a_pickle_in_a_torch_file(folder):
    class Bomb:
        def __reduce__(self):
            return open, (str(folder / "exploded"), "w")

    torch.save({"x": Bomb()}, folder / "workers.pt")
    sign(folder)


def forge_the_shape(folder):
    state = torch.load(folder / "workers.pt", weights_only=True)
    torch.save(state | {"x": torch.zeros(7, 7)}, folder / "workers.pt")
    sign(folder)


def forge_a_key(key, value):
    def damage(folder):
        state = json.loads((folder / "coordinator.json").read_text())
        assert key in state
        (folder / "coordinator.json").write_text(json.dumps(state | {key: value}))
        sign(folder)

    return damage


def forge_a_list(folder):
    (folder / "coordinator.json").write_text("[1, 2]")
    sign(folder)


def forge_the_coordinator(folder):
    (folder / "coordinator.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "workers.pt is not what was written"),
        (flip_a_bit, "workers.pt is not what was written"),
        (lose_a_file, "workers.pt is missing"),
        (lose_the_checksums, "checksums.json is missing: it was never completed"),
        (tear_the_checksums, "checksums.json is unreadable"),
        (empty_the_checksums, "checksums.json is unreadable"),
        (name_too_few_files, "workers.pt is not part of it"),
        (add_a_file, "more.pt is not part of it"),
        (
            point_elsewhere,
            "checksums.json names '../../model.pt', no file of a checkpoint",
        ),
        (forge_the_coordinator, "coordinator.json is not what was written"),
        (forge_a_pickle, "workers.pt holds no state that is safe to load"),
        (forge_a_pickle_in_a_torch_file, "workers.pt holds no state that is safe to load"),
        (forge_the_shape, "workers.pt is no state of this run"),
        (forge_a_list, "coordinator.json is no state of this run"),
        (forge_a_key("step", 9), "coordinator.json is no state of this run"),
        (forge_a_key("step", "10"), "coordinator.json is no state of this run"),
        (forge_a_key("schedule", {"period": 3}), "coordinator.json is no state of this run"),
        (forge_a_key("clock", [1.0]), "coordinator.json is no state of this run"),
        (forge_a_key("recorded", {"total": 1.0}), "coordinator.json is no state of this run"),
        (forge_a_key("seconds", None), "coordinator.json is no state of this run"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_taken(
    small, tmp_path, damage, told
):
    whole = decentral.run(small)
    crash(small, tmp_path, 14)
    damage(tmp_path / "checkpoints/step-00000010")

    lines = []

    class Listening(Watcher):
        def say(self, line):
            lines.append(line)

    assert_same_run(whole, decentral.resume(tmp_path, watcher=Listening()))
    lines = [line for line in lines if "waiting" not in line]  # steps are shorter than writes
    assert lines == [f"checkpoint step-00000010 is damaged: {told}; taking step-00000005"]
    assert saved(tmp_path) == ["step-00000015", "step-00000020"]  # newer ones drop the damaged
    for folder in (tmp_path / "checkpoints").iterdir():
        damage(folder)
    with pytest.raises(UserError, match="holds no sound checkpoint: checkpoint step-00000020 is"):
        decentral.resume(tmp_path)
    assert not list(tmp_path.rglob("exploded"))


def test_as_many_checkpoints_are_kept_as_the_config_says(small, tmp_path):
    decentral.run({**small, "checkpoint": {"every": 5, "keep": 3}}, out=tmp_path)
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000015", "step-00000020"]


def test_a_torn_checkpoint_alone_is_none(small, tmp_path):
    decentral.run(small, out=tmp_path, **{"checkpoint.every": None})
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    with pytest.raises(UserError, match="no sound checkpoint: checkpoint step-00000005 is"):
        decentral.resume(tmp_path)


def test_a_run_may_be_resumed_again_and_again(small, tmp_path):
    whole = decentral.run(small)
    crash(small, tmp_path, 7)
    with pytest.raises(PowerCut):
        decentral.resume(tmp_path, watcher=CrashAt(11))
    decentral.resume(tmp_path, watcher=StopAt(15))
    assert_same_run(whole, decentral.resume(tmp_path))


def test_a_resumed_run_may_take_more_steps(small, tmp_path):
    """As if they had been asked for at once: step 20 ends a period, a record and an evaluation."""
    small["record"] = {"every": 4, "evaluate_every": 10}
    whole = decentral.run(small, steps=30)
    decentral.run(small, out=tmp_path)
    resumed = decentral.resume(tmp_path, steps=30)
    assert_same_run(whole, resumed)
    assert load(tmp_path / "config.yaml").steps == 30


def test_a_finished_run_is_left_as_it_is_when_resumed(small, tmp_path):
    done = decentral.run(small, out=tmp_path)
    again = decentral.resume(tmp_path)
    assert_same_run(done, again)
    assert again.summary["status"] == "done"


@pytest.mark.parametrize(
    ("key", "value"),
    [("engine", "ray"), ("dtype", "float32"), ("seed", 1)],
)
def test_a_resumed_run_keeps_what_the_checkpoint_fixes(small, tmp_path, key, value):
    crash(small, tmp_path, 7)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"^{key}: a resumed run keeps its {key}"):
        decentral.resume(tmp_path, **{key: value})
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"name": "adam", "lr": 0.1}},
        {"optimizer.lr": 0.01},
        {"lr_schedule": {"name": "step", "milestones": [12]}},
        {"task.dim": 5},
        {"steps": 4},
    ],
    ids=["optimizer", "learning rate", "schedule", "model", "fewer steps"],
)
def test_a_change_that_the_checkpoint_would_undo_is_refused(small, tmp_path, change):
    """Optimizer, schedule, parameters and the steps taken come from the checkpoint: a change must
    not pass unheeded, nor end in a traceback."""
    crash(small, tmp_path, 7)
    with pytest.raises(UserError, match="resumed run"):
        decentral.resume(tmp_path, **change)


@pytest.mark.slow
def test_a_resumed_ray_run_is_the_uninterrupted_one(on_shared_actors, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small |= {"engine": "ray", "workers": 2, "steps": 8} | OPTIMIZERS["momentum and schedule"]
    small["checkpoint"]["every"] = 3
    whole = decentral.run(small)
    crash(small, "part", 7)
    assert saved(tmp_path / "part") == ["step-00000003", "step-00000006"]
    resumed = decentral.resume("part")
    one, other = (r.metrics.drop(columns="time_s") for r in (whole, resumed))
    pandas.testing.assert_frame_equal(one, other, rtol=1e-12, atol=0)
    state, expected = resumed.model.state_dict(), whole.model.state_dict()
    np.testing.assert_allclose(state["x"], expected["x"], rtol=1e-12)
