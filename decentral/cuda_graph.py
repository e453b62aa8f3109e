"""What a GPU is asked to do, kept as a CUDA graph and asked for again in one call.

A pass over small models is a few hundred kernels of some microseconds, each of which Python takes
longer to launch than it runs. A graph launches all of them at once.
"""

import logging
import pickle
import random
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Each keeps the memory of its own arguments, and all share that of what is between.
MOST_GRAPHS = 8


Do = Callable[[tuple[Tensor, ...]], Tensor]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    arguments: tuple[Tensor, ...]
    result: Tensor


class CudaGraphs:
    """Calls of a function on a GPU, by graphs from the third of a kind on.

    The first is watched: a function that waits for the GPU (`.item()`, a shape that depends on
    values, a copy from the host), or that draws or counts on the host, would do so in its graph
    once and for all, so it gets none, with one line in the log. The second is recorded. A graph
    draws what the function by itself would, from the seed of torch's generator at the call.

    modules: whose plain attributes the function must leave as they are.
    """

    def __init__(self, modules: nn.Module):
        self._modules = modules
        self._refused = False
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, do: Do, arguments: tuple[Tensor, ...], key: Hashable) -> Tensor:
        """`do(arguments)`, a new tensor. `do` is the same for the same key, and whatever else it
        reads or writes stays where it is in memory."""
        key = key, tuple((tensor.shape, tensor.dtype) for tensor in arguments)
        if self._refused:
            return do(arguments)
        if key in self._graphs:
            return self._replay(key, arguments)
        if key not in self._seen:
            self._seen.add(key)
            return self._watched(do, arguments)
        if len(self._graphs) < MOST_GRAPHS and self._record(do, arguments, key):
            return self._replay(key, arguments)
        return do(arguments)

    def _replay(self, key: Hashable, arguments: tuple[Tensor, ...]) -> Tensor:
        recorded = self._graphs[key]
        for static, tensor in zip(recorded.arguments, arguments, strict=True):
            static.copy_(tensor)
        recorded.graph.replay()
        return recorded.result.clone()

    def _record(self, do: Do, arguments: tuple[Tensor, ...], key: Hashable) -> bool:
        """Whether there is a graph now."""
        graph, static = torch.cuda.CUDAGraph(), tuple(tensor.clone() for tensor in arguments)
        stream, generator = torch.cuda.current_stream(), _generator()
        before = generator.clone_state()
        try:
            # Other threads, such as readers, may ask the GPU for memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = do(static)
        except RuntimeError as error:
            # torch leaves its own stream, and a generator that waits for the recording's end.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(before)
            self._refuse(_first_line(error))
            return False
        self._graphs[key] = _Graph(graph, static, result)
        return True

    def _watched(self, do: Do, arguments: tuple[Tensor, ...]) -> Tensor:
        drawn, counted = _host_draws(), self._counts()
        generator = _generator()
        before = generator.get_state()
        try:
            with _waiting_forbidden():
                result = do(arguments)
        except RuntimeError as error:
            self._refuse(_first_line(error))  # if it is of another kind, it comes again
            generator.set_state(before)
            return do(arguments)
        if _host_draws() != drawn:
            self._refuse("the model draws on the host, not on the GPU")
        elif self._counts() != counted:
            self._refuse("the model changes an attribute of its own at each pass")
        return result

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self._graphs.clear()
        log.warning("without a CUDA graph, kernels are launched one by one: %s", reason)

    def _counts(self) -> list[dict[str, Any]]:
        plain = (bool, int, float, complex, str, bytes, type(None))
        return [
            {name: value for name, value in vars(module).items() if isinstance(value, plain)}
            for module in self._modules.modules()
        ]


def _generator() -> torch.Generator:
    """From which kernels draw."""
    return torch.cuda.default_generators[torch.cuda.current_device()]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _host_draws() -> tuple[object, ...]:
    """The state of each generator on the host that a model may draw from."""
    of_numpy = pickle.dumps(np.random.get_state(legacy=False))
    return random.getstate(), of_numpy, torch.default_generator.get_state().numpy().tobytes()


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """In it torch raises RuntimeError where the host would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see all: what is left, a recording does
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
