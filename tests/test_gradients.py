"""All workers at once are each worker alone: stacked gradients against the plain backward pass."""

import contextlib
import logging
import math
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import decentral
from decentral.gradients import (
    CHUNK_WORKERS_WITH_CONVOLUTIONS,
    PASS_BYTES,
    FlatModel,
    Layout,
    ModuleGradient,
    StackedGradient,
    StackedLayers,
    _products,
    workers_at_once,
)
from decentral.tasks import Sampler, Task
from decentral.tasks.models import cnn, mlp

SAMPLES, BATCH = 40, 6


class Tied(nn.Module):
    """One weight used twice, a frozen layer, and a parameter that the output does not need."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.frozen(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Scalar(nn.Module):
    """A parameter and a buffer of no dimension."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(6, 3)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x):
        self.calls += 1
        return self.last(x) * self.scale


class Branching(nn.Module):
    """Decides by its data, which vmap cannot."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.first(x) if x.sum().item() > 0 else self.last(x)


def normed():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def dropping():
    return nn.Sequential(nn.Linear(6, 30), nn.Dropout(), nn.Dropout(), nn.Linear(30, 3))


def normed_cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(24, 3))


def cumulative_norm():
    """Its running mean weighs by the number of batches, which it reads out of a tensor."""
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 3))


def plain_and_sequence():
    """Linear layers on vectors and on sequences of them, without biases and with."""
    return nn.Sequential(
        nn.Linear(6, 8, bias=False),
        nn.Unflatten(1, (2, 4)),
        nn.Linear(4, 3, bias=False),
        nn.Tanh(),
        nn.Linear(3, 3),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class Products(nn.Module):
    """Weights on the left of a product, on its right, and there repeated or folded."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.row = nn.Parameter(torch.randn(1, 6))
        self.folded = nn.Parameter(torch.randn(4, 9))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(torch.mm(self.left, x.T)).T
        x = torch.tanh(torch.mm(self.folded.view(6, 6), x.T)).T
        x = torch.tanh(torch.mm(x, self.right))
        return self.last(x + torch.mm(self.row.expand(6, 6), x.T).T)


# name: (model, shape of a sample, whether vmap takes it)
MODELS = {
    "mlp": (lambda: mlp([6], 3, hidden=[5]), (6,), True),
    "linear": (lambda: mlp([6], 3, hidden=[]), (6,), True),
    "cnn": (lambda: cnn([1, 4, 4], 3, channels=[4]), (1, 4, 4), True),
    "tied and frozen": (Tied, (6,), True),
    "plain and sequence": (plain_and_sequence, (6,), True),
    "products": (Products, (6,), True),
    "scalar": (Scalar, (6,), True),
    "normed": (normed, (6,), True),
    "normed cnn": (normed_cnn, (1, 4, 5), True),
    "branching": (Branching, (6,), False),
    "cumulative norm": (cumulative_norm, (6,), False),
}
NORMED = ("normed", "normed cnn", "cumulative norm")


