"""Processes forked by the nursery, and how they compare with those that Python starts."""

import json
import os
import shlex
import signal
import subprocess
import sys

import psutil
import pytest

from decentral.nursery import nursery

pytestmark = [
    pytest.mark.slow,  # a nursery imports torch
    pytest.mark.skipif(sys.platform != "linux", reason="there is no nursery but on Linux"),
]

# What a process is, and where it comes from.
LOOK = """
import json, os, random, signal, sys
is_ = {
    "arguments": sys.argv,
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "input": sys.stdin.read(),
    "main": [__name__, __file__, sys.modules["__main__"].__dict__ is globals()],
    "path": sys.path,
    "umask": os.umask(0),
    "niceness": os.nice(0),
    "oom_score": open("/proc/self/oom_score_adj").read(),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "handlers": [str(signal.getsignal(n)).split(" at ")[0] for n in sorted(signal.valid_signals())],
    "files": sorted(os.listdir("/proc/self/fd")),
    "group": os.getpgid(0),
}
comes = {"id": os.getpid(), "parent": os.getppid(), "ready": "torch" in sys.modules}
import numpy as np
comes["drawn"] = [random.random(), np.random.random()]
print(json.dumps([is_, comes]))
print("an error", file=sys.stderr)
"""


@pytest.fixture
def look(tmp_path):
    """Run LOOK by this command, in odd surroundings: what it is, and where it comes from.

    In `is_`, `group` is whether its process group is the one that the command began with.
    """
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    folder = tmp_path / "folder"
    folder.mkdir()

    def surroundings():
        os.setpgid(0, 0)
        os.umask(0o27)
        os.nice(3)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")

    def run(command):
        process = subprocess.Popen(
            [*command, script, "--option=a b", ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"ODD": "\udcff ü\n", "LONG": "x" * 100_000},
            cwd=folder,
            preexec_fn=surroundings,
            text=True,
        )
        output, error = process.communicate("something to read", timeout=60)
        assert error == "an error\n"
        is_, comes = json.loads(output)
        is_["group"] = is_["group"] == process.pid
        comes["forked"] = comes.pop("id") != process.pid
        return is_, comes

    return run


def nurseries_of(process):
    """The nurseries that a process has started: the tests' own cluster may have one."""
    return {p for p in process.children() if "decentral.nursery" in p.cmdline()}


def test_a_forked_process_is_as_if_python_had_started_it(look):
    others = nurseries_of(psutil.Process())
    with nursery() as line:
        (there,) = nurseries_of(psutil.Process()) - others
        ordinary, comes = look([sys.executable])
        assert not comes["ready"]
        assert ordinary["group"]
        assert ordinary["niceness"] >= 3
        drawn = [comes["drawn"]]
        for _ in range(2):
            is_, comes = look(shlex.split(line))
            assert is_ == ordinary
            assert comes["forked"]
            assert comes["parent"] == there.pid
            assert comes["ready"]
            drawn.append(comes["drawn"])
        # Their generators are their own: Python's, and NumPy's, which was seeded before the fork.
        assert all(len(set(numbers)) == 3 for numbers in zip(*drawn, strict=True))

        there.kill()  # Python starts them again
        is_, comes = look(shlex.split(line))
        assert is_ == ordinary
        assert not comes["forked"]
        assert not comes["ready"]
    assert not os.path.exists(os.path.dirname(shlex.split(line)[-1]))


def test_a_nursery_that_has_threads_forks_nothing(look, tmp_path, monkeypatch):
    others = nurseries_of(psutil.Process())
    code = "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True)"
    (tmp_path / "sitecustomize.py").write_text(f"{code}.start()")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        start = nursery()
        line = start.__enter__()
    try:
        _, comes = look(shlex.split(line))
        assert not comes["forked"]
        assert not comes["ready"]
        (there,) = nurseries_of(psutil.Process()) - others
        assert there.is_running()
    finally:
        start.__exit__(None, None, None)


def test_a_nursery_ends_with_a_driver_that_is_killed():
    code = """
import sys
from decentral.nursery import nursery
with nursery() as line:
    print(line, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        address = shlex.split(driver.stdout.readline())[-1]
        (there,) = nurseries_of(psutil.Process(driver.pid))
        driver.kill()
    there.wait(timeout=60)
    assert not os.path.exists(os.path.dirname(address))


def test_workers_on_ray_are_forked(cluster):
    import ray

    def look(_):
        return os.getpid(), dict(os.environ)

    there = {nursery.pid for nursery in nurseries_of(psutil.Process())}
    for number, environment in ray.get([a.ask.remote(look) for a in cluster.actors(2)]):
        process = psutil.Process(number)
        assert process.ppid() in there
        assert process.cmdline()[0].startswith("ray::Actor")
        # Ray's, that of its workers, and not the nursery's.
        assert environment["OMP_NUM_THREADS"] == "1"
        assert "OPENBLAS_NUM_THREADS" not in environment
        assert "raylet" in psutil.Process(int(environment["RAY_RAYLET_PID"])).name()
