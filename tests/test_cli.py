"""The command line: what it prints, what it writes, and how it exits."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from decentral import WorkerError
from decentral.cli import app, main

ROOT = Path(__file__).parents[1]
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


@pytest.fixture
def place(tmp_path, monkeypatch, quick):
    """A working directory with a config, good.yaml."""
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(quick))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def call(capsys, *arguments, code=0):
    """Run the command line in this process; what it printed."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    captured = capsys.readouterr()
    assert (stopped.value.code or 0) == code, captured.err
    return captured.out if code in (0, 130) else captured.err


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_shows_an_example(command, capsys):
    said = call(capsys, *command.split(), "--help")
    assert f"Example: decentral {command}".strip() in said


@pytest.mark.parametrize("command", ["run", "topology"])
def test_help_lists_the_commands(command, capsys):
    assert command in COMMANDS
    assert f" {command} " in call(capsys, "--help")


SLOW = ("measure", "doctor", "compare")  # they start processes
EXAMPLES = [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in COMMANDS]


@pytest.mark.parametrize("command", ["", *EXAMPLES])
def test_the_example_of_a_help_works(command, capsys, place):
    """As printed, but for fewer steps; the paths in it are those of the repository."""
    said = " ".join(call(capsys, *command.split(), "--help").split())
    words = said.rpartition("Example: decentral ")[2].split()
    os.symlink(ROOT / "configs", place / "configs")
    before = {
        "watch": ["--out", "runs/quickstart"],
        "connectivity": ["workers=8", "checkpoint.every=2", "--out", "runs/local"],
        "report": ["algorithm={name: parallel_sgd}", "--out", "runs/parallel"],
    }
    if words[0] in before:
        call(capsys, "run", "good.yaml", "steps=2", *before[words[0]])
    few = {
        "run": ["steps=2", "engine=sim"],
        "report": ["--no-figures"],
        "compare": ["steps=2", "compare.seeds=1", "compare.grid.topology.name=[ring]"],
    }
    call(capsys, *words, *few.get(words[0], []))


def test_run_prints_plain_lines_and_a_table_where_there_is_no_terminal(place, capsys):
    said = call(capsys, "run", "good.yaml", "--out", "out")
    assert "\x1b" not in said
    assert "\r" not in said
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/24" for step in range(3, 25, 3)]
    final = rows_of(place / "out")[-1]
    assert lines[-1] == (
        f"step 24/24  loss {final['loss']:.4f}  consensus {final['consensus_distance']:.4f}"
        f"  eval loss {final['eval_loss']:.4f}  accuracy {final['eval_accuracy']:.4f}"
        f"  (workers' own {final['eval_accuracy_workers']:.4f})"
    )
    table = said.split("(workers' own")[-1]
    assert "quick: gossip_pga" in table
    for row in (
        "steps",
        "loss",
        "consensus distance",
        "accuracy, averaged model",
        "simulated time",
    ):
        assert f"│ {row} " in table
    assert f" {final['eval_accuracy']:.4f} " in table
    assert said.endswith("written to out\n")


def test_a_long_run_prints_about_twenty_lines(place, capsys):
    changes = ["steps=200", "record.every=1", "record.evaluate_every=null", "task.batch_size=1"]
    said = call(capsys, "run", "good.yaml", *changes, "--out", "out")
    assert 15 <= sum(line.startswith("step ") for line in said.splitlines()) <= 25
    assert len(rows_of(place / "out")) == 200


def test_run_takes_overrides_and_the_engine_from_the_command_line(place, capsys):
    (place / "ray.yaml").write_text((place / "good.yaml").read_text() + "\n")
    call(capsys, "run", "ray.yaml", "engine=ray", "steps=3", "name=other", "--engine", "sim",
         "--out", "out")  # fmt: skip
    config = yaml.safe_load((place / "out/config.yaml").read_text())
    assert (config["engine"], config["steps"], config["name"]) == ("sim", 3, "other")


def test_run_makes_a_directory_of_the_runs_name_by_default(place, capsys):
    said = call(capsys, "run", "good.yaml", "steps=2")
    (made,) = (place / "runs").iterdir()
    assert made.name.startswith("quick-")
    assert said.endswith(f"written to runs/{made.name}\n")
    assert (made / "summary.json").exists()


def test_run_finds_a_task_in_the_working_directory(place, capsys):
    (place / "my_task.py").write_text(TASK)
    try:
        call(capsys, "run", "good.yaml", *USE_TASK, "steps=2", "--out", "out")
    finally:
        sys.modules.pop("my_task", None)


TASK = """
import signal
import torch
from decentral import Task

class Impatient(torch.nn.Linear):
    calls, interrupts = 0, set()

    def forward(self, x):
        Impatient.calls += 1
        if Impatient.calls in Impatient.interrupts:
            Impatient.interrupts.remove(Impatient.calls)
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)

def make(workers, seed):
    return Task(Impatient(2, 1), torch.nn.functional.mse_loss, (torch.ones(9, 2), torch.ones(9, 1)))

def interrupted(workers, seed, *, at: list):
    if Impatient.calls == 0:  # not again in a run that goes on
        Impatient.interrupts |= set(at)
    return make(workers, seed)
"""
USE_TASK = ["task.name=my_task:make", "task.model=null", "task.partition=null"]
INTERRUPTED = ["task.name=my_task:interrupted", *USE_TASK[1:]]


@pytest.fixture
def task(place):
    (place / "my_task.py").write_text(TASK)
    yield
    sys.modules.pop("my_task", None)