def task_of(name):
    make, shape, _ = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, *shape, generator=generator) * 2 + 0.3
    y = torch.randint(3, (SAMPLES,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make()
    return Task(model, nn.functional.cross_entropy, (x, y), (x, y))


def gradient_of(name, workers, dtype=torch.float64, **options) -> tuple[Any, FlatModel]:
    """Of all these workers stacked, or of the one worker that an int names."""
    task = task_of(name)
    model = FlatModel(task.model, dtype)
    shards = [torch.arange(i % 4, SAMPLES, 2) for i in range(32)]
    chosen = workers if isinstance(workers, list) else [workers]
    sampler = Sampler(shards=shards, workers=chosen, batch_size=BATCH, seed=3, sampling="shuffle")
    if isinstance(workers, list):
        return StackedGradient(model, task, sampler, len(workers), **options), model
    return ModuleGradient(model, task, sampler, **options), model


def assert_close(one, other):
    """To rounding: a stacked product adds up in another order."""
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.fixture
def sixteen_at_once(monkeypatch):
    monkeypatch.setattr("decentral.gradients.CHUNK_WORKERS_WITH_CONVOLUTIONS", 16)


@pytest.mark.parametrize("in_place_from", [0, 2**30])
@pytest.mark.parametrize("workers", [1, 3, 18])
@pytest.mark.parametrize("name", MODELS)
def test_stacked_gradients_are_those_of_each_worker(
    name, workers, in_place_from, sixteen_at_once, monkeypatch
):
    """Losses, gradients, running statistics and counters, at parameters that differ."""
    monkeypatch.setattr("decentral.gradients.LEAST_BYTES_IN_PLACE", in_place_from)
    stacked, model = gradient_of(name, list(range(workers)))
    assert model.takes_vmap == MODELS[name][2]
    generator = torch.Generator().manual_seed(2)
    stacked.parameters += 0.1 * torch.randn(
        stacked.parameters.shape, generator=generator, dtype=torch.float64
    )
    start = stacked.parameters.clone()
    losses, gradients, steps = [], [], (0, 1, 5)
    for step in steps:
        losses.append(stacked(step))
        gradients.append(stacked.value.clone())
    assert torch.equal(stacked.parameters, start)

    for worker in range(workers):
        alone, _ = gradient_of(name, worker)
        alone.parameters.copy_(start[worker])
        for step, loss, gradient in zip(steps, losses, gradients, strict=True):
            assert_close(alone(step), loss[worker])
            assert_close(alone.value, gradient[worker])
        assert_close(alone.buffers, stacked.buffers[worker])
        assert alone.counters.keys() == stacked.counters.keys()
        for counter, value in alone.counters.items():
            assert torch.equal(value, stacked.counters[counter][worker])


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "mlp": ["1.weight", "3.weight"],
        "plain and sequence": ["0.weight", "6.weight"],
        "tied and frozen": ["last.weight"],  # the other is used twice
        "products": ["left", "last.weight"],
        "cnn": ["4.weight"],
    }.items(),
)
def test_gradients_of_weights_are_computed_where_they_are_to_be(name, expected, monkeypatch):
    monkeypatch.setattr("decentral.gradients.LEAST_BYTES_IN_PLACE", 0)
    found = []

    def products(total, leaves):
        found.append(_products(total, leaves))
        return found[-1]

    monkeypatch.setattr("decentral.gradients._products", products)
    stacked, _ = gradient_of(name, [0, 1, 2])
    stacked(0)
    assert [list(pass_) for pass_ in found] == [expected]


@pytest.mark.parametrize("bias", [True, False])
def test_stacked_weights_get_their_gradients_as_they_lie_in_memory(bias):
    """And not transposed, as torch has them: copying them into the flat buffer takes longer."""
    x, weight = torch.randn(4, 6, 5), torch.randn(4, 3, 5, requires_grad=True)
    biases = (torch.randn(4, 3),) if bias else ()
    strides = {}
    for name, context in {"torch": contextlib.nullcontext(), "own": StackedLayers()}.items():
        with context:
            output = vmap(nn.functional.linear)(x, weight, *biases)
        (gradient,) = torch.autograd.grad(output.square().sum(), weight)
        strides[name] = gradient.stride()
    assert strides == {"torch": (15, 1, 3), "own": (15, 5, 1)}


def test_a_linear_layer_of_which_only_the_bias_is_each_workers_own():
    """A frozen weight, and an input that all share."""
    x, weight, bias = torch.randn(6, 5), torch.randn(3, 5), torch.randn(4, 3)
    with StackedLayers():
        output = vmap(nn.functional.linear, in_dims=(None, None, 0))(x, weight, bias)
    torch.testing.assert_close(output, x @ weight.T + bias.unsqueeze(1))


POOLS = {
    "windows apart": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "stride": 1, "dilation": 2},
    "with a rest": {"kernel_size": (2, 3), "ceil_mode": True},
}


def ends(forward, x):
    """What a model of x, stacked, gives, and its gradient by x: torch's own and those here."""
    found = []
    for context in (contextlib.nullcontext(), StackedLayers()):
        with context:
            output = vmap(forward)(x)
        weights = torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape)
        found.append((output.detach(), *torch.autograd.grad((output * weights).nansum(), x)))
    return found


