"""The README keeps its word: its commands run, its output is theirs, its files exist."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import yaml
from test_cli import call

import decentral

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def one_block(language, containing):
    (found,) = [block for block in blocks(language) if containing in block]
    return found


def decentral_commands(containing):
    lines = one_block("bash", containing).splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run the command line here, in this process; what it printed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return functools.partial(call, capsys)


def test_ci_runs_the_test_command_as_it_stands_here():
    command = one_block("bash", "bin/pytest").strip()
    assert command in (ROOT / ".ci/run").read_text().splitlines()


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    tree = one_block("text", "decentral/\n")
    folder, named = Path(), set()
    for line in tree.splitlines():
        name = line.split()[0]
        path = Path(name) if not line.startswith(" ") else folder / name
        folder = path if not line.startswith(" ") else folder
        assert (ROOT / path).exists(), path
        named.add(path.name)
    for module in (ROOT / "decentral").glob("*.py"):
        assert module.name in named or module.name.startswith("__"), module


def test_the_example_of_an_own_task_is_short_and_learns(tmp_path, monkeypatch):
    source = one_block("python", "def spirals")
    assert len(source.splitlines()) < 30
    (tmp_path / "spirals.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load(one_block("yaml", "spirals:spirals"))
    result = decentral.run(config, seed=1)
    assert result.summary["final"]["eval_accuracy"] > 0.95
    with pytest.raises(decentral.UserError, match="did you mean 'points'"):
        decentral.run(config | {"task": config["task"] | {"point": 3}})


def test_the_example_from_python_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(one_block("python", "result.metrics"), {})
    printed = capsys.readouterr().out
    assert "consensus_distance" in printed
    assert "Linear" in printed


@pytest.mark.slow
@pytest.mark.parametrize("arguments", decentral_commands("topology torus"), ids=" ".join)
def test_the_commands_run(arguments, tmp_path, monkeypatch, capsys):
    for folder in ("configs", "topologies"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    pages.run_command(arguments)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_a_run_can_be_diagnosed(run_command, tmp_path):
    run, connect = decentral_commands("decentral connectivity")
    folder = str(tmp_path / "diagnosed")
    changes = "steps=10", "diagnostics.every=10", "checkpoint.every=10"
    run_command(*run[:-1], folder, *changes)
    assert connect[1] == run[-1]
    assert "barrier" in run_command(connect[0], folder, *connect[2:])


@pytest.mark.slow
def test_a_run_can_be_watched(run_command, tmp_path):
    run, watch = decentral_commands("decentral watch")
    folder = str(tmp_path / "watched")
    shown = run_command(*run[:-1], folder, "steps=20")
    assert "event files in" in shown
    assert list((tmp_path / "watched/tensorboard").iterdir())
    assert watch == ["watch", run[-1]]
    last, end = run_command("watch", folder).splitlines()
    assert last in shown.splitlines()
    assert end.startswith("done at step 20")


def test_the_plan_is_what_the_readme_shows(run_command):
    (arguments,) = decentral_commands("decentral plan")
    printed = [line.rstrip() for line in run_command(*arguments).rstrip().splitlines()]
    assert printed == one_block("text", "MB a model").rstrip("\n").splitlines()


def figures(text):
    """The text with times masked, and its other numbers by themselves."""
    text = re.sub(r"written to .*", "written to DIRECTORY", text)
    lines = [line for line in text.splitlines() if "training time" not in line]
    lines = [line for line in lines if "with start-up" not in line]
    text = "\n".join(line.rstrip() for line in lines)
    return re.sub(r"\d+\.\d+", "0", text), [float(x) for x in re.findall(r"\d+\.\d+", text)]


@pytest.mark.slow
def test_the_quickstart_prints_what_the_readme_shows(tmp_path):
    command = one_block("bash", "quickstart.yaml\n").split(".venv/bin/decentral ")[-1].split()
    process = subprocess.run(
        [sys.executable, "-m", "decentral", *command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "80", "OMP_NUM_THREADS": "1", "HOME": "/tmp"},
    )
    assert process.returncode == 0, process.stderr
    printed = process.stdout
    text, numbers = figures(printed)
    shown_text, shown_numbers = figures(one_block("text", "quickstart: gossip_pga"))
    assert text == shown_text
    # Rounding differs between processors, and grows over 400 float32 steps.
    assert numbers == pytest.approx(shown_numbers, rel=0.1, abs=0.02)
