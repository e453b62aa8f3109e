"""Sweeps: what a config stands for, each point once, what is picked, what becomes of failures."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import psutil
import pytest
import yaml
from test_cli import call

import decentral
from decentral import UserError
from decentral.cli import main
from decentral.config import load
from decentral.sweep import driver
from decentral.sweep.driver import Observer
from decentral.sweep.job import Job, Outcome, run
from decentral.sweep.pick import pick
from decentral.sweep.spec import read_sweep

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sweep(quick):
    """Three methods, one of them without a topology; 2 topologies, 2 learning rates, 2 seeds."""
    quick["task"]["validation"] = 0.2
    quick |= {"name": "sweep", "steps": 6, "record": {"every": 3}, "compare": {
        "grid": {"topology.name": ["ring", "complete"], "optimizer.lr": [0.01, 0.3]},
        "methods": {
            "local": {"algorithm": {"name": "local_sgd", "period": 2}},
            "gossip": {"algorithm.name": "gossip_sgd", "algorithm.period": None},
            "pga": {},
        },
        "seeds": 2,
    }}  # fmt: skip
    del quick["topology"]
    return quick


class InProcess:
    """A Runner of this process, that keeps what it was asked to run."""

    slots = 2

    def __init__(self):
        self.jobs: list[Job] = []
        self._under_way: list[Job] = []

    def start(self, job):
        assert len(self._under_way) < self.slots
        self.jobs.append(job)
        self._under_way.append(job)

    def wait(self, timeout_s):
        job = self._under_way.pop(0)
        return [Outcome(job, run(job.point.config, job.directory, threads=1))]

    def close(self):
        self._under_way = []


@pytest.fixture
def runner(monkeypatch):
    made = InProcess()
    monkeypatch.setattr(driver, "_runner", lambda sweep: made)
    return made


def compared(sweep, out, changes: dict[str, Any]):
    return decentral.compare(sweep, out=out, **changes)


class TestExpansion:
    def test_a_method_without_a_topology_is_run_once_and_not_once_a_topology(self, sweep):
        points = read_sweep(sweep).points
        count = {name: sum(p.method == name for p in points) for name in ("local", "gossip", "pga")}
        assert count == {"local": 2 * 2, "gossip": 2 * 2 * 2, "pga": 2 * 2 * 2}
        local = [p for p in points if p.method == "local"]
        assert all(p.config.topology is None and "topology.name" not in p.values for p in local)
        assert len({p.identity for p in points}) == len({p.name for p in points}) == len(points)

    def test_a_file_of_cables_stays_where_the_clock_needs_it(self, sweep):
        sweep["compare"]["grid"].pop("topology.name")
        sweep |= {"workers": 11, "topology": {"file": str(ROOT / "topologies/abilene.gml")}}
        assert all(p.config.topology is not None for p in read_sweep(sweep).points)

    def test_a_points_config_is_that_of_a_run_with_these_overrides(self, sweep):
        point = read_sweep(sweep).points[-1]
        base = {key: value for key, value in sweep.items() if key != "compare"}
        changes = {"topology.name": "complete", "optimizer.lr": 0.3, "seed": 1, "name": "pga"}
        assert point.config == load(base, changes)
        assert point.values == {"topology.name": "complete", "optimizer.lr": 0.3}

    def test_what_a_method_says_goes_over_the_grid(self, sweep):
        sweep["compare"]["methods"]["pga"] = {"optimizer.lr": 0.5}
        points = [p for p in read_sweep(sweep).points if p.method == "pga"]
        assert len(points) == 2 * 2
        assert {p.values["optimizer.lr"] for p in points} == {0.5}

    def test_a_method_may_replace_a_section_that_the_grid_sets_a_key_of(self, sweep):
        sweep["compare"]["methods"]["pga"] = {
            "optimizer": {"name": "adam", "lr": 0.1},
            "optimizer.lr": 0.2,
        }
        points = [p for p in read_sweep(sweep).points if p.method == "pga"]
        assert {p.config.optimizer.name for p in points} == {"adam"}
        assert {p.values["optimizer.lr"] for p in points} == {0.2}

    def test_without_methods_the_algorithms_of_the_grid_are_the_methods(self, sweep):
        del sweep["compare"]["methods"]
        del sweep["algorithm"]["period"]
        sweep["compare"]["grid"]["algorithm.name"] = ["parallel_sgd", "gossip_sgd"]
        points = read_sweep(sweep).points
        assert [p.method for p in points].count("parallel_sgd") == 2 * 2
        assert [p.method for p in points].count("gossip_sgd") == 2 * 2 * 2

    def test_overrides_reach_the_grid_and_the_methods(self, sweep):
        changes = {
            "steps": 9,
            "compare.seeds": [3],
            "compare.grid.topology.name": ["ring"],
            "compare.methods.pga.algorithm.period": 3,
            "compare.methods.gossip": None,
        }
        points = read_sweep(sweep, changes).points
        assert {p.method for p in points} == {"local", "pga"}
        assert {p.config.seed for p in points} == {3}
        assert {p.config.steps for p in points} == {9}
        assert {p.config.algorithm.options["period"] for p in points if p.method == "pga"} == {3}

    def test_what_is_written_is_the_same_sweep_read_from_anywhere(
        self, sweep, tmp_path, monkeypatch
    ):
        source = (ROOT / "topologies/abilene.gml").read_text()
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs/mine.gml").write_text(source)
        del sweep["compare"]["grid"]["topology.name"]
        sweep |= {"workers": 11}
        sweep["compare"]["methods"]["pga"] = {"topology": {"file": "mine.gml"}}
        sweep["compare"]["methods"]["gossip"]["topology.file"] = "mine.gml"
        (tmp_path / "configs/sweep.yaml").write_text(yaml.safe_dump(sweep))
        made = read_sweep(tmp_path / "configs/sweep.yaml")
        (tmp_path / "compare.yaml").write_text(made.dump())
        monkeypatch.chdir("/")
        again = read_sweep(tmp_path / "compare.yaml")
        assert again == made
        files = {p.config.topology.file for p in again.points if p.config.topology}
        assert files == {str(tmp_path / "configs/mine.gml")}


class TestIdentity:
    def one(self, sweep, **changes):
        sweep["compare"] = {"grid": {}}
        (point,) = read_sweep(sweep, {"topology.name": "ring", **changes}).points
        return point.identity

    @pytest.mark.parametrize(
        "change",
        [
            {"optimizer.lr": 0.2},
            {"compare.seeds": [1]},
            {"task.partition.alpha": 0.4},
            {"steps": 7},
        ],
    )
    def test_what_changes_the_records_changes_it(self, sweep, change):
        assert self.one(sweep) != self.one(sweep, **change)

    @pytest.mark.parametrize(
        "change",
        [{"name": "other"}, {"compare.on": "ray", "ray.address": "a:1"}, {"checkpoint.every": 2}],
    )
    def test_what_does_not_change_the_records_does_not(self, sweep, change):
        assert self.one(sweep) == self.one(sweep, **change)

    def test_one_run_under_two_names_is_one_point(self, sweep):
        sweep["compare"]["methods"] = {"pga": {}, "same": {"algorithm.period": 4}}
        assert {p.method for p in read_sweep(sweep).points} == {"pga"}


BAD = {
    "compare": ({"compare": None}, "is what a sweep is made of"),
    "compare.gird": ({"compare.gird": {}}, "did you mean compare.grid"),
    "compare.grid.optimizer.lr": ({"compare.grid.optimizer.lr": 0.1}, "list"),
    "compare.seeds": ({"compare.seeds": 0}, "list"),
    "compare.grid.seed": ({"compare.grid.seed": [0, 1]}, "set compare.seeds"),
    "compare.methods.pga.engine": ({"compare.methods.pga.engine": "ray"}, "the same for all"),
    "seed": ({"seed": 4}, r"compare\.seeds=\[4\]"),
    "engine": ({"engine": "ray"}, "runs in the simulator"),
    "optimizer.lr": ({"optimizer.lr": 0.5}, r"compare\.grid\.optimizer\.lr"),
    "network.compute_ms": ({"network.compute_ms": None}, r"network\.compute_ms=2"),
    "checkpoint.path": ({"checkpoint.path": "x"}, "its own run directory"),
    "compare.baseline": ({"compare.baseline": "d2"}, "gossip, local, pga; got 'd2'"),
    "compare.pick.keys": ({"compare.pick": {"keys": ["steps"]}}, "keys of the grid"),
    "compare.pick.by": (
        {"compare.pick": {"keys": ["optimizer.lr"]}, "task.validation": None},
        r"task\.validation=0\.1",
    ),
    "compare.grid.algorithm.period": ({"compare.grid.algorithm.period": [2, 4]}, None),
    "compare.grid.task.validation": (
        {f"compare.methods.{name}.task.validation": 0.2 for name in ("local", "gossip", "pga")}
        | {"compare.grid.task.validation": [0.1, 0.3]},
        "makes no difference",
    ),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_input_is_refused_by_its_key(sweep, key):
    changes, message = BAD[key]
    if message is None:  # good input: pga takes its period from the grid, the others have their own
        assert len(read_sweep(sweep, changes).points) == 4 + 8 + 2 * 8
        return
    with pytest.raises(UserError, match=message) as refused:
        read_sweep(sweep, changes)
    assert refused.value.key == key


def test_the_test_set_is_nothing_to_pick_by(sweep):
    with pytest.raises(UserError, match=r"compare\.pick\.by: .*validation_loss"):
        read_sweep(sweep, {"compare.pick": {"keys": ["optimizer.lr"], "by": "eval_loss"}})


def test_a_run_says_that_a_sweep_is_none(sweep):
    with pytest.raises(UserError, match="decentral compare"):
        decentral.run(sweep)


def test_every_point_is_checked_before_the_first_runs(sweep, tmp_path, runner):
    sweep["compare"]["methods"]["last"] = {"optimizer.momentun": 0.9}
    with pytest.raises(UserError, match=r"momentun.*at the point last topology") as refused:
        decentral.compare(sweep, out=tmp_path / "out")
    assert refused.value.key == "optimizer.momentun"
    assert not runner.jobs
    assert not (tmp_path / "out").exists()


class TestPick:
    @pytest.fixture
    def points(self, sweep):
        sweep["compare"]["methods"] = {"pga": {}}
        sweep["compare"]["grid"] = {"topology.name": ["ring"], "optimizer.lr": [0.1, 0.2, 0.4]}
        sweep["compare"]["pick"] = {"keys": ["optimizer.lr"]}
        return sweep

    def picked(self, points, scores, by="validation_loss", **other):
        """`scores` by learning rate, a value a seed."""
        made = read_sweep(points, {"compare.pick.by": by})
        found = []
        for point in made.points:
            value = scores[point.values["optimizer.lr"]][point.config.seed]
            status = "failed" if value == "failed" else "done"
            found.append({"status": status, by: value, "eval_loss": -point.values["optimizer.lr"]})
        (choice,) = pick(made.points, made.compare, found) or (None,)
        return choice

    def test_the_mean_over_seeds_of_the_validation_decides_and_not_the_test(self, points):
        choice = self.picked(points, {0.1: (1.0, 4.0), 0.2: (2.0, 2.0), 0.4: (3.0, 3.0)})
        assert choice is not None
        assert (choice.values, choice.score, choice.at_edge) == ({"optimizer.lr": 0.2}, 2.0, ())
        assert [p.config.seed for p in choice.points] == [0, 1]

    def test_of_accuracies_the_greatest_is_best(self, points):
        scores = {0.1: (0.5, 0.5), 0.2: (0.6, 0.6), 0.4: (0.9, 0.5)}
        choice = self.picked(points, scores, by="validation_accuracy")
        assert choice is not None
        assert (choice.values["optimizer.lr"], choice.score) == (0.4, pytest.approx(0.7))
        assert choice.at_edge == ("optimizer.lr",)

    @pytest.mark.parametrize("missing", ["failed", None])
    def test_values_without_a_score_of_every_seed_are_not_eligible(self, points, missing):
        scores = {0.1: (0.1, missing), 0.2: (2.0, 2.0), 0.4: (1.0, 1.5)}
        choice = self.picked(points, scores)
        assert choice is not None
        assert choice.values["optimizer.lr"] == 0.4
        assert self.picked(points, dict.fromkeys(scores, (missing, 1.0))) is None


class TestSweep:
    def test_gives_a_row_a_point_and_picks_what_a_run_would(self, sweep, tmp_path, runner):
        sweep["compare"]["pick"] = {"keys": ["optimizer.lr"]}
        result = compared(sweep, tmp_path / "out", {"compare.methods.gossip": None})
        assert list(result.table.columns[:5]) == [
            "method", "topology.name", "optimizer.lr", "seed", "status",
        ]  # fmt: skip
        assert len(result.table) == len(runner.jobs) == 4 + 8
        assert len(result.failed) == 0
        local = result.table[result.table.method == "local"]
        means = local.groupby("optimizer.lr").validation_loss.mean()
        best = result.best[result.best.method == "local"]
        assert set(best["optimizer.lr"]) == {means.idxmin()}
        assert len(best) == 2
        row = local.iloc[0]
        alone = decentral.run(load(f"{row.directory}/config.yaml").model_dump(exclude_none=True))
        assert alone.summary["final"]["validation_loss"] == row.validation_loss
        assert alone.summary["final"]["eval_loss"] == row.eval_loss
        page = result.report(figures=False)
        assert page == tmp_path / "out/report/report.html"
        reported = pandas.read_csv(page.with_name("table.csv"))
        assert reported.iloc[:, 0].nunique() == 3  # local, and pga on either topology
        told = yaml.safe_load((tmp_path / "out/picked.yaml").read_text())["picked"]
        assert [choice["method"] for choice in told] == ["local", "pga", "pga"]

    def test_never_runs_a_point_twice_and_may_grow(self, sweep, tmp_path, runner):
        first = compared(sweep, tmp_path, {"compare.seeds": 1})
        assert len(runner.jobs) == 10
        again = decentral.compare(tmp_path / "compare.yaml", out=tmp_path)
        assert len(runner.jobs) == 10
        assert again.table.equals(first.table)
        compared(sweep, tmp_path, {"compare.grid.gradient.clip_norm": [None, 1.0]})
        assert len(runner.jobs) == 2 * 2 * 10
        with pytest.raises(UserError, match="none of this sweep"):
            compared(sweep, tmp_path, {"compare.seeds": [7]})

    def test_two_drivers_are_not_at_work_in_one_directory(self, sweep, tmp_path, runner):
        refused = []

        def start(job):
            with pytest.raises(UserError, match="another process is at work"):
                decentral.compare(sweep, out=tmp_path)
            refused.append(job)
            raise KeyboardInterrupt

        runner.start = start
        with pytest.raises(KeyboardInterrupt):
            decentral.compare(sweep, out=tmp_path)
        assert len(refused) == 1

    def test_a_point_that_fails_sinks_no_other_and_runs_again_when_asked_again(
        self, sweep, tmp_path, runner
    ):
        sweep["compare"] = {
            "grid": {"faults": [[], [{"kind": "kill", "worker": 1, "step": 4}]]},
            "seeds": 1,
        }
        sweep |= {"topology": {"name": "ring"}, "on_worker_failure": "stop"}
        told = []
        observer = Observer()
        observer.failure = lambda point, error: told.append(error)  # pyright: ignore
        result = decentral.compare(sweep, out=tmp_path, observer=observer)
        assert list(result.table.status) == ["done", "failed"]
        assert told == ["WorkerError: worker 1 died before step 4, as config.faults has it"]
        (row,) = result.failed.to_dict("records")
        assert "worker 1 died before step 4" in row["error"]
        assert row["step"] == 3  # its last record
        assert "Traceback" in (Path(row["directory"]) / "error.txt").read_text()
        decentral.compare(sweep, out=tmp_path)
        assert len(runner.jobs) == 3

    def test_what_was_cut_short_is_run_from_the_start(self, sweep, tmp_path, runner):
        sweep["compare"] = {"grid": {}, "seeds": 1}
        sweep["topology"] = {"name": "ring"}
        result = decentral.compare(sweep, out=tmp_path)
        point = Path(result.table.directory[0])
        rows = (point / "metrics.jsonl").read_text().splitlines()
        (point / "summary.json").unlink()
        (point / "metrics.jsonl").write_text(rows[0] + "\n" + rows[1][:20])
        again = decentral.compare(sweep, out=tmp_path)
        assert len(runner.jobs) == 2
        assert same(again.table).equals(same(result.table))
        assert len((point / "metrics.jsonl").read_text().splitlines()) == len(rows)


def test_the_guides_example_is_a_sweep():
    guide = (ROOT / "docs/compare.md").read_text()
    text = guide.split("```yaml\n")[1].split("```")[0]
    points = read_sweep(yaml.safe_load(text)).points
    assert len(points) == (1 + 1 + 3) * 4 * 5


class TestCommand:
    @pytest.fixture
    def place(self, sweep, tmp_path, monkeypatch):
        sweep["compare"] = {"grid": {"optimizer.lr": [0.01, 0.3]}, "seeds": 2}
        sweep["topology"] = {"name": "ring"}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "path", list(sys.path))

    def call(self, capsys, *arguments, code=0):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", "--no-figures", *arguments])
        said = capsys.readouterr()
        assert (stopped.value.code or 0) == code, said
        return said.err if code == 2 else said.out

    def test_prints_how_it_goes_and_a_row_a_run(self, place, capsys, runner):
        said = self.call(capsys, "sweep.yaml")
        assert "4 points, 0 done before" in said
        assert "4/4 points done  0 running" in said
        rows = [line.split() for line in said.splitlines() if line.startswith(" gossip_pga")]
        assert [row[1:3] for row in rows] == [["0.01", "2"], ["0.3", "2"]]
        assert "report in runs/sweep/report/report.html" in said
        assert "written to runs/sweep" in said
        again = self.call(capsys, "--resume", "runs/sweep")
        assert "done before" not in again
        assert len(runner.jobs) == 4

    def test_ends_with_1_and_a_table_where_points_have_failed(self, place, capsys, runner):
        kill = "faults=[{kind: kill, worker: 0, step: 2}]"
        said = self.call(capsys, "sweep.yaml", kill, "on_worker_failure=stop", code=1)
        assert "4 points failed" in said
        assert said.count("worker 0 died before step 2") == 2 * 4  # when it happens, and at the end

    def test_stops_when_it_is_interrupted_and_keeps_what_is_done(
        self, place, capsys, runner, monkeypatch
    ):
        wait = runner.wait

        def interrupted(timeout_s):
            if len(runner.jobs) > 2:
                raise KeyboardInterrupt
            return wait(timeout_s)

        runner.wait = interrupted
        said = self.call(capsys, "sweep.yaml", code=130)
        assert "the same command goes on" in said
        runner.wait, before = wait, len(ended(Path("runs/sweep"), "done"))
        assert before == 1
        assert "4 points, 1 done before" in self.call(capsys, "sweep.yaml")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "name a config"),
            (("sweep.yaml", "--resume", "x"), "name a config"),
            (("--resume", "x"), "holds no sweep"),
            (("sweep.yaml", "stesp=3"), "did you mean steps"),
        ],
    )
    def test_bad_input_is_refused(self, place, capsys, words, message):
        assert message in self.call(capsys, *words, code=2)


def same(table):
    """All of a table but wall-clock times and places."""
    return table.drop(columns=["time_s", "directory"])


def records(directory):
    """The records of every point, less the wall-clock, by the name of its directory."""
    found = {}
    for metrics in sorted(directory.glob("points/*/metrics.jsonl")):
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        found[metrics.parent.name] = [row | {"time_s": None} for row in rows]
    return found


def ended(directory, status):
    """The summaries of the points that ended so, and when they were written."""
    there = {path: path.stat().st_mtime_ns for path in directory.glob("points/*/summary.json")}
    return {p: t for p, t in there.items() if json.loads(p.read_text())["status"] == status}


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return value


@pytest.mark.slow
def test_a_sweep_outlives_the_death_of_a_process_and_of_its_driver(
    sweep, tmp_path, monkeypatch, capsys
):
    """In processes: one of them is killed, then the driver; the same command finishes the rest."""
    sweep["compare"]["grid"].pop("optimizer.lr")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"steps": 150}))
    words = ["compare", "sweep.yaml", "--out", "out", "compare.processes=2", "--no-figures"]
    command = [sys.executable, "-m", "decentral", *words]
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: len(ended(out, "done")) >= 1)
            children = psutil.Process(process.pid).children()
            next(c for c in children if "spawn_main" in " ".join(c.cmdline())).kill()
            (failed,) = wait_for(lambda: ended(out, "failed"))
            assert "killed by SIGKILL" in json.loads(failed.read_text())["error"]
            wait_for(lambda: len(ended(out, "done")) >= 3)
            assert process.poll() is None
            children = psutil.Process(process.pid).children()
        finally:
            process.kill()
        assert process.stdout is not None
        assert "its process died (killed by SIGKILL" in process.stdout.read()
    assert not psutil.wait_procs(children, timeout=30)[1]
    before = ended(out, "done")
    assert f"10 points, {len(before)} done before" in call(capsys, *words)
    after = ended(out, "done")
    assert len(after) == 10
    assert {path: after[path] for path in before} == before


@pytest.mark.slow
def test_a_ray_cluster_gives_identical_records(cluster, sweep, tmp_path, runner, monkeypatch):
    """The same sweep in this process and as tasks of a cluster, bit for bit."""
    sweep["compare"]["grid"]["optimizer.lr"] = [0.1]
    decentral.compare(sweep, out=tmp_path / "here")
    monkeypatch.undo()
    changes = {"compare.on": "ray", "compare.processes": 2}
    result = compared(sweep, tmp_path / "ray", changes)
    assert len(result.failed) == 0
    here, ray = records(tmp_path / "here"), records(tmp_path / "ray")
    assert len(here) == 10
    assert ray == here
    assert all(not math.isnan(row["loss"]) for rows in ray.values() for row in rows)