def images_with_ties():
    """And with one number that is none: [3, 2, 8, 7, 9]."""
    x = torch.randn(3, 2, 8, 7, 9, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    x[0, 0, :, 2, 3] = math.nan
    return x.requires_grad_()


@pytest.mark.parametrize("relu", [None, nn.ReLU(), torch.relu, torch.Tensor.relu])
@pytest.mark.parametrize("pool", POOLS)
def test_stacked_max_pooling_is_torchs_to_the_bit(pool, relu):
    """Of equal numbers, such as the zeros of a ReLU, the same one has the gradient."""
    layer = nn.MaxPool2d(**POOLS[pool])
    (output, gradient), (own, own_gradient) = ends(
        layer if relu is None else lambda x: layer(relu(x)), images_with_ties()
    )
    np.testing.assert_array_equal(own, output)
    np.testing.assert_array_equal(own_gradient, gradient)
    assert output.isnan().any()


def read_again(x):
    rectified = torch.relu(x)
    pooled = nn.functional.max_pool2d(rectified, 2)
    return pooled + rectified[..., :3, :4]


def pooled_before(x):
    torch.relu(x)
    return nn.functional.max_pool2d(x, 2)


def in_place(x):
    x = x * 1
    return nn.functional.max_pool2d(nn.functional.relu(x, inplace=True), 2) + x.mean()


@pytest.mark.parametrize("forward", [read_again, pooled_before, in_place])
def test_a_relu_comes_after_max_pooling_only_where_nothing_shows_it(forward):
    (output, gradient), (own, own_gradient) = ends(forward, images_with_ties())
    np.testing.assert_array_equal(own, output)
    np.testing.assert_array_equal(own_gradient, gradient)


def test_max_pooling_of_a_relus_output_that_was_written_into():
    """Which torch takes where no gradient is asked for."""

    def forward(x):
        x = torch.relu(x)
        x.neg_()
        return nn.functional.max_pool2d(x, 2)

    x = images_with_ties().detach()
    with StackedLayers():
        own = vmap(forward)(x)
    np.testing.assert_array_equal(own, vmap(forward)(x))


def given(operation, forward):
    """The tensors that the operations of this name are given in a stacked pass and on its way back,
    each a list."""
    x = torch.randn(3, 2, 8, 4, 4, requires_grad=True)
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if operation in str(func):
                seen.append([arg for arg in args if isinstance(arg, torch.Tensor)])
            return func(*args, **(kwargs or {}))

    with Look():
        with StackedLayers():
            output = vmap(forward)(x)
        torch.autograd.grad((output * torch.ones(output.shape)).sum(), x)
    return seen


def test_a_relu_before_max_pooling_is_taken_back_on_what_the_pooling_left():
    """Of each window one number: its way back before the pooling would be that of all."""
    calls = given("threshold_backward", nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    assert [tuple(gradient.shape) for gradient, _ in calls] == [(3, 2, 8, 2, 2)]


def test_stacked_max_pooling_has_the_channels_last():
    """In memory, within it and on its way back: otherwise it takes ten times as long."""
    tensors = [tensor for call in given("max_pool2d", nn.MaxPool2d(2)) for tensor in call]
    last = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors]
    assert last == [True] * 4  # x; the gradient, x and the places


@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "clip_norm": 0.05}])
@pytest.mark.parametrize("name", ["tied and frozen", "normed cnn", "branching"])
def test_gradients_of_some_workers_each_at_its_own_step(name, options, sixteen_at_once):
    workers = 19
    stacked, _ = gradient_of(name, list(range(workers)), **options)
    generator = torch.Generator().manual_seed(2)
    stacked.parameters += 0.1 * torch.randn(
        stacked.parameters.shape, generator=generator, dtype=torch.float64
    )
    stacked.value.fill_(7.0)
    buffers = stacked.buffers.clone()
    rows = [4, 1, *range(8, workers)]
    steps = [2, 0, *[row % 3 for row in rows[2:]]]
    losses = stacked.of(rows, steps)
    for row, step, loss in zip(rows, steps, losses, strict=True):
        alone, _ = gradient_of(name, row, **options)
        alone.parameters.copy_(stacked.parameters[row])
        assert_close(alone(step), loss)
        assert_close(alone.value, stacked.value[row])
        assert_close(alone.buffers, stacked.buffers[row])
    others = [row for row in range(workers) if row not in rows]
    assert torch.equal(stacked.value[others], torch.full_like(stacked.value[others], 7.0))
    assert torch.equal(stacked.buffers[others], buffers[others])


@pytest.mark.parametrize("name", NORMED)
def test_training_moves_running_statistics_and_counts_batches(name):
    stacked, model = gradient_of(name, [0, 1, 2])
    before = stacked.buffers.clone()
    stacked(0)
    stacked(1)
    assert (stacked.buffers - before).abs().amin() > 0
    assert (stacked.buffers[0] - stacked.buffers[1]).abs().amax() > 1e-3  # each its own data
    assert [c.tolist() for c in stacked.counters.values()] == [[2, 2, 2]]
    assert model.b.equal(before[0])  # a probe of vmap, say, has left the initial ones alone


