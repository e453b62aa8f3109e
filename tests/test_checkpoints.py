"""Checkpoints: anywhere, beside the run, whole or not at all, and with everything in them."""

import hashlib
import io
import json
import shutil
import sys
import threading
from types import SimpleNamespace

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_api import Diary
from test_cli import call
from test_records import (
    GENTLE,
    MINE,
    CrashAt,
    PowerCut,
    StopAt,
    assert_same_run,
    coordinator_of,
    crash,
    rows_of,
    saved,
    small_config,
    summary_of,
    use,
)
from torch import nn

import decentral
from decentral import UserError
from decentral.checkpoints import Checkpoints
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.ray import RayEngine, _unreached
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.storage import Storage, StorageError, Written


@pytest.fixture
def small():
    return small_config()


@pytest.fixture
def bucket():
    """A place in an object store: fsspec's own, in memory, which has no folders to rename."""
    store = fsspec.filesystem("memory")
    yield "memory://bucket/run"
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)


def names_in(url):
    return sorted(Storage(url).files())


# Everything is in it.


ADAM = {
    "optimizer": {"name": "adam", "lr": 0.05},
    "lr_schedule": {"name": "cosine", "T_max": 25},
}
PLAIN = {"optimizer": {"name": "sgd", "lr": 0.05}}
EVERYTHING = {
    "gossip with momentum": {"algorithm": {"name": "gossip_sgd"}},
    "adam and cosine schedule": {"algorithm": {"name": "gossip_pga", "period": 4}} | ADAM,
    "gradient tracking": {"algorithm": {"name": "gradient_tracking"}} | ADAM,
    "choco": {
        "algorithm": {
            "name": "choco_sgd",
            "compression": {"name": "random_k", "fraction": 0.4},
            "consensus_step": 0.4,
        }
    }
    | PLAIN,
    "relay": {"algorithm": {"name": "relay_sgd"}, "topology": {"name": "path"}},
    "a2cid2": {"algorithm": {"name": "a2cid2"}} | PLAIN,
    "aga": {"algorithm": {"name": "gossip_aga", "initial_period": 2, "warmup": 9}},
    "norm test": {
        "algorithm": {"name": "local_sgd", "period": 4},
        "norm_test": {"tolerance": 0.2, "every": 5, "max_accumulate": 9},
        "gradient": {"accumulate": 2},
    }
    | PLAIN,
    "slowmo": {"algorithm": {"name": "slowmo", "period": 4}},
    "consensus control": {"algorithm": {"name": "consensus_control", "fraction": 0.3}},
    "jitter of the clock": {
        "algorithm": {"name": "gossip_sgd"},
        "network": {"compute_ms": 1, "jitter": {"kind": "lognormal", "sigma": 0.5}},
    },
}


@pytest.mark.parametrize("case", EVERYTHING)
def test_a_run_goes_on_bit_for_bit_from_a_step_that_is_nothing_else(small, tmp_path, case):
    """Step 11 is no record (3), no evaluation (6), no end of a period (4) and no test (5)."""
    small |= {"checkpoint": {"every": 11}, "steps": 24} | EVERYTHING[case]
    whole = decentral.run(small)
    crash(small, tmp_path, 14)
    assert saved(tmp_path) == ["step-00000011"]
    assert coordinator_of(tmp_path, 11)["step"] == 11
    assert_same_run(whole, decentral.resume(tmp_path))


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_dropout_and_statistics_go_on_bit_for_bit(small, tmp_path, monkeypatch, buffers):
    layers = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
    use(monkeypatch, nn.Sequential(*layers))
    small |= {"task": MINE, "optimizer": GENTLE, "buffers": buffers, "checkpoint": {"every": 11}}
    whole = decentral.run(small)
    crash(small, tmp_path, 14)
    assert_same_run(whole, decentral.resume(tmp_path))


# Any place.


@pytest.mark.parametrize("kind", ["object store", "URL of a folder", "folder"])
def test_checkpoints_lie_where_the_config_says(small, tmp_path, bucket, kind):
    places = {"object store": bucket, "folder": str(tmp_path / "my checkpoints")}
    path = places.get(kind, f"file://{tmp_path}/elsewhere")
    small["checkpoint"]["path"] = path
    whole = decentral.run({**small, "checkpoint": {"every": 5}})
    crash(small, tmp_path / "run", 14)
    assert names_in(path) == ["step-00000005", "step-00000010"]
    assert not (tmp_path / "run/checkpoints").exists()
    assert_same_run(whole, decentral.resume(tmp_path / "run"))
    assert names_in(path) == ["step-00000015", "step-00000020"]


