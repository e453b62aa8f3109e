"""Imports that take less time: for processes of decentral's own, whose start somebody waits for."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: a fifth of the time that torch and what goes with it take to
    import would go into looking through what they make, nearly all of which stays."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