@pytest.mark.parametrize("name", ["branching", "cumulative norm"])
def test_a_model_that_vmap_cannot_take_is_said_once_in_a_run(name, caplog, monkeypatch):
    monkeypatch.setattr("decentral.experiment.TASKS", {"mine": lambda workers, seed: task_of(name)})
    config = {
        "workers": 3,
        "steps": 6,
        "task": {"name": "mine", "batch_size": BATCH},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": {"name": "gossip_sgd"},
        "topology": {"name": "ring"},
        "record": {"every": 2, "evaluate_every": 2},
    }
    with caplog.at_level(logging.DEBUG, logger="decentral"):
        decentral.run(config)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "workers run one by one" in warnings[0].getMessage()


def test_a_model_that_vmap_takes_is_not_spoken_of(caplog):
    gradient_of("mlp", [0, 1])
    assert not caplog.records


# --- workers at once ---


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied and frozen", "normed cnn"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_who_goes_together_does_not_matter(name, chunk):
    """But for rounding, and so not in what a run's seed determines: see PASS_BYTES."""
    together, _ = gradient_of(name, list(range(5)), accumulate=2)
    apart, _ = gradient_of(name, list(range(5)), accumulate=2)
    assert together.chunk == 5
    apart.chunk = chunk
    for step in (0, 3):
        assert_close(apart(step), together(step))
        assert_close(apart.value, together.value)
        assert_close(apart.buffers, together.buffers)


def test_workers_at_once_by_hand():
    _, model = gradient_of("mlp", [0, 1])
    _, convolving = gradient_of("cnn", [0, 1])
    cap = CHUNK_WORKERS_WITH_CONVOLUTIONS
    model.tensor_bytes = 1
    for each, n, expected in [(2**24, 8, 8), (2**24, 9, 5), (2**24 + 1, 8, 4), (2**30, 3, 1)]:
        model.pass_bytes = each
        assert workers_at_once(model, n) == expected  # 2^27 bytes are those of eight
    model.pass_bytes = 1
    for each, n, expected in [(5 * 2**19, 8, 8), (5 * 2**19, 9, 5), (5 * 2**19 + 1, 8, 4)]:
        model.tensor_bytes = each
        assert workers_at_once(model, n) == expected  # and 5 2^22 of the largest tensor
    assert workers_at_once(convolving, cap + 1) == cap // 2 + 1


def test_what_a_worker_keeps_follows_from_shapes_alone():
    """By hand, in float64: what the backward pass of an mlp 6-5-3 needs, and the gradient."""
    _, model = gradient_of("mlp", [0, 1])
    numbers = BATCH * (6 + 5 + 3)  # inputs, after ReLU, after log-softmax
    targets = BATCH  # int64
    assert numbers + 5 * 3 + len(model.x) <= model.pass_bytes / 8 <= numbers + 15 + 53 + 3 * targets
    assert model.tensor_bytes == 8 * max(len(model.x), BATCH * 6)
    for other in (list(range(7)), [4, 2, 9]):  # other workers, samples and numbers of them
        assert gradient_of("mlp", other)[1].pass_bytes == model.pass_bytes
    whole, halved = (
        gradient_of("mlp", [0, 1], torch.float64),
        gradient_of("mlp", [0], torch.float32),
    )
    assert halved[1].pass_bytes < 0.6 * whole[1].pass_bytes


def test_what_a_worker_let_go_of_before_its_pass_is_back_does_not_count():
    """By hand, in float64: a ReLU's output is not needed where pooling comes before it."""
    _, model = gradient_of("cnn", [0, 1])
    image, channels = 4 * 4, 4
    numbers = BATCH * image  # the image
    numbers += BATCH * channels * image  # with the channels last
    numbers += 3 * BATCH * channels * image // 4  # pooled: places, numbers, these flattened
    numbers += BATCH * 3  # after log-softmax
    targets = BATCH
    weights = len(model.x)  # which are kept as well, beside the gradient
    assert numbers <= model.pass_bytes / 8 - weights <= numbers + weights + 3 * targets
    assert weights + 3 * targets < BATCH * channels * image  # what the output would have added