def test_a_relative_place_is_that_of_the_working_directory_of_the_first_run(
    small,
    tmp_path,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    small["checkpoint"]["path"] = "kept"
    crash(small, "run", 14)
    assert names_in(tmp_path / "kept") == ["step-00000005", "step-00000010"]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert decentral.resume("../run").summary["status"] == "done"
    assert names_in(tmp_path / "kept") == ["step-00000015", "step-00000020"]
    assert list((tmp_path / "other").iterdir()) == []


def test_a_run_directory_that_was_moved_goes_on(small, tmp_path):
    whole = decentral.run(small)
    crash(small, tmp_path / "here", 14)
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same_run(whole, decentral.resume(tmp_path / "there"))
    assert not (tmp_path / "here").exists()


def test_a_resumed_run_may_look_for_its_checkpoints_elsewhere(small, tmp_path, bucket):
    whole = decentral.run(small)
    small["checkpoint"]["path"] = str(tmp_path / "kept")
    crash(small, tmp_path / "run", 14)
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/kept", "/bucket/run", recursive=True)
    shutil.rmtree(tmp_path / "kept")
    resumed = decentral.resume(tmp_path / "run", **{"checkpoint.path": bucket})
    assert_same_run(whole, resumed)
    assert load(tmp_path / "run/config.yaml").checkpoint.path == bucket


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nosuch://bucket/run", r"a URL that fsspec knows.*nosuch://bucket/run"),
        ("lakefs://bucket/run", r"needs a package that is not here: .*lakefs"),
        ("memory://bucket/run*", r"must hold none of \* \? \["),
        ("/proc/nowhere/run", r"cannot write .*; take another place"),
        ("", "at least 1 character"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_starts(
    small,
    tmp_path,
    monkeypatch,
    path,
    told,
):
    monkeypatch.setattr("decentral.api.Simulator", None)
    small["checkpoint"]["path"] = path
    with pytest.raises(UserError, match=told) as refused:
        decentral.run(small, out=tmp_path / "run")
    assert refused.value.key == "checkpoint.path"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_holds_another_runs_checkpoints_is_refused(small, tmp_path, bucket):
    small["checkpoint"]["path"] = bucket
    decentral.run(small, out=tmp_path / "one")
    with pytest.raises(UserError, match="holds checkpoints of a run; give each run a place"):
        decentral.run(small, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert names_in(bucket) == ["step-00000015", "step-00000020"]


def denied(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_place_that_may_not_be_listed_is_refused_by_name(small, tmp_path, monkeypatch):
    crash(small, tmp_path, 14)
    monkeypatch.setattr(LocalFileSystem, "ls", denied)
    with pytest.raises(UserError, match=r"checkpoint.path: cannot read .*Permission denied; mend"):
        decentral.resume(tmp_path)


def test_a_resumed_run_that_can_write_no_checkpoint_is_refused(small, tmp_path, monkeypatch):
    crash(small, tmp_path, 14)
    monkeypatch.setattr(Storage, "_create", denied)
    with pytest.raises(UserError, match=r"checkpoint.path: cannot write .*Permission denied; take"):
        decentral.resume(tmp_path)


def test_an_old_checkpoint_that_stays_is_told_and_the_new_one_counts(small, tmp_path, monkeypatch):
    remove = Storage.remove

    def refuse(storage, name):
        if name.startswith("step-00000005"):
            raise StorageError("cannot remove it")
        remove(storage, name)

    monkeypatch.setattr(Storage, "remove", refuse)
    diary = Diary()
    result = decentral.run(small, out=tmp_path, watcher=diary)
    assert ("say", "warning: an old checkpoint stays: cannot remove it") in diary.entries
    assert "checkpoint_error" not in result.summary
    assert Checkpoints(Storage(tmp_path / "checkpoints"), 1).newest() == 20


def test_a_probe_leaves_nothing_behind(tmp_path, bucket):
    for url in (tmp_path / "a/b", tmp_path, bucket):
        storage = Storage(url)
        with storage.probe() as name:
            assert storage.read(name) == name.encode()
        assert storage.files() == {}
    assert list(tmp_path.iterdir()) == []


# Beside the run.


class Gate:
    """Lets the file of one checkpoint be written only once it is `open`."""

    def __init__(self, monkeypatch, folder):
        self.open = threading.Event()
        write = Storage.write

        def wait(storage, name, fill):
            if name == f"{folder}/workers.pt":
                assert self.open.wait(60)
            return write(storage, name, fill)

        monkeypatch.setattr(Storage, "write", wait)


class OpensAt(Diary):
    """Opens a gate once so many steps are finished, and notes what is in a folder by then."""

    def __init__(self, gate, step, folder):
        super().__init__()
        self._gate, self._at, self._folder = gate, step, folder

    def advance(self, step, record):
        super().advance(step, record)
        if step == self._at:
            self.there = [path.name for path in self._folder.glob("*/checksums.json")]
            self._gate.open.set()


def test_workers_go_on_while_a_checkpoint_is_written(small, tmp_path, monkeypatch):
    """The checkpoint of step 5 is what the run was at step 5, although written after step 9."""
    whole = decentral.run(small)
    gate = Gate(monkeypatch, "step-00000005")
    watcher = OpensAt(gate, 9, tmp_path / "checkpoints")
    decentral.run({**small, "checkpoint": {"every": 5, "keep": 9}}, out=tmp_path, watcher=watcher)
    assert watcher.there == []
    assert saved(tmp_path) == [f"step-000000{step:02}" for step in (5, 10, 15, 20)]
    for later in ("10", "15", "20"):
        shutil.rmtree(tmp_path / f"checkpoints/step-000000{later}")
    assert_same_run(whole, decentral.resume(tmp_path))


def test_the_next_checkpoint_waits_for_the_one_before_and_says_so_once(
    small,
    tmp_path,
    monkeypatch,
):
    gate = Gate(monkeypatch, "step-00000005")
    lines = []

    class Listening(StopAt):
        def say(self, line):
            lines.append(line)
            gate.open.set()

    decentral.run(small, out=tmp_path, watcher=Listening(99))
    assert lines == ["a checkpoint is due before the last one is written; waiting for it"]
    assert saved(tmp_path) == ["step-00000015", "step-00000020"]


def test_a_checkpoint_under_way_is_finished_when_the_run_fails(small, tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "step-00000010")

    class OpensAsItCrashes(CrashAt):
        def advance(self, step, record):
            if step >= 14:
                gate.open.set()
            super().advance(step, record)

    with pytest.raises(PowerCut):
        decentral.run(small, out=tmp_path, watcher=OpensAsItCrashes(14))
    assert saved(tmp_path) == ["step-00000005", "step-00000010"]
    assert Checkpoints(Storage(tmp_path / "checkpoints"), 1).newest() == 10


class Full(io.BytesIO):
    """A file on a disk that has room for 300 bytes more."""

    def write(self, data):
        if self.tell() > 300:
            raise OSError(28, "No space left on device")
        return super().write(data)


def fill_the_disk(monkeypatch, *steps):
    """There is no room for the workers' files of these checkpoints."""
    create = Storage._create
    full = [f"step-{step:08d}/workers.pt" for step in steps]

    def created(storage, name):
        return Full() if name in full else create(storage, name)

    monkeypatch.setattr(Storage, "_create", created)


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on(
    small,
    tmp_path,
    monkeypatch,
):
    whole = decentral.run(small)
    fill_the_disk(monkeypatch, 10)
    diary = Diary()
    result = decentral.run(small, out=tmp_path, watcher=diary)
    told = [entry[1] for entry in diary.entries if entry[0] == "say" and "warning" in entry[1]]
    place = tmp_path / "checkpoints/step-00000010/workers.pt"
    reason = f"cannot write {place}: No space left on device"
    assert told == [f"warning: no checkpoint step-00000010: {reason}"]
    assert_same_run(whole, result)
    assert "checkpoint_error" not in result.summary
    assert saved(tmp_path) == ["step-00000015", "step-00000020"]


def test_a_run_whose_last_checkpoint_failed_says_so_and_the_one_before_stays(
    small,
    tmp_path,
    monkeypatch,
):
    whole = decentral.run(small)
    fill_the_disk(monkeypatch, 15, 20)
    result = decentral.run(small, out=tmp_path)
    assert result.summary["status"] == "done"
    assert "no checkpoint step-00000020: cannot write" in summary_of(tmp_path)["checkpoint_error"]
    monkeypatch.undo()
    assert Checkpoints(Storage(tmp_path / "checkpoints"), 1).newest() == 10
    assert_same_run(whole, decentral.resume(tmp_path))


def test_a_stop_whose_checkpoint_fails_names_the_place(small, tmp_path, monkeypatch):
    fill_the_disk(monkeypatch, 5)
    lines = []

    class Listening(StopAt):
        def say(self, line):
            lines.append(line)

    decentral.run(small, out=tmp_path, watcher=Listening(5))
    assert lines[-1].startswith("stopped at step 5; no checkpoint step-00000005: cannot write")


# Whole or not at all.


@pytest.mark.parametrize("operations", range(16))
def test_a_store_that_is_gone_after_any_operation_leaves_a_run_that_goes_on(
    small,
    tmp_path,
    monkeypatch,
    bucket,
    operations,
):
    """Files are written and removed, one after the other; nothing more after so many of them."""
    small["checkpoint"] = {"every": 5, "keep": 1, "path": bucket}
    whole = decentral.run({**small, "checkpoint": {"every": 5}})
    done = []

    def until_gone(operation):
        def wrapped(storage, name, *arguments):
            if "probe" not in name:
                if len(done) == operations:
                    raise StorageError("the store is gone")
                done.append((operation.__name__, name))
            return operation(storage, name, *arguments)

        return wrapped

    for name in ("write", "remove"):
        monkeypatch.setattr(Storage, name, until_gone(getattr(Storage, name)))
    decentral.run(small, out=tmp_path / "run")
    monkeypatch.undo()
    written = [name for kind, name in done if kind == "write" and name.endswith("checksums.json")]
    if written:
        newest = Checkpoints(Storage(bucket), keep=1).newest()
        assert f"step-{newest:08d}/checksums.json" == written[-1]
        assert_same_run(whole, decentral.resume(tmp_path / "run"))
        assert names_in(bucket) == ["step-00000020"]
    else:
        assert operations < 3  # workers.pt, coordinator.json, and then it counts
        with pytest.raises(UserError, match=r"holds no (sound )?checkpoint"):
            decentral.resume(tmp_path / "run")


def test_an_older_checkpoint_goes_only_when_the_newer_counts(small, tmp_path, monkeypatch):
    done = []
    for kind in ("write", "remove"):
        operation = getattr(Storage, kind)

        def noted(storage, name, *arguments, operation=operation, kind=kind):
            done.append((kind, name))
            return operation(storage, name, *arguments)

        monkeypatch.setattr(Storage, kind, noted)
    decentral.run({**small, "steps": 10, "checkpoint": {"every": 5, "keep": 1}}, out=tmp_path)
    done = [(kind, name) for kind, name in done if "probe" not in name]
    ten = [(kind, name) for kind, name in done if "10" in name or kind == "remove"]
    assert ten == [
        ("write", "step-00000010/workers.pt"),
        ("write", "step-00000010/coordinator.json"),
        ("write", "step-00000010/checksums.json"),
        ("remove", "step-00000005/checksums.json"),
        ("remove", "step-00000005"),
    ]


def test_checksums_hold_size_and_sha256_of_every_file(small, tmp_path):
    decentral.run(small, out=tmp_path)
    folder = tmp_path / "checkpoints/step-00000020"
    rows = json.loads((folder / "checksums.json").read_text())
    assert sorted(rows) == ["coordinator.json", "workers.pt"]
    for name, row in rows.items():
        content = (folder / name).read_bytes()
        assert row == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_saved_state_is_a_copy(small, tmp_path):
    """What happens to the model after `save` has returned is not in the file."""
    experiment = build(load(small))
    engine = Simulator(experiment)
    coordinator = Coordinator(experiment, engine)
    segments = coordinator.run()
    next(segments)
    before = {name: value.clone() for name, value in engine.average_model().items()}
    engine.save(Storage(tmp_path), "here")
    next(segments)
    files = {file.name: file for file in engine.saved(wait=True) or []}
    assert not torch.equal(engine.average_model()["x"], before["x"])
    engine.load(Storage(tmp_path), "here", files)
    assert torch.equal(engine.average_model()["x"], before["x"])


# Seen by every worker.


def ray_engine_of(told):
    """A RayEngine whose workers say this of a probe; it never starts."""
    engine = object.__new__(RayEngine)
    engine._actors = {0: None, 1: None}
    engine._nodes = {0: ("10.0.0.1", 1), 1: ("10.0.0.2", 2)}
    engine.ask = lambda function, *arguments: [tell(function, *arguments) for tell in told]
    return engine


def sees(function, *arguments):
    return function(SimpleNamespace(), *arguments)


def test_a_place_that_a_worker_does_not_see_is_refused_by_node(tmp_path):
    def elsewhere(function, address, name):
        return function(SimpleNamespace(), address + "-of-another-disk", name)

    place = tmp_path / "made/checkpoints"
    with pytest.raises(UserError, match=r"worker 1 on node 10\.0\.0\.2 does not see") as refused:
        ray_engine_of([sees, elsewhere]).reach(Storage(place))
    assert refused.value.key == "checkpoint.path"
    assert str(place) in refused.value.message
    assert "storage that all nodes share, or set checkpoint.path=s3://" in refused.value.message
    assert list(tmp_path.iterdir()) == []
    ray_engine_of([sees, sees]).reach(Storage(place))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_without_the_package_says_so(tmp_path):
    told = _unreached(SimpleNamespace(), "lakefs://bucket/run", "probe")  # pyright: ignore
    assert told is not None
    assert "needs a package" in told


@pytest.mark.slow
def test_workers_of_ray_do_not_see_the_drivers_memory(on_shared_actors, small, tmp_path, bucket):
    small |= {"engine": "ray", "workers": 2}
    small["checkpoint"]["path"] = bucket
    with pytest.raises(UserError, match=r"^checkpoint.path: worker 0 on node .* does not see"):
        decentral.run(small, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Damage.


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """A run that crashed after checkpoints 5 and 10, and what it would have come to."""
    folder = tmp_path_factory.mktemp("crashed")
    whole = decentral.run(small_config())
    crash(small_config(), folder / "run", 14)
    return folder, whole


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_random_bytes_anywhere_are_never_loaded_and_never_a_traceback(crashed, capsys, data):
    folder, whole = crashed
    run = folder / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "run", run)
    hit = set()
    for _ in range(data.draw(st.integers(1, 3))):
        file = data.draw(st.sampled_from(sorted((run / "checkpoints").glob("*/*"))))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=40))
        before = bytes(content)
        content[at : at + len(noise)] = noise
        if content != before:
            file.write_bytes(content)
            hit.add(file.parent.name)
    sound = {"step-00000005", "step-00000010"} - hit
    if sound:
        said = call(capsys, "run", "--resume", str(run))
        for name in sorted(hit):
            if name > max(sound):
                assert f"checkpoint {name} is damaged: " in said
        last, expected = rows_of(run)[-1], whole.metrics.iloc[-1]
        assert (last["step"], last["loss"]) == (expected.step, expected.loss)
    else:
        said = call(capsys, "run", "--resume", str(run), code=2)
        assert "holds no sound checkpoint" in said
        assert len(said.splitlines()) == 1
    assert "Traceback" not in said


def test_a_file_that_is_not_as_written_is_not_handed_over(tmp_path):
    storage = Storage(tmp_path)
    file = storage.write("a/state.pt", lambda sink: torch.save({"x": torch.ones(2)}, sink))
    taken = []
    storage.load("a", "state.pt", {"state.pt": file}, taken.append)
    assert torch.equal(taken[0]["x"], torch.ones(2))
    wrong = Written("state.pt", file.size, "0" * 64)
    for files in ({}, {"state.pt": wrong}):
        with pytest.raises(StorageError, match=r"state\.pt is (missing|not what was written)"):
            storage.load("a", "state.pt", files, taken.append)
    assert len(taken) == 1
    assert "lakefs" not in sys.modules
