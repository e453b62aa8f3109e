"""Gloo's threads give way to the worker's."""

import os

import numpy as np
import pytest
from processes import run_on_ranks

from decentral import gloo
from decentral.peer import PeerComm, own_group

pytestmark = pytest.mark.skipif(
    not hasattr(os, "SCHED_BATCH"), reason="the scheduler's policies are Linux's"
)


def policies_under_a_comm(rank: int) -> tuple[list[int], int]:
    """Of gloo's loops, the default group's and another's, and of the thread that computes."""
    own = own_group([np.arange(2)])
    kept = gloo.loops()
    if kept:
        os.sched_setscheduler(kept[0], os.SCHED_IDLE, os.sched_param(0))
    PeerComm(None, own)
    return [os.sched_getscheduler(loop) for loop in gloo.loops()], os.sched_getscheduler(0)


def test_the_loops_of_all_groups_give_way_and_the_worker_does_not():
    for policies, worker in run_on_ranks(2, policies_under_a_comm):
        if not policies:
            pytest.skip("this torch names gloo's threads otherwise")
        assert policies == [os.SCHED_IDLE, os.SCHED_BATCH]
        assert worker == os.SCHED_OTHER


def test_a_thread_that_has_ended_is_no_error(monkeypatch):
    with open("/proc/sys/kernel/pid_max") as file:
        beyond = int(file.read())  # one more than any may have
    monkeypatch.setattr(gloo, "loops", lambda: [beyond])
    gloo.give_way()
