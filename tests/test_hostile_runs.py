"""A damaged or hostile run directory: `--resume` refuses it or goes on, and runs nothing of it."""

import contextlib
import io
import json
import pickle
import shutil
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_fuzz import BOUNDED, JUNK, paths, put
from test_records import crash, small_config

from decentral import UserError
from decentral.cli import main
from decentral.watch import watch


def command(*arguments):
    """The exit code of the command line, and all that it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
    return code, said.getvalue()


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """A run that ended after step 14, with checkpoints of steps 5 and 10."""
    out = tmp_path_factory.mktemp("crashed") / "run"
    crash(small_config(), out, 14)
    return out


FILES = [
    "metrics.jsonl",
    "split.npz",
    "summary.json",
    "checkpoints/step-00000010/coordinator.json",
    "checkpoints/step-00000010/checksums.json",
    "checkpoints/step-00000010/workers.pt",
]
WATCHED = ["config.yaml", "metrics.jsonl", "summary.json"]
KEYS = [key for key in paths(small_config()) if key != ("steps",)]
LINES = st.sampled_from(
    [b"{}\n", b"[]\n", b"3\n", b"null\n", b'{"step": "x"}\n', b'{"step": null}\n']
)


PLACES = st.floats(0, 1)
CUTS = st.integers(0, 9)
BYTES = st.binary(max_size=9) | LINES


def damaged(content, at, cut, new):
    place = int(at * len(content))
    return content[:place] + new + content[place + cut :]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def goes_on_or_is_refused(crashed, folder, name, change):
    """Resume a copy whose file `name` is changed: where that is refused, nothing else is."""
    run = folder / "run"
    shutil.copytree(crashed, run)
    (run / name).write_bytes(change((run / name).read_bytes()))
    before = contents(run)
    code, said = command("run", "--resume", run)
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert code == 0 or contents(run) == before


@settings(BOUNDED, max_examples=40)
@given(st.sampled_from(FILES), PLACES, CUTS, BYTES)
def test_a_damaged_run_goes_on_or_is_refused_in_a_line(
    crashed, tmp_path_factory, name, at, cut, new
):
    goes_on_or_is_refused(
        crashed,
        tmp_path_factory.mktemp("damaged"),
        name,
        lambda content: damaged(content, at, cut, new),
    )


@settings(BOUNDED, max_examples=60)
@given(st.sampled_from(KEYS), JUNK)
def test_a_run_whose_config_is_another_goes_on_or_is_refused_in_a_line(
    crashed, tmp_path_factory, key, value
):
    def change(content):
        return yaml.safe_dump(put(yaml.safe_load(content), key, value)).encode()

    goes_on_or_is_refused(crashed, tmp_path_factory.mktemp("changed"), "config.yaml", change)


class WaitsForMore(Exception):
    pass


def looks_on(run, terminal):
    """Watch a run for three looks, which end it where there is a summary, and only there."""
    looks = iter(range(2))

    def wait():
        if next(looks, None) is None:
            raise WaitsForMore

    console = Console(file=io.StringIO(), force_terminal=terminal)
    try:
        watch([run], console, wait)
    except UserError:
        return
    except WaitsForMore:
        assert not (run / "summary.json").exists()
    else:
        assert (run / "summary.json").exists()


@settings(BOUNDED, max_examples=100)
@given(st.sampled_from(WATCHED), PLACES, CUTS, BYTES, st.booleans())
def test_a_damaged_run_can_be_watched_or_is_refused(
    crashed, tmp_path_factory, name, at, cut, new, terminal
):
    run = shutil.copytree(crashed, tmp_path_factory.mktemp("damaged") / "run")
    (run / name).write_bytes(damaged((run / name).read_bytes(), at, cut, new))
    looks_on(run, terminal)


@settings(BOUNDED, max_examples=100)
@given(st.sampled_from(["metrics.jsonl", "summary.json"]), st.integers(0, 9), JUNK, st.booleans())
def test_a_run_that_holds_other_values_can_be_watched(
    crashed, tmp_path_factory, name, place, value, terminal
):
    run = shutil.copytree(crashed, tmp_path_factory.mktemp("changed") / "run")
    lines = (run / name).read_text().splitlines() if name == "metrics.jsonl" else None
    row = json.loads(lines[-1] if lines else (run / name).read_text())
    (run / name).write_text(json.dumps(row | {list(row)[place % len(row)]: value}) + "\n")
    looks_on(run, terminal)


@pytest.mark.parametrize("name", WATCHED)
def test_a_folder_in_the_place_of_a_file_is_told(crashed, tmp_path, name):
    run = shutil.copytree(crashed, tmp_path / "run")
    (run / name).unlink()
    (run / name).mkdir()
    code, said = command("watch", run)
    assert code == (0 if name == "summary.json" else 2)
    assert "Is a directory" in said


@pytest.mark.parametrize("line", ["{}", "[]", "3", '{"step": "x"}', "\udcff"])
def test_a_metrics_row_that_is_none_is_left_out_and_those_before_it_stay(crashed, tmp_path, line):
    run = tmp_path / "run"
    shutil.copytree(crashed, run)
    metrics = run / "metrics.jsonl"
    before = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(before[:2]) + line.encode(errors="surrogateescape") + b"\n")
    code, said = command("run", "--resume", run)
    assert code == 0, said
    assert metrics.read_bytes().splitlines(keepends=True)[:2] == before[:2]
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == 20


def test_a_pickle_in_the_place_of_a_state_is_not_run(crashed, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(crashed, run)

    class Touch:
        def __reduce__(self):
            return open, (str(mark), "w")

    for file in run.glob("checkpoints/*/workers.pt"):
        file.write_bytes(pickle.dumps(Touch()))
    code, said = command("run", "--resume", run)
    assert code == 2, said
    assert not mark.exists()


def test_a_module_in_the_run_directory_is_not_imported(crashed, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(crashed, run)
    (run / "trap.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"task": {"name": "trap:task"}}))
    code, said = command("run", "--resume", run)
    assert code == 2, said
    assert not mark.exists()
    assert "trap" not in sys.modules
