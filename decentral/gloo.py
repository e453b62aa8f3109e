"""What the threads of torch's gloo backend take from those that compute.

Each group has one that waits for its sockets. While the worker posts a message, its connection is
locked, and a thread that wakes for it asks again and again until it is free
(https://github.com/pytorch/gloo/issues/246). Woken on the processor of the worker itself, it takes
that away, and asks in vain until the scheduler's slice is over: 3 ms, in which nobody works.
"""

import os
from contextlib import suppress
from pathlib import Path

LOOP = "gloo_tcp_loop"  # as torch 2.13 names them
TASKS = Path("/proc/self/task")


def loops() -> list[int]:
    """The threads of this process that wait for gloo's sockets; on Linux alone."""
    found = []
    for task in TASKS.iterdir() if TASKS.exists() else ():
        with suppress(OSError):  # it may have ended
            if (task / "comm").read_text().strip() == LOOP:
                found.append(int(task.name))
    return found


def give_way() -> None:
    """Have `loops` take a processor that is idle or free at the end of a slice, but from nobody."""
    for loop in loops():
        with suppress(OSError):  # it may have ended; a container may forbid it
            if os.sched_getscheduler(loop) == os.SCHED_OTHER:
                os.sched_setscheduler(loop, os.SCHED_BATCH, os.sched_param(0))
