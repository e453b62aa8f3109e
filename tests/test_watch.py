"""`decentral watch` follows runs by their directories."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import call

import decentral
from decentral import UserError
from decentral.config import dump, load
from decentral.progress import Watcher
from decentral.watch import watch


class Run:
    """A run directory that grows as a test says."""

    def __init__(self, folder, quick, metrics=True):
        self.folder = folder
        folder.mkdir()
        (folder / "config.yaml").write_text(dump(load(quick)))
        if metrics:
            self.write("")

    def write(self, text):
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(text)

    def record(self, step, **more):
        self.write(line(step, **more))

    def end(self, status, step, **more):
        final = {"step": step} if step else None
        summary = {"status": status, "final": final, "seconds": 2.5, **more}
        (self.folder / "summary.json").write_text(json.dumps(summary))


def line(step, **more):
    record = {"step": step, "loss": 1 / step, "consensus_distance": 0.5, "period": 4, "lr": 0.1}
    record |= {"bytes_sent": 80, "time_s": 1.5, "sim_time_s": 0.1, "workers": 4}
    return json.dumps(record | more) + "\n"


def shown(step, steps=24):
    return f"step {step:2}/{steps}  loss {1 / step:.4f}  consensus 0.5000"


@pytest.fixture
def run(tmp_path, quick):
    return Run(tmp_path / "run", quick)


def watched(*directories, looks=(), terminal=False):
    """What is printed, line by line, where `looks` happen one after the other between two looks."""
    out, left = io.StringIO(), list(looks)
    console = Console(file=out, width=100, force_terminal=terminal)

    def wait():
        assert left, f"it waits for ever, after {out.getvalue()}"
        left.pop(0)()

    watch(directories, console, wait)
    assert not left, "it ended early"
    return out.getvalue().splitlines()


def test_records_are_shown_as_they_come_until_the_summary(run):
    looks = [
        lambda: run.record(3),
        lambda: None,
        lambda: (run.record(6), run.record(9)),
        lambda: (run.record(12), run.end("done", 12)),
    ]
    expected = [shown(step) for step in (3, 6, 9, 12)]
    assert watched(run.folder, looks=looks) == [*expected, "done at step 12, after 2.5 s"]


def test_it_begins_with_the_last_record_that_is_there(run):
    run.record(3)
    run.record(6)
    looks = [lambda: run.record(9), lambda: run.end("stopped", 9)]
    assert watched(run.folder, looks=looks) == [
        shown(6),
        shown(9),
        "stopped at step 9, after 2.5 s",
    ]


def test_a_run_that_has_no_records_yet_is_waited_for(tmp_path, quick):
    run = Run(tmp_path / "run", quick, metrics=False)
    looks = [lambda: None, lambda: run.record(3), lambda: run.end("done", 3)]
    assert watched(run.folder, looks=looks) == [shown(3), "done at step 3, after 2.5 s"]


def test_a_line_that_is_not_whole_yet_is_waited_for(run):
    text = line(3)
    looks = [
        lambda: run.write(text[:7]),
        lambda: run.write(text[7:]),
        lambda: run.end("done", 3),
    ]
    assert watched(run.folder, looks=looks)[0] == shown(3)


def test_it_says_why_a_run_failed(run):
    run.end("failed", 0, error="worker 2 [on node a] died at step 7")
    assert watched(run.folder) == [
        "failed at step 0, after 2.5 s: worker 2 [on node a] died at step 7"
    ]


def test_a_number_that_is_not_finite_is_shown(run):
    run.record(3, loss=None, eval_loss=None)
    run.end("done", 3)
    assert watched(run.folder)[0] == "step  3/24  loss nan  consensus 0.5000  eval loss nan"


def test_it_follows_a_run_into_a_file_that_is_written_anew(run):
    """A run that was killed goes on from step 3: another file takes the place, at first shorter."""
    for step in (3, 6, 9):
        run.record(step)

    def goes_on():
        anew = run.folder / "anew"
        anew.write_text(line(3) + line(12))
        anew.replace(run.folder / "metrics.jsonl")

    looks = [goes_on, lambda: run.end("done", 12)]
    assert watched(run.folder, looks=looks)[:2] == [shown(9), shown(12)]


def test_several_runs_have_a_line_each_and_all_are_waited_for(tmp_path, quick):
    first, second = Run(tmp_path / "a", quick), Run(tmp_path / "b", quick | {"steps": 50})
    looks = [
        lambda: (first.record(3), second.record(4)),
        lambda: first.end("done", 3),
        lambda: second.record(7),
        lambda: second.end("failed", 7, error="x"),
    ]
    assert watched(first.folder, second.folder, looks=looks) == [
        f"{first.folder}  {shown(3)}",
        f"{second.folder}  {shown(4, 50)}",
        f"{first.folder}  done at step 3, after 2.5 s",
        f"{second.folder}  {shown(7, 50)}",
        f"{second.folder}  failed at step 7, after 2.5 s: x",
    ]


def test_on_a_terminal_there_is_a_bar(run):
    looks = [lambda: run.record(12), lambda: run.end("done", 12)]
    said = "\n".join(watched(run.folder, looks=looks, terminal=True))
    assert "step" in said
    assert "12/24" in said
    assert "loss 0.0833  consensus 0.5000" in said
    assert "\x1b[?25h" in said  # the cursor is back


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"DIR: .* holds no run: it has no config.yaml"):
        watched(tmp_path)


def test_it_shows_what_the_run_itself_shows(quick, tmp_path):
    """The records of a real run, and one that goes on after it was stopped."""
    out, lines = tmp_path / "out", []

    class Stops(Watcher):
        now = 0

        def advance(self, step, record):
            self.now = step

        def wants_stop(self):
            return self.now >= 12

    decentral.run(quick, out=out, watcher=Stops())
    lines = watched(out)
    assert lines[0].startswith("step 12/24  loss ")
    assert "accuracy" in lines[0]
    assert lines[1].startswith("stopped at step 12, after ")

    class Looks(Watcher):
        """Watches from the inside: a run that goes on has no summary until it ends."""

        there = True

        def advance(self, step, record):
            self.there = (out / "summary.json").exists()

    looks = Looks()
    decentral.resume(out, watcher=looks)
    assert not looks.there
    assert watched(out)[1].startswith("done at step 24, after ")


@pytest.mark.slow
def test_ctrl_c_leaves_the_run_alone_and_a_wrong_directory_exits_with_2(run, capsys):
    run.record(3)
    command = [sys.executable, "-m", "decentral", "watch"]
    with subprocess.Popen(
        [*command, str(run.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().rstrip() == shown(3)
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, rest, errors) == (130, "", "")
    assert "holds no run" in call(capsys, "watch", str(Path(run.folder).parent), code=2)
