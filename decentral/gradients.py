"""Where gradients come from: the task's loss on a worker's own batch, over a flat buffer.

`ModuleGradient` is one worker: the module's parameters are views into [D], and it runs the plain
forward and backward pass. `StackedGradient` is all workers of the simulator: one forward and
backward pass over [n, D] through torch.func.vmap. Replica is the caller of both.

Both take `accumulate`, the micro-batches of a step, whose mean loss and mean gradient they give
(micro-batch m of step k is the sampler's batch k * accumulate + m), `clip_norm`, see `clip_`, and
`autocast`, a lower precision for forward pass and loss: products run in it, while parameters,
gradients and what the optimizer remembers keep the run's dtype. `losses` gives the losses alone,
for methods that need no gradient.
"""

import contextlib
import functools
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from decentral.batches import Batches
from decentral.comm import accumulation_dtype
from decentral.cuda_graph import CudaGraphs
from decentral.replica import squared_norm
from decentral.stopwatch import Stopwatch, timed
from decentral.tasks import Reader, Sampler, Task, read

log = logging.getLogger(__name__)

Mode = Literal["set", "add", "none"]  # what becomes of a micro-batch's gradient

# How many workers one pass takes: what autograd keeps of them all, and the largest tensor among it,
# which the next operation reads. More would hardly save any more of what a pass costs by itself,
# and would leave the processor's caches. Constants, where a timing at the start of a run would find
# the best: with who goes together change the model's own draws, and rounding where a worker goes
# alone, so that two runs of one seed would not be the same. benchmarks/simulator_rate.py has half
# and twice as many beside it.
PASS_BYTES = {"cpu": 2**27, "cuda": 2**33}
TENSOR_BYTES = {"cpu": 5 * 2**22, "cuda": 2**33}
# Stacked convolutions become one grouped convolution, which slows down with many groups: an H200
# takes 64 in a third of the time of four times 16 (benchmarks/gpu_rate.py).
CHUNK_WORKERS_WITH_CONVOLUTIONS = 64
# Of stacked weights, from which to look for their gradient's place takes less than to copy it.
LEAST_BYTES_IN_PLACE = 2**20
# Of images on a CPU, from which pooling is faster with the channels last.
LEAST_CHANNELS_LAST = 4
# In one CUDA graph: more of them keep the GPU busy by themselves, and a graph grows with each.
MOST_PASSES_OF_A_GRAPH = 64


class Layout:
    """Where named tensors lie in a flat buffer's last axis, one after another."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.size = sum(tensor.numel() for tensor in tensors.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> view of `flat`, [..., D] -> [..., *shape]."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            views[name] = flat[..., start:stop].unflatten(-1, shape or (1,))
            if not shape:
                views[name] = views[name].squeeze(-1)
            start = stop
        return views

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The tensors' values in a new buffer, [D]."""
        flat = torch.empty(self.size, dtype=dtype)
        for name, view in self.views(flat).items():
            view.copy_(tensors[name].detach())
        return flat