def test_ctrl_c_stops_after_the_segment_with_a_checkpoint(place, task, capsys):
    before = signal.getsignal(signal.SIGINT)
    said = call(capsys, "run", "good.yaml", *INTERRUPTED, "task.at=[10]", "--out", "out", code=130)
    assert signal.getsignal(signal.SIGINT) is before
    (checkpoint,) = (place / "out/checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= step <= 9  # of 24: the first calls of the model are trials
    assert "stopping after this segment" in said
    assert f"stopped at step {step}; checkpoint in out/checkpoints/{checkpoint.name}" in said
    assert said.endswith("go on with: decentral run --resume out\n")
    assert json.loads((place / "out/summary.json").read_text())["status"] == "stopped"

    call(capsys, "run", "--resume", "out")
    assert [row["step"] for row in rows_of(place / "out")] == list(range(3, 25, 3))
    assert json.loads((place / "out/summary.json").read_text())["status"] == "done"


def test_a_second_ctrl_c_stops_at_once(place, task, capsys):
    changes = ["task.at=[10, 11]", "record.every=1000", "record.evaluate_every=null",
               "algorithm.period=1000"]  # fmt: skip
    call(capsys, "run", "good.yaml", *INTERRUPTED, *changes, "--out", "out", code=130)
    assert not (place / "out/checkpoints").exists()
    assert json.loads((place / "out/summary.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_told_to_stop_exits_with_130_and_resume_completes(place, number, capsys):
    changes = ["steps=1000000", "record.evaluate_every=null", "record.every=20"]
    command = [sys.executable, "-m", "decentral", "run", "good.yaml", *changes, "--out", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("step "):
                    process.send_signal(number)
                    break
            rest = process.stdout.read()
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    assert "go on with: decentral run --resume out" in rest
    (checkpoint,) = (place / "out/checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    steps = stopped // 20 * 20 + 40
    call(capsys, "run", "--resume", "out", f"steps={steps}")
    assert [row["step"] for row in rows_of(place / "out")] == list(range(20, steps + 1, 20))


def test_topology_says_what_a_ring_is_worth(capsys, place):
    said = call(capsys, "topology", "ring", "-n", "16", "--period", "8")
    facts = [[cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines()]
    facts = {row[0]: row[1] for row in facts if len(row) == 2}
    beta = json.loads(call(capsys, "topology", "ring", "-n", "16", "--json"))["beta"]
    assert facts["beta"] == f"{beta:.6g}"
    assert "\x1b" not in said


def test_topology_as_json_parses_and_holds_the_known_beta(capsys, place):
    facts = json.loads(call(capsys, "topology", "ring", "-n", "16", "--json"))
    assert facts["name"] == "ring"
    assert facts["beta"] == pytest.approx(0.94925, abs=5e-6)


def test_topology_says_what_each_method_costs_and_how_long_its_transient_stage_is(capsys, place):
    asked = ["topology", "ring", "-n", "16", "--period", "8", "--parameters", "1000000"]
    asked += ["--latency-ms", "1", "--bandwidth-gbps", "3.2"]
    rows = [[cell.strip() for cell in line.split("│")] for line in call(capsys, *asked).split("\n")]
    (shown,) = [row[2:7] for row in rows if row[1:2] == ["gossip_pga"]]
    # 10 ns a scalar: gossip 2 * 0.01 + 0.001, all-reduce 0.02 + 0.016, every eighth step
    cost = 7 / 8 * 0.021 + 0.036 / 8
    beta = 1 / 3 + 2 / 3 * math.cos(math.pi / 8)
    iid = 16**3 * beta**4 * ((1 - beta**8) / (1 - beta)) ** 2
    expected = [f"{x:.2g}" for x in (iid, iid * 64, iid * cost, iid * 64 * cost)]
    assert shown == [f"{cost:.3g}", *expected]


def test_topology_says_what_the_theory_does_not_hold_for(capsys, place):
    said = call(capsys, "topology", "star", "-n", "5", "--weights", "uniform")
    assert "c beta               │ for a doubly stochastic W" in said
    assert "infinite" not in said


def test_topology_takes_options_files_and_weights(capsys, place):
    regular = ["random_regular", "degree=3", "-n", "8"]
    facts = json.loads(call(capsys, "topology", *regular, "--json"))
    assert facts["degree"] == {"min": 3, "mean": 3.0, "max": 3}
    house = ["topology", str(ROOT / "topologies/house5.gml"), "--json"]
    assert json.loads(call(capsys, *house))["name"] == "house5.gml"
    uniform = json.loads(call(capsys, *house, "--weights", "uniform"))
    assert (uniform["n"], uniform["weights"]) == (5, "uniform")
    assert not uniform["doubly_stochastic"]


def test_topology_draws_a_picture(capsys, place):
    said = call(capsys, "topology", "ring", "-n", "6", "--plot", "ring.png")
    assert (place / "ring.png").read_bytes().startswith(b"\x89PNG")
    assert said.endswith("drawn to ring.png\n")


def test_json_stays_json_beside_a_picture(capsys, place):
    said = call(capsys, "topology", "ring", "-n", "6", "--json", "--plot", "ring.png")
    assert json.loads(said)["name"] == "ring"
    assert (place / "ring.png").exists()


def test_a_failed_worker_exits_with_1(capsys, place, monkeypatch):
    def fail(*_):
        raise WorkerError("worker 2 [on node a] died at step 7")

    monkeypatch.setattr("decentral.api.execute", fail)
    said = call(capsys, "run", "good.yaml", code=1)
    assert said == "error: worker 2 [on node a] died at step 7\n"  # brackets are no markup
