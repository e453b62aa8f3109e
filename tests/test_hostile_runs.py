"""A damaged or hostile run directory: `--resume` refuses it or goes on, and runs nothing of it."""

import contextlib
import io
import json
import pickle
import shutil
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_records import crash, small_config

from decentral.cli import main


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
LINES = st.sampled_from(
    [b"{}\n", b"[]\n", b"3\n", b"null\n", b'{"step": "x"}\n', b'{"step": null}\n']
)


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.sampled_from(FILES), st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9) | LINES)
def test_a_damaged_run_goes_on_or_is_refused_in_a_line(
    crashed, tmp_path_factory, name, at, cut, put
):
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(crashed, run)
    content = (run / name).read_bytes()
    place = int(at * len(content))
    (run / name).write_bytes(content[:place] + put + content[place + cut :])
    code, said = command("run", "--resume", run)
    assert code in (0, 2), said
    assert "Traceback" not in said


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