class FlatModel:
    """A module whose trainable parameters, and float buffers, live in flat vectors.

    `parameters` and `buffers` say where; a shared parameter is there once, a frozen one not at
    all. Integer buffers, counters as a rule, are each worker's own: they are never averaged.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str = "cpu"):
        self.module = module.to(device=device, dtype=dtype).train()
        self.dtype = dtype
        self.device = device
        self.takes_vmap: bool | None = None  # until somebody has tried
        # What a stacked worker's pass keeps, the largest of it, and what it keeps for each sample;
        # known where vmap was tried.
        self.pass_bytes = self.tensor_bytes = self.sample_bytes = 0
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        floating = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        self.parameters = Layout(trainable)
        self.buffers = Layout(floating)
        self.x = self.parameters.flatten(trainable, dtype).to(device)  # [D], as initialised
        self.b = self.buffers.flatten(floating, dtype).to(device)  # [B]

    def __call__(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: list[Tensor]
    ) -> Tensor:
        """The module's output with these parameters and buffers in the place of its own."""
        return functional_call(self.module, (parameters, buffers), tuple(inputs))

    def cast(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A batch on the model's device; floating-point tensors in its dtype."""
        return tuple(
            tensor.to(
                self.device,
                self.dtype if tensor.is_floating_point() else None,
                non_blocking=True,  # from pinned memory, that is
            )
            for tensor in batch
        )

    def counters(self) -> dict[str, Tensor]:
        """The module's own integer buffers."""
        return {n: b for n, b in self.module.named_buffers() if not b.is_floating_point()}

    def state_dict(
        self, x: Tensor, buffers: Tensor, counters: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The module's state_dict, on the CPU, with x [D], buffers [B] and counters filled in."""
        views = self.parameters.views(x) | self.buffers.views(buffers) | counters
        tied = {id(p): views[name] for name, p in self.module.named_parameters() if name in views}
        state = {}
        for name, own in self.module.state_dict(keep_vars=True).items():
            value = views[name] if name in views else tied.get(id(own))
            state[name] = (own if value is None else value).detach().cpu().clone()
        return state


class ModuleGradient:
    """One worker. The module is trained in place: its parameters and buffers become views.

    compiled: by torch.compile. readers: processes that read batches ahead.

    `batches` and `sampler` may be set anew between two steps. Where `measures` is set, a call
    leaves in `variance`, [], the variance of its batches' gradients; it must have two at least.
    `slowdown`, if set, says how many times as long as it takes a call at a step is to last.
    """

    def __init__(
        self,
        model: FlatModel,
        task: Task,
        sampler: Sampler,
        clip_norm: float | None = None,
        accumulate: int = 1,
        autocast: str | None = None,
        compiled: bool = False,
        readers: int = 0,
    ):
        self._model, self._task = model, task
        self._readers = readers
        self.sampler = sampler
        self._forward = torch.compile(model.module) if compiled else model.module
        self._clip_norm, self._autocast = clip_norm, autocast
        self.batches, self.measures = Batches(accumulate), False
        self.slowdown: Callable[[int], float] | None = None
        self.variance: Tensor | None = None
        self.stopwatch = Stopwatch(model.device)
        self.parameters = model.x.clone()
        self.buffers = model.b.clone()
        self.value = torch.zeros_like(self.parameters)
        gradients = model.parameters.views(self.value)
        for name, view in model.parameters.views(self.parameters).items():
            parameter = model.module.get_parameter(name)
            parameter.data = view
            parameter.grad = gradients[name]
        for name, view in model.buffers.views(self.buffers).items():
            model.module.get_buffer(name).data = view
        self.counters = model.counters()

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._read = Reader(self._task.train, sampler, self._readers, self._model.device != "cpu")

    @timed
    def __call__(self, step: int) -> Tensor:
        with self._slowed(step):
            return self._gradient(step)

    def _gradient(self, step: int) -> Tensor:
        self.parameters.grad = self.value
        self.value.zero_()
        losses, square = [], 0.0
        for micro in self.batches.of(step):
            before = self.value.clone() if self.measures else None
            with torch.enable_grad():
                loss = self._loss(micro)
                loss.backward()
            losses.append(loss.detach())
            if before is not None:
                square += squared_norm(self.value - before)
        if self.measures:
            self.variance = _variance(square, self.value, len(losses))
        return _finish(losses, self.value, self._clip_norm)

    def of(self, rows: Sequence[int], steps: Sequence[int]) -> Tensor:
        """As a call at the step of the one worker that there is; the loss, [1]."""
        (step,) = steps
        return self(step).unsqueeze(0)

    @timed
    def losses(self, step: int) -> Tensor:
        with self._slowed(step), torch.no_grad():
            return torch.stack([self._loss(micro) for micro in self.batches.of(step)]).mean(0)

    @contextlib.contextmanager
    def _slowed(self, step: int) -> Iterator[None]:
        """Make what is inside last `slowdown` times as long."""
        factor = 1.0 if self.slowdown is None else self.slowdown(step)
        began = self._now_s() if factor > 1 else 0.0
        yield
        if factor > 1:
            time.sleep((factor - 1) * (self._now_s() - began))

    def _now_s(self) -> float:
        """The time at which all is computed that was asked for."""
        if self._model.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _loss(self, micro: int) -> Tensor:
        batch = self._model.cast(self._read(micro))
        *inputs, target = (tensor[0] for tensor in batch)
        seed_generators(self.sampler.seed(micro), self._model.device)
        with lower_precision(self._autocast, self._model.device):
            return self._task.loss(self._forward(*inputs), target)


class StackedGradient:
    """All n workers at once, [n, D]. All start from the same model.

    Gradients are taken with respect to per-layer views of the flat buffer, so that autograd
    never sees the flat tensor. A pass takes `chunk` workers, see `workers_at_once`; where that is
    one, as for a large model, it is a plain pass. So it is for a model that vmap cannot take, with
    one line in the log. `batches`, `measures` and `variance`, [n], are as in ModuleGradient.
    Autocast makes it a loop too: vmap takes a linear layer apart, and autocast then
    lowers its product but not the sum with the bias, which is another rounding than a worker's.

    cuda_graph: on a GPU, all passes of a micro-batch as one CUDA graph, where the model permits.
    """

    def __init__(
        self,
        model: FlatModel,
        task: Task,
        sampler: Sampler,
        n: int,
        clip_norm: float | None = None,
        accumulate: int = 1,
        autocast: str | None = None,
        cuda_graph: bool = False,
    ):
        self._model, self._task, self.sampler = model, task, sampler
        self._clip_norm, self._autocast = clip_norm, autocast
        self.batches, self.measures = Batches(accumulate), False
        self.variance: Tensor | None = None
        self._square = torch.zeros(n, dtype=torch.float64, device=model.device)
        self.parameters = model.x.repeat(n, 1)
        self.buffers = model.b.repeat(n, 1)
        self.value = torch.zeros_like(self.parameters)
        self._parameters = model.parameters.views(self.parameters)
        self._gradients = model.parameters.views(self.value)
        self.counters = {
            name: counter.expand(n, *counter.shape).clone()
            for name, counter in model.counters().items()
        }
        self._buffers = model.buffers.views(self.buffers) | self.counters
        if model.takes_vmap is None:
            model.takes_vmap = self._takes_vmap()
            if model.takes_vmap and autocast is not None:
                log.warning("autocast rounds otherwise under vmap, so workers run one by one")
        self.chunk = 1  # workers at once; one goes without vmap
        if model.takes_vmap and autocast is None:
            self.chunk = workers_at_once(model, n)
            kept_mb = model.pass_bytes / 1e6
            log.info("%d of %d workers at once: each keeps %.3g MB", self.chunk, n, kept_mb)
        few = n <= MOST_PASSES_OF_A_GRAPH * self.chunk
        graphs = cuda_graph and few and model.device != "cpu"
        self._graphs = CudaGraphs(model.module) if graphs else None

    def __call__(self, step: int) -> Tensor:
        self.parameters.grad = self.value
        self._square.zero_()
        losses = [self._pass(micro, mode) for micro, mode in self._micros(step)]
        if self.measures:
            self.variance = _variance(self._square, self.value, len(losses))
        return _finish(losses, self.value, self._clip_norm)

    def of(self, rows: Sequence[int], steps: Sequence[int]) -> Tensor:
        """As a call, for the workers `rows` alone, each at a step of its own; their losses, [k].

        Their rows of `value` are filled, the others stay as they are.
        """
        each = zip(*(self._micros(step) for step in steps), strict=True)  # micro-batch by batch
        losses = [self._pass([micro for micro, _ in micros], micros[0][1], rows) for micros in each]
        gradient = self.value[rows]
        loss = _finish(losses, gradient, self._clip_norm)
        self.value[rows] = gradient
        return loss

    def losses(self, step: int) -> Tensor:
        losses = [self._pass(micro, "none") for micro, _ in self._micros(step)]
        return torch.stack(losses).mean(0)

    def _micros(self, step: int) -> list[tuple[int, Mode]]:
        """The micro-batches of a step, and what becomes of the gradient of each."""
        micros = self.batches.of(step)
        return [(micro, "set" if micro == micros.start else "add") for micro in micros]

    def _pass(
        self, micro: int | Sequence[int], mode: Mode, rows: Sequence[int] | None = None
    ) -> Tensor:
        """One micro-batch, of all workers or of `rows`, each its own: their losses, [n] or [k].

        `value` is set to the gradients, or they are added to it.
        """
        batch = self._batch(micro, rows)
        first = micro if isinstance(micro, int) else max(micro)
        seed_generators(self.sampler.seed(first), self._model.device)
        if self._graphs is None or rows is not None:
            return self._passes(batch, mode, rows)
        return self._graphs(lambda b: self._passes(b, mode), batch, (mode, self.measures))

    def _passes(
        self, batch: tuple[Tensor, ...], mode: Mode, rows: Sequence[int] | None = None
    ) -> Tensor:
        """`_pass` on a batch that is drawn."""
        losses = []
        for start in range(0, len(batch[0]), self.chunk):
            taken = slice(start, start + self.chunk)  # of the batch
            where = taken if rows is None else rows[taken]  # of the parameters
            leaves = {
                name: view[where].detach().requires_grad_(mode != "none")
                for name, view in self._parameters.items()
            }
            # Under vmap, BatchNorm updates contiguous buffers alone: a strided view would stay.
            buffers = {name: view[where].clone() for name, view in self._buffers.items()}
            with torch.set_grad_enabled(mode != "none"):
                loss = self._losses(leaves, buffers, tuple(tensor[taken] for tensor in batch))
                total = loss.sum()
            if mode == "set" and rows is None and not self.measures:
                gradients = {name: view[where] for name, view in self._gradients.items()}
                _fill(gradients, total, leaves)
            elif mode != "none":
                parts = torch.autograd.grad(total, tuple(leaves.values()), materialize_grads=True)
                for view, part in zip(self._gradients.values(), parts, strict=True):
                    view[where] = part if mode == "set" else view[where] + part
                    if self.measures:
                        self._square[where] += squared_norm(part.flatten(1))
            for name, view in self._buffers.items():
                view[where] = buffers[name]
            losses.append(loss.detach())
        return torch.cat(losses)

    def _batch(
        self, micro: int | Sequence[int], rows: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        def drawn(of: Callable[[int], Tensor]) -> Tensor:
            """What the sampler draws for the workers that are asked for, a row each."""
            if isinstance(micro, int):
                return of(micro)
            assert rows is not None, "each of them has its own"
            each = {m: of(m) for m in sorted(set(micro))}
            return torch.stack([each[m][row] for m, row in zip(micro, rows, strict=True)])

        sampler = self.sampler
        seeds = functools.partial(drawn, sampler.sample_seeds)
        return self._model.cast(read(self._task.train, drawn(sampler.indices), seeds))

    def _losses(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, ...]
    ) -> Tensor:
        if self.chunk > 1:
            return self._stacked(parameters, buffers, batch)
        parameters, buffers = (
            {name: view[0] for name, view in views.items()} for views in (parameters, buffers)
        )
        with lower_precision(self._autocast, self._model.device):
            loss = self._loss(parameters, buffers, tuple(tensor[0] for tensor in batch))
        return loss.unsqueeze(0)

    def _stacked(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, ...]
    ) -> Tensor:
        # Not kept: it would hold this object, and with it n models, until garbage is collected.
        vmapped = vmap(self._loss, randomness="different")
        with StackedLayers():
            return vmapped(parameters, buffers, batch)

    def _loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, ...]
    ) -> Tensor:
        *inputs, target = batch
        return self._task.loss(self._model(parameters, buffers, inputs), target)

    def _takes_vmap(self) -> bool:
        """Try one worker's batch, on copies, and see what it keeps: `pass_bytes` of the model.

        The reason for a refusal is said once in the log.
        """
        parameters, buffers = (
            {name: view[:1].clone() for name, view in views.items()}
            for views in (self._parameters, self._buffers)
        )
        for leaf in parameters.values():
            leaf.requires_grad_()
        saved: list[weakref.ref[Tensor]] = []  # by autograd, which may let go of some of them again

        def save(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()  # for an output that its own node saves would hold that node
            saved.append(weakref.ref(tensor))
            return tensor

        batch = tuple(tensor[:1].clone() for tensor in self._batch(0))
        try:
            with torch.enable_grad(), saved_tensors_hooks(save, lambda tensor: tensor):
                loss = self._stacked(parameters, buffers, batch)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0]
            log.warning("vmap cannot take this model, so workers run one by one: %s", reason)
            return False
        blocks = [t.untyped_storage() for t in (ref() for ref in saved) if t is not None]
        kept = {block.data_ptr(): block.nbytes() for block in blocks}
        del loss, blocks  # it holds what is kept
        gradient = self.value[0].nbytes  # to which the gradients are copied
        self._model.pass_bytes = sum(kept.values()) + gradient
        self._model.tensor_bytes = max([gradient, *kept.values()])
        self._model.sample_bytes = math.ceil(sum(kept.values()) / len(batch[0][0]))
        return True


