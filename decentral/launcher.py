"""What Ray runs in place of Python for a worker of a local cluster: it has the nursery fork one.

    python -IS launcher.py SOCKET default_worker.py OPTION...

The new process takes over all that Ray has given to this one: arguments, environment, folder, open
files, process group. Where the nursery does not answer, this process becomes the worker, which
takes seconds longer. A script of the standard library's alone, that is up in milliseconds.
"""

import json
import os
import signal
import socket
import sys

PATIENCE_S = 45.0  # Ray gives a worker 60 s to come up


def main() -> None:
    address, *arguments = sys.argv[1:]
    if not forked(address, arguments):
        os.execv(sys.executable, [sys.executable, *arguments])


def forked(address: str, arguments: list[str]) -> bool:
    """Whether the nursery that listens there has made a process that runs these arguments."""
    umask = os.umask(0)
    os.umask(umask)
    with open("/proc/self/oom_score_adj") as file:
        oom_score = file.read()
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgid(0),
        "umask": umask,
        "niceness": os.nice(0),
        "oom_score": oom_score,
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }
    message = json.dumps(request).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX) as nursery:
            nursery.settimeout(PATIENCE_S)
            nursery.connect(address)
            sent = socket.send_fds(nursery, [message], [0, 1, 2])
            nursery.sendall(message[sent:])
            return nursery.recv(1) != b""
    except OSError:
        return False


if __name__ == "__main__":
    main()