def test_what_a_model_draws_depends_on_who_goes_together(monkeypatch):
    """Layer by layer; so no timing may choose, or the same seed would not give the same run."""
    monkeypatch.setitem(MODELS, "dropping", (dropping, (6,), True))
    first, again, apart = (gradient_of("dropping", list(range(5)))[0] for _ in range(3))
    apart.chunk = 2
    losses = first(0)
    assert torch.equal(again(0), losses)
    assert not torch.allclose(apart(0), losses)


def test_how_many_workers_go_at_once_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="decentral"):
        stacked, _ = gradient_of("mlp", [0, 1, 2])
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 3 workers at once: each keeps 0.00")
    assert stacked.chunk == 3


def test_a_shared_parameter_is_there_once_and_a_frozen_one_not_at_all():
    task = task_of("tied and frozen")
    model = FlatModel(task.model, torch.float64)
    names = ["unused", "first.weight", "first.bias", "second.bias", "last.weight", "last.bias"]
    assert list(model.parameters.shapes) == names
    assert len(model.x) == 2 + 36 + 6 + 6 + 18 + 3

    state = model.state_dict(torch.arange(len(model.x), dtype=torch.float64), model.b, {})
    assert torch.equal(state["first.weight"], state["second.weight"])
    assert torch.equal(state["frozen.weight"], task.model.state_dict()["frozen.weight"])
    assert state["first.weight"].flatten().tolist() == list(range(2, 38))


def test_views_write_through_to_the_flat_buffer():
    layout = Layout({"a": torch.zeros(2, 3), "scalar": torch.tensor(0.0), "b": torch.zeros(1)})
    assert layout.size == 8
    for flat in (torch.zeros(8), torch.zeros(4, 8)):
        views = layout.views(flat)
        lead = flat.shape[:-1]
        assert {n: tuple(v.shape) for n, v in views.items()} == {
            "a": (*lead, 2, 3), "scalar": tuple(lead), "b": (*lead, 1)
        }  # fmt: skip
        for number, view in enumerate(views.values(), start=1):
            assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            view.fill_(number)
        expected = torch.tensor([1.0] * 6 + [2.0, 3.0])
        assert torch.equal(flat, expected.expand_as(flat))


def test_flatten_copies_values_in_order_and_dtype():
    tensors = {"a": torch.tensor([[1.0, 2.0]]), "scalar": torch.tensor(3.0)}
    flat = Layout(tensors).flatten(tensors, torch.float64)
    assert flat.dtype == torch.float64
    assert flat.tolist() == [1.0, 2.0, 3.0]
    tensors["a"].fill_(9.0)
    assert flat.tolist() == [1.0, 2.0, 3.0]


def test_a_module_trains_in_place_on_its_flat_buffer():
    alone, model = gradient_of("normed", 0)
    alone.parameters.fill_(0.25)
    assert all((p == 0.25).all() for p in model.module.parameters())
    alone(0)
    gradients = [p.grad for p in model.module.parameters()]
    assert torch.equal(torch.cat([g.flatten() for g in gradients if g is not None]), alone.value)
    assert model.module.get_buffer("1.running_mean").abs().max() > 0
    assert alone.buffers[:5].equal(model.module.get_buffer("1.running_mean"))


@pytest.mark.parametrize("workers", [1, [0, 1, 2]])
@pytest.mark.parametrize("name", [*MODELS, "dropping"])
def test_losses_alone_are_those_of_the_gradient(name, workers, monkeypatch):
    """Of the same micro-batches and the same dropout, however often they are asked."""
    monkeypatch.setitem(MODELS, "dropping", (dropping, (6,), True))
    gradient, _ = gradient_of(name, workers, accumulate=2)
    expected, value = gradient(3).clone(), gradient.value.clone()
    start = gradient.parameters.clone()
    for _ in range(2):
        assert_close(gradient.losses(3), expected)
    assert torch.equal(gradient.value, value)
    assert torch.equal(gradient.parameters, start)
    assert not torch.allclose(gradient.losses(4), expected)
    gradient.parameters *= 1.3
    assert not torch.allclose(gradient.losses(3), expected)


def test_losses_move_running_statistics_as_any_pass_in_training():
    by_losses, _ = gradient_of("normed", [0, 1])
    by_gradient, _ = gradient_of("normed", [0, 1])
    by_losses.losses(0)
    by_gradient(0)
    assert_close(by_losses.buffers, by_gradient.buffers)