def _fill(gradients: dict[str, Tensor], total: Tensor, leaves: dict[str, Tensor]) -> None:
    """Set `gradients`, views of a flat buffer, to those of `total` by `leaves`.

    A weight's that is a product of what came into its layer and the gradient of what went out is
    computed where it is to be; others are copied there.
    """
    products = _products(total, leaves) if total.is_cpu else {}
    others = [name for name in leaves if name not in products]
    edges = [GradientEdge(product.node, 0) for product in products.values()]
    inputs: Any = (*(leaves[name] for name in others), *edges)  # of both kinds, which torch takes
    parts = torch.autograd.grad(total, inputs, materialize_grads=True)
    for name, part in zip(others, parts, strict=False):
        _copy(gradients[name], part)
    for (name, product), outgoing in zip(products.items(), parts[len(others) :], strict=True):
        torch.bmm(outgoing, product.incoming.mT, out=gradients[name])


# Nodes of autograd behind which the same numbers lie in the same order.
SHAPES_ALONE = ("ExpandBackward0", "ReshapeAliasBackward0", "ViewBackward0")


class _Product(NamedTuple):
    """W X of stacked workers, W [n, out, in] a leaf: autograd's node of it; X, [n, in, batch]."""

    node: Node
    incoming: Tensor


def _products(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, _Product]:
    """Of each leaf whose only use in `total` is as W of such a product, and that is large."""
    large = {
        name: leaf
        for name, leaf in leaves.items()
        # With its last size kept, only its shape was touched: `expand` repeats what is of size 1.
        if leaf.dim() == 3 and leaf.shape[1] > 1 and leaf.nbytes >= LEAST_BYTES_IN_PLACE
    }
    if not large or total.grad_fn is None:
        return {}
    users: dict[Node, list[Node]] = {}  # of each node: those that `total` comes by it through
    ahead = [total.grad_fn]
    while ahead:
        node = ahead.pop()
        for before, _ in node.next_functions:
            if before is not None:
                if before not in users:
                    ahead.append(before)
                users.setdefault(before, []).append(node)
    products = {}
    for name, leaf in large.items():
        node, user = get_gradient_edge(leaf).node, None
        while len(users.get(node, ())) == 1:
            (user,) = users[node]
            if user.name() not in SHAPES_ALONE:
                break
            node = user
        if user is None or user.name() != "BmmBackward0" or user.next_functions[0][0] is not node:
            continue
        incoming = cast(Any, user)._saved_mat2.detach()
        if leaf.shape[::2] == incoming.shape[:2]:
            products[name] = _Product(user, incoming)
    return products


