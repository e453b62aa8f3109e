"""Workers of a local cluster, forked from one process that has imported what they need.

A worker's process imports torch and half of decentral, which takes seconds of a processor, each
worker again. The nursery does so once, while Ray starts, and has one thread, so that it may fork.
Ray runs launcher.py for each worker, which asks the nursery for a process and hands over what Ray
gave it. Ray itself is not imported before the fork: it reads the environment when it is.
"""

import gc
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from decentral import launcher
from decentral.imports import uncollected

WAIT_S = 10.0  # for a launcher to say what it wants
LONGEST = 107  # bytes of a Unix socket's address
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # OpenBLAS starts some when it is imported


@contextmanager
def nursery() -> Iterator[str | None]:
    """A nursery for the cluster that is started inside.

    What Ray is to run in place of Python, as a line for the shell, or None where there can be no
    nursery. Other users can not reach it: its socket is in a folder of this one's own.
    """
    with tempfile.TemporaryDirectory(prefix="decentral-") as folder:
        address = os.path.join(folder, "nursery")
        if sys.platform != "linux" or len(os.fsencode(address)) > LONGEST:
            yield None
            return
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            process = _start(listener.fileno())
        # The nursery alone listens now: where it dies, launchers are refused at once.
        with process:
            try:
                yield shlex.join([sys.executable, "-IS", launcher.__file__, address])
            finally:
                process.kill()


def _start(listener: int) -> subprocess.Popen[bytes]:
    """The process, which ends when this one does: its standard input is closed then."""
    # Ctrl-C is the driver's to handle, as with Ray's own processes.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "decentral.nursery", str(listener)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener],
            env=os.environ | dict.fromkeys(THREADS, "1"),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        with uncollected():
            import decentral.engines.worker  # noqa: F401
        gc.collect()
        gc.freeze()  # else a collection in a worker writes to, and so copies, all that is shared
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: no zombies
        request, files = _serve(listener)
    _become(request, files)


def _serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a process for each launcher that asks. Returns in such a process, and there alone."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # the driver has died, and removes nothing
            shutil.rmtree(os.path.dirname(listener.getsockname()), ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        with connection:
            files: list[int] = []
            try:
                request = _receive(connection, files)
                # Other threads would not be in the new process, but the locks that they hold.
                if len(os.listdir("/proc/self/task")) == 1:
                    process = os.fork()
                    if process == 0:
                        return request, files
                    _answer(connection, process, request["group"])
            except (OSError, ValueError):
                pass  # the launcher, which has no answer, helps itself
            for file in files:
                os.close(file)


def _receive(connection: socket.socket, files: list[int]) -> dict[str, Any]:
    """A launcher's request. Its standard input, output and error are added to `files`."""
    connection.settimeout(WAIT_S)
    message, received, _, _ = socket.recv_fds(connection, 2**16, 3)
    files += received
    while not message.endswith(b"\n"):
        more = connection.recv(2**16)
        if not more:
            raise ValueError("the launcher is gone")
        message += more
    return json.loads(message)


def _answer(connection: socket.socket, process: int, group: int) -> None:
    """Tell the launcher that the process is there; if it has left, the process must go too."""
    try:
        os.setpgid(process, group)  # Ray kills the whole of it at a worker's end
        connection.sendall(b"1")
    except OSError:
        os.kill(process, signal.SIGKILL)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Be what the launcher would have been."""
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.nice(request["niceness"] - os.nice(0))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(request["oom_score"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    _reseed()
    script = request["arguments"][0]
    sys.argv[:] = request["arguments"]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def _reseed() -> None:
    """NumPy's own generator is seeded when it is imported; Python's is seeded anew at a fork."""
    import numpy as np

    np.random.seed()


if __name__ == "__main__":
    main()