# --- autocast ---


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied and frozen", "normed", "normed cnn"])
def test_autocast_lowers_products_and_nothing_else(name):
    workers = [0, 1, 2]
    stacked, model = gradient_of(name, workers, torch.float32, autocast="bfloat16")
    seen = set()
    for module in model.module.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    exact, _ = gradient_of(name, workers, torch.float32)
    losses, exact_losses = stacked(0), exact(0)
    assert seen == {torch.bfloat16}
    for tensor in (losses, stacked.value, stacked.parameters, stacked.buffers):
        assert tensor.dtype == torch.float32
    # A product is rounded to eight bits, 2^-9 of itself; a few layers of them, and back.
    scale = exact.value.abs().max().item()
    assert 1e-5 * scale < (stacked.value - exact.value).abs().max() < 0.03 * scale
    torch.testing.assert_close(losses, exact_losses, rtol=0.01, atol=0)
    if name in NORMED:
        torch.testing.assert_close(stacked.buffers, exact.buffers, rtol=0.03, atol=0.01)

    for worker in workers:  # the very roundings of a worker on its own
        alone, _ = gradient_of(name, worker, torch.float32, autocast="bfloat16")
        torch.testing.assert_close(alone(0), losses[worker], rtol=1e-6, atol=0)
        torch.testing.assert_close(alone.value, stacked.value[worker], rtol=1e-5, atol=1e-7)


def test_autocast_holds_for_losses_alone():
    lowered, model = gradient_of("mlp", 0, torch.float32, autocast="bfloat16")
    seen = []
    model.module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    assert torch.equal(lowered.losses(0), lowered(0))
    assert seen == [torch.bfloat16] * 2


def test_a_run_under_autocast_stays_near_the_exact_one(quick, caplog):
    quick["dtype"] = "float32"
    exact = decentral.run(quick).metrics
    with caplog.at_level(logging.WARNING, logger="decentral"):
        lowered = decentral.run(quick | {"gradient": {"autocast": "bfloat16"}}).metrics
    assert (lowered.loss != exact.loss).all()
    assert ((lowered.loss - exact.loss).abs() < 0.02 * exact.loss + 1e-3).all()
    assert [r.getMessage() for r in caplog.records] == [
        "autocast rounds otherwise under vmap, so workers run one by one"
    ]


def test_a_run_in_bfloat16_stays_near_the_exact_one_and_counts_right_answers_exactly(quick):
    exact = decentral.run(quick | {"dtype": "float32"}).metrics
    rounded = decentral.run(quick | {"dtype": "bfloat16"})
    loss = rounded.metrics.loss
    assert (loss != exact.loss).all()
    assert ((loss - exact.loss).abs() < 0.1 * exact.loss + 1e-3).all()  # eight bits, step by step
    assert all(p.dtype == torch.bfloat16 for p in rounded.model.parameters())
    right = rounded.metrics.eval_accuracy.iloc[-1] * 360  # samples of the test set
    assert right == pytest.approx(round(right), abs=1e-3)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_autocast_is_refused_where_it_would_do_nothing(quick, dtype):
    with pytest.raises(decentral.UserError, match=r"gradient.autocast: .*dtype=float32"):
        decentral.run(quick | {"gradient": {"autocast": "bfloat16"}, "dtype": dtype})


# --- memory ---

FAULTS = """
import resource, torch
from decentral.engines.sim import keep_freed_memory

def step():
    return sum(tensor.shape[0] for tensor in [torch.ones(2**20) for _ in range(10)])  # of 4 MiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
without = faults()
keep_freed_memory()
first = [faults() for _ in range(4)]  # in these the heap still grows
print(without, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_step_finds_the_memory_of_the_last_one():
    """Three steps of 40 MiB, in pages of 4 KiB: faults before and after."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=120
    )
    without, kept = map(int, done.stdout.split())
    assert without > 3000  # at times glibc keeps some by itself
    assert kept < 300


def test_a_pass_of_many_workers_is_bounded_in_memory():
    """[n, D] for parameters and gradient; of what a pass needs, PASS_BYTES."""
    _, model = gradient_of("mlp", [0, 1])
    most, model.tensor_bytes = PASS_BYTES["cpu"], 1
    for each in (10**3, 10**6, 2 * 10**7, 10**9):
        model.pass_bytes = each
        for n in (1, 7, 64, 1000):
            assert workers_at_once(model, n) * each <= max(most, each)