def _copy(into: Tensor, part: Tensor) -> None:
    """As `copy_`. In host memory by NumPy: of rows that lie apart each goes by memcpy there, in
    three quarters of the time that torch takes."""
    if into.is_cpu:
        if into.dtype == torch.bfloat16:  # which NumPy does not know
            into, part = into.view(torch.int16), part.view(torch.int16)
        np.copyto(into.numpy(), part.numpy())
    else:
        into.copy_(part)


class StackedLayers(TorchFunctionMode):
    """Layers of stacked workers in the order, of memory and of layers, that is fast.

    The numbers are the same.

    Linear layers are (W X' + b)', where torch has X W' + b: the gradient of each W then comes as it
    lies in memory. The other way it comes transposed, and to copy it into the flat buffer takes
    longer than to compute it.

    A ReLU that max pooling follows comes after it, on what is left: the largest number of a window
    is the same one, or the gradient of all is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rectified: tuple[Tensor, Tensor] | None = None  # into and out of the ReLU just passed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        rectified, self._rectified = self._rectified, None  # a later function may write into it
        if func is nn.functional.linear and not options and args[0].dim() == 2:
            x, weight, *bias = args
            if not bias or bias[0] is None:
                return torch.mm(weight, x.T).T
            return torch.addmm(bias[0].unsqueeze(1), weight, x.T).T
        if func in RELUS and not any(options.values()) and len(args) == 1 and _has_channels(*args):
            (x,) = args
            self._rectified = x, func(x)
            return self._rectified[1]
        if func is nn.functional.max_pool2d and not options.get("return_indices"):
            x, *window = args
            if rectified is not None and rectified[1] is x:
                return torch.relu(_max_pool2d(rectified[0], *window, **options))
            if _has_channels(x):
                # A threshold, as said there, that changes no number.
                pooled = _max_pool2d(x, *window, **options)
                return nn.functional.threshold(pooled, -math.inf, -math.inf)
        return func(*args, **options)


RELUS = (nn.functional.relu, torch.relu, Tensor.relu)


def _has_channels(x: Tensor) -> bool:
    """Whether these are images of which pooling is faster with the channels last."""
    return x.is_cpu and x.dim() == 4 and x.shape[1] >= LEAST_CHANNELS_LAST


def _max_pool2d(x: Tensor, *window: Any, **options: Any) -> Tensor:
    """With the channels last in memory, along which torch's kernel for CPUs is vectorised: a tenth
    of the time.

    A threshold is to come after it: its gradient lies in memory as this does, and not as what comes
    after gives it, with which the pooling's own gradient would take five times as long.
    """
    channels_last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return nn.functional.max_pool2d(channels_last, *window, **options)


def workers_at_once(model: FlatModel, n: int) -> int:
    """How many of n workers a stacked pass takes: a function of the model and its batch alone.

    As many as PASS_BYTES of what autograd keeps and TENSOR_BYTES of the largest tensor hold, at
    least one, and no more than CHUNK_WORKERS_WITH_CONVOLUTIONS where there are any; the n in as
    equal parts as can be.
    """
    device = model.device
    most = min(
        PASS_BYTES[device] // max(1, model.pass_bytes),
        TENSOR_BYTES[device] // max(1, model.tensor_bytes),
    )
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in model.module.modules()):
        most = min(most, CHUNK_WORKERS_WITH_CONVOLUTIONS)
    return math.ceil(n / math.ceil(n / max(1, most)))


def lower_precision(autocast: str | None, device: str) -> torch.autocast:
    """A context in which torch's products run in the dtype of this name; None for one without.

    No cache of lowered weights: it takes leaves of the graph alone, which a worker's parameters
    are on their own and not among stacked ones, and adds up a shared weight's gradient otherwise.
    """
    dtype = None if autocast is None else getattr(torch, autocast)
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)


def clip_(gradient: Tensor, max_norm: float) -> None:
    """Scale each worker's gradient, [..., D], to the norm `max_norm` where it is above.

    g_i <- g_i min(1, max_norm / (||g_i|| + 1e-6)), ||g_i|| over all parameters of worker i: what
    torch.nn.utils.clip_grad_norm_ does to a model.
    """
    dtype = accumulation_dtype(gradient.dtype)
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True, dtype=dtype)
    gradient.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))


def _variance(square: Tensor | float, total: Tensor, batches: int) -> Tensor:
    """1/(M-1) sum_m ||g_m - gbar||^2, from sum_m ||g_m||^2 and the sum of all M gradients."""
    return (square - squared_norm(total) / batches) / (batches - 1)


def _finish(losses: list[Tensor], gradient: Tensor, clip_norm: float | None) -> Tensor:
    """From the sum over micro-batches to the step's own: means, clipped. Returns the mean loss."""
    if len(losses) > 1:
        gradient.div_(len(losses))
    if clip_norm is not None:
        clip_(gradient, clip_norm)
    return torch.stack(losses).mean(0)


def seed_generators(seed: int, device: str) -> None:
    """Make what the model draws itself, such as dropout, depend on the step alone.

    torch.manual_seed does the same for every device there may be, and takes ten times as long.
    """
    torch.default_generator.manual_seed(seed)
    if device != "cpu":
        torch.cuda.manual_seed(seed)
