"""Optimizers, learning-rate schedules and what becomes of a gradient, against hand-made steps."""

import io
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import decentral
from decentral import config as configs
from decentral.errors import UserError
from decentral.experiment import build
from decentral.gradients import FlatModel, ModuleGradient, StackedGradient, clip_
from decentral.optimizers import LR_SCHEDULES, WarmUp, lr_schedule, optimizer, without_decay
from decentral.tasks import Sampler, Task
from decentral.tasks.models import mlp

STEPS = 12
# Every schedule with options under which its learning rate changes within STEPS.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"factor": 0.5, "total_iters": 4},
    "cosine": {"T_max": 10},
    "cosine_warm_restarts": {"T_0": 4},
    "cyclic": {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 3},
    "exponential": {"gamma": 0.8},
    "linear": {"total_iters": 6},
    "linear_to_zero": {},
    "one_cycle": {"max_lr": 0.5, "total_steps": 20},
    "polynomial": {"total_iters": 8},
    "step": {"milestones": [2, 5], "gamma": 0.1},
    "every": {"step_size": 3, "gamma": 0.5},
}


def array(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(quick, **overrides):
    return build(configs.load(quick, overrides))


# torch's fused forms.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        ("adam", {"weight_decay": 0.01}),
        ("adamw", {"amsgrad": True}),
    ],
)
def test_a_fused_step_is_the_plain_one(name, options):
    start, gradients = array(3, 7), array(5, 3, 7, seed=1)
    found = []
    for form in ({}, {"foreach": False}):
        x = start.clone()
        stepper = optimizer(name, {"lr": 0.1} | options | form)([x])
        assert bool(stepper.param_groups[0]["fused"]) == (not form)
        for gradient in gradients:
            x.grad = gradient.clone()
            stepper.step()
        found.append(x)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert (found[0] - start).abs().min() > 1e-3


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.05), ("adam", 0.5), ("adamw", 0.5)])
def test_a_step_in_bfloat16_is_the_exact_one_to_rounding(name, lr):
    start, gradient = array(64).bfloat16(), array(64, seed=1).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        x = start.to(dtype, copy=True)
        stepper = optimizer(name, {"lr": lr})([x])
        x.grad = gradient.to(dtype)
        stepper.step()
        found.append(x.double())
    # A few roundings to eight bits, of numbers below 4.
    torch.testing.assert_close(*found, rtol=0, atol=3 * 2**-7)
    assert (found[0] - start).abs().max() > 10 * 2**-7


def test_columns_of_a_matrix_are_stepped_on_alone():
    x = array(4, 6)
    start, columns = x.clone(), x[:, 1:3]
    stepper = optimizer("sgd", {"lr": 1.0, "momentum": 0.9})([columns])
    columns.grad = torch.ones(4, 6, dtype=x.dtype)[:, 1:3]
    stepper.step()
    start[:, 1:3] -= 1
    torch.testing.assert_close(x, start, rtol=0, atol=1e-15)


# Lion.


def test_lion_by_hand():
    lr, beta1, beta2, decay = 0.01, 0.8, 0.95, 0.3
    start, gradients = array(2, 3), array(4, 2, 3, seed=1)
    x = start.clone()
    stepper = optimizer("lion", {"lr": lr, "betas": [beta1, beta2], "weight_decay": decay})([x])
    y, m = start.numpy().copy(), np.zeros((2, 3))
    for gradient in gradients:
        x.grad = gradient.clone()
        stepper.step()
        g = gradient.numpy()
        y = y - lr * (np.sign(beta1 * m + (1 - beta1) * g) + decay * y)
        m = beta2 * m + (1 - beta2) * g
        np.testing.assert_allclose(x, y, rtol=1e-14)
    np.testing.assert_allclose(stepper.state[x]["exp_avg"], m, rtol=1e-13)


def test_the_defaults_of_lion_are_those_of_its_paper():
    x = torch.zeros(1, dtype=torch.float64)
    stepper = optimizer("lion", {"lr": 1.0})([x])
    # m = 0.01 after g = 1; then c = 0.9 * 0.01 + 0.1 g, whose sign turns at g = -0.09.
    for gradient, expected in ((1.0, -1.0), (-0.0899, -2.0)):
        x.grad = torch.full_like(x, gradient)
        stepper.step()
        assert x.item() == expected


def test_lion_stays_where_its_momentum_and_gradient_are_zero():
    x = torch.tensor([2.0, 3.0])
    stepper = optimizer("lion", {"lr": 0.1})([x])
    x.grad = torch.tensor([0.0, -1.0])
    stepper.step()
    torch.testing.assert_close(x, torch.tensor([2.0, 3.1]))


# Weight decay.


def test_norms_and_biases_do_not_decay():
    shapes = [(2, 2), (2,), (), (1, 3), (3, 1)]
    lr, decay, momentum = 0.1, 0.5, 0.9
    mask = np.array([1] * 4 + [0] * 3 + [1] * 6)
    make = optimizer("sgd", {"lr": lr, "weight_decay": decay, "momentum": momentum})
    start, gradients = array(2, 13), array(3, 2, 13, seed=1)
    for x in (start.clone(), start[0].clone()):
        stepper = without_decay(make, shapes)([x])
        y, m = x.numpy().copy(), np.zeros(x.shape)
        for gradient in gradients:
            x.grad = gradient.reshape(-1, 13)[: x.numel() // 13].reshape(x.shape).clone()
            stepper.step()
            m = momentum * m + x.grad.numpy() + decay * mask * y
            y = y - lr * m
            np.testing.assert_allclose(x, y, rtol=1e-13)


@pytest.mark.parametrize("name", ["adamw", "lion", "adam"])
def test_without_decay_is_the_same_optimizer_where_nothing_decays(name):
    shapes = [(3, 2), (4,), (1, 2)]
    make = optimizer(name, {"lr": 0.1, "weight_decay": 0.0})
    one, other = array(3, 12), array(3, 12)
    plain, grouped = make([one]), without_decay(make, shapes)([other])
    for gradient in array(4, 3, 12, seed=1):
        one.grad, other.grad = gradient.clone(), gradient.clone()
        plain.step()
        grouped.step()
    assert torch.equal(one, other)


def test_a_run_leaves_norms_and_biases_out(quick):
    """lr 1, weight decay 1 and no gradient: what decays is zero after one step."""
    optimizer_options = {"name": "sgd", "lr": 1.0, "weight_decay": 1.0}
    exclude = optimizer_options | {"weight_decay_exclude": "norms_and_biases"}
    for options, left in ((optimizer_options, ()), (exclude, (8, 10))):
        experiment = built(quick, optimizer=options)
        model = FlatModel(experiment.task.model, torch.float64)
        x = torch.ones(4, len(model.x), dtype=torch.float64)
        stepper = experiment.make_optimizer([x])
        x.grad = torch.zeros_like(x)
        stepper.step()
        views = model.parameters.views(x)
        assert [len(v[0]) for v in views.values() if v.all()] == list(left)
        assert sum(v.any().item() for v in views.values()) == len(left)


def test_the_state_of_views_survives_a_checkpoint():
    shapes = [(3, 2), (4,), (1, 2)]
    make = without_decay(optimizer("adamw", {"lr": 0.1, "weight_decay": 0.2}), shapes)
    gradients = array(4, 3, 12, seed=1)

    def steps(x, stepper, gradients):
        for gradient in gradients:
            x.grad = gradient.clone()
            stepper.step()

    whole = array(3, 12)
    steps(whole, make([whole]), gradients)
    x = array(3, 12)
    stepper = make([x])
    steps(x, stepper, gradients[:2])
    file = io.BytesIO()
    torch.save([x, stepper.state_dict()], file)
    file.seek(0)
    x, state = torch.load(file, weights_only=True)
    stepper = make([x])
    stepper.load_state_dict(state)
    steps(x, stepper, gradients[2:])
    assert torch.equal(x, whole)


# Scaling with the batch. The config `quick` has 4 workers of 8 samples a step.


def in_force(quick, **overrides):
    """The optimizer's options after scaling, as config.yaml shows them."""
    config = configs.load(quick, overrides)
    assert config.scale_lr is None
    again = configs.load(yaml.safe_load(configs.dump(config)))
    assert again == config  # a resumed run does not scale twice
    return config.optimizer.options


@pytest.mark.parametrize(
    ("rule", "reference", "factor"), [("linear", 8, 4), ("linear", 64, 1 / 2), ("sqrt", 8, 2)]
)
def test_the_learning_rate_scales_with_the_total_batch(quick, rule, reference, factor):
    options = in_force(quick, scale_lr={"rule": rule, "reference_batch": reference})
    assert options == {"lr": pytest.approx(0.1 * factor), "momentum": 0.9}


def test_accumulated_batches_count_in_the_total(quick):
    scale = {"rule": "linear", "reference_batch": 32}
    assert in_force(quick, scale_lr=scale, **{"gradient.accumulate": 3})["lr"] == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam"])
def test_the_square_root_rule_scales_the_second_moment_of_adam(quick, name):
    given = {"name": name, "lr": 0.01, "betas": [0.8, 0.99], "eps": 1e-6}
    scale = {"rule": "sqrt", "reference_batch": 8}
    options = in_force(quick, optimizer=given, scale_lr=scale)
    expected = {"lr": 0.02, "betas": [0.8, 0.96], "eps": 0.5e-6}
    assert options == {key: pytest.approx(value) for key, value in expected.items()}
    options = in_force(quick, optimizer={"name": name, "lr": 0.01}, scale_lr=scale)
    expected = {"lr": 0.02, "betas": [0.9, 0.996], "eps": 0.5e-8}
    assert options == {key: pytest.approx(value) for key, value in expected.items()}


def test_the_square_root_rule_scales_the_second_moment_of_rmsprop(quick):
    given = {"name": "rmsprop", "lr": 0.01}
    scale = {"rule": "sqrt", "reference_batch": 8}
    options = in_force(quick, optimizer=given, scale_lr=scale)
    expected = {"lr": 0.02, "alpha": 0.96, "eps": 0.5e-8}
    assert options == {key: pytest.approx(value) for key, value in expected.items()}


def test_the_linear_rule_leaves_all_but_the_learning_rate(quick):
    given = {"name": "adam", "lr": 0.01, "betas": [0.8, 0.99]}
    options = in_force(quick, optimizer=given, scale_lr={"rule": "linear", "reference_batch": 16})
    assert options == {"lr": pytest.approx(0.02), "betas": [0.8, 0.99]}


def test_a_run_writes_the_values_in_force(quick, tmp_path):
    scale = {"rule": "linear", "reference_batch": 16}
    decentral.run(quick, out=tmp_path / "run", scale_lr=scale, steps=2)
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["optimizer"]["lr"] == pytest.approx(0.2)
    assert "scale_lr" not in written


# Learning-rate schedules.


def rates(name, options, steps=STEPS, lr=0.2, name_of_optimizer="sgd"):
    """The learning rate of each step."""
    stepper = optimizer(name_of_optimizer, {"lr": lr, "momentum": 0.5})([torch.zeros(1)])
    scheduler = lr_schedule(name, options, steps)(stepper)
    seen = []
    for _ in range(steps):
        seen.append(stepper.param_groups[0]["lr"])
        stepper.step()
        scheduler.step()
    return seen


def test_every_schedule_is_tested_here():
    assert SCHEDULES.keys() == LR_SCHEDULES.keys()


@pytest.mark.parametrize("steps", [1, 2, 7, 400])
def test_linear_to_zero_reaches_zero_where_the_run_ends(steps):
    expected = [0.2 * (1 - k / steps) for k in range(steps)]
    np.testing.assert_allclose(rates("linear_to_zero", {}, steps), expected, rtol=1e-12)


def test_linear_to_zero_after_a_warm_up():
    expected = [0.05, 0.10, 0.15, 0.2, 0.2, 0.15, 0.1, 0.05]
    seen = rates("linear_to_zero", {"warmup": 4}, steps=8)
    np.testing.assert_allclose(seen, expected, rtol=1e-12)


@pytest.mark.parametrize("warmup", [1, 5])
@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"linear_to_zero"}))
def test_a_warm_up_rises_to_where_the_schedule_begins(name, warmup):
    plain = rates(name, SCHEDULES[name])
    seen = rates(name, SCHEDULES[name] | {"warmup": warmup})
    rise = [plain[0] * (k + 1) / warmup for k in range(warmup)]
    np.testing.assert_allclose(seen, rise + plain[: STEPS - warmup], rtol=1e-12)


def test_a_warm_up_of_zero_steps_is_none():
    stepper = optimizer("sgd", {"lr": 0.2})([torch.zeros(1)])
    schedule = lr_schedule("exponential", {"gamma": 0.8, "warmup": 0}, STEPS)(stepper)
    assert not isinstance(schedule, WarmUp)


@pytest.mark.parametrize("saved_at", [2, 7])
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_survives_a_checkpoint_that_is_loaded_safely(name, warmup, saved_at):
    options = SCHEDULES[name] | {"warmup": warmup}
    make_optimizer = optimizer("sgd", {"lr": 0.2, "momentum": 0.5})

    def both():
        x = torch.ones(1)
        x.grad = torch.ones(1)
        stepper = make_optimizer([x])
        return stepper, lr_schedule(name, options, STEPS)(stepper)

    def go_on(stepper, scheduler, steps):
        seen = []
        for _ in range(steps):
            group = stepper.param_groups[0]
            seen.append((group["lr"], group["momentum"]))
            stepper.step()
            scheduler.step()
        return seen

    whole = go_on(*both(), STEPS)
    stepper, scheduler = both()
    assert go_on(stepper, scheduler, saved_at) == whole[:saved_at]
    file = io.BytesIO()
    torch.save([stepper.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    stepper, scheduler = both()
    stepper.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    assert go_on(stepper, scheduler, STEPS - saved_at) == whole[saved_at:]


def test_a_run_binds_its_steps_to_linear_to_zero(quick):
    experiment = built(quick, steps=20, **{"lr_schedule.name": "linear_to_zero"})
    assert experiment.make_scheduler is not None
    stepper = experiment.make_optimizer([torch.zeros(1)])
    scheduler = experiment.make_scheduler(stepper)
    for _ in range(19):
        stepper.step()
        scheduler.step()
    assert stepper.param_groups[0]["lr"] == pytest.approx(0.1 / 20)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("stopped", [2, 6, 8])
def test_a_run_with_more_steps_goes_on_along_the_longer_line(warmup, stopped):
    """8 steps, resumed as 12: from there the rates of a run of 12."""
    options = {"warmup": warmup}
    stepper = optimizer("sgd", {"lr": 0.2})([torch.zeros(1)])
    scheduler = lr_schedule("linear_to_zero", options, 8)(stepper)
    for _ in range(stopped):
        stepper.step()
        scheduler.step()
    longer = optimizer("sgd", {"lr": 0.2})([torch.zeros(1)])
    resumed = lr_schedule("linear_to_zero", options, 12)(longer)
    longer.load_state_dict(stepper.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    seen = []
    for _ in range(stopped, 12):
        seen.append(longer.param_groups[0]["lr"])
        longer.step()
        resumed.step()
    expected = rates("linear_to_zero", options, steps=12)[stopped:]
    np.testing.assert_allclose(seen, expected, rtol=1e-12)


# Clipping and accumulation.

SAMPLES = 37


def task_of(bias=0.0):
    x = array(SAMPLES, 6) + bias
    y = torch.randint(3, (SAMPLES,), generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = mlp([6], 3, hidden=[5])
    return Task(model, nn.functional.cross_entropy, (x, y), (x, y))


def gradient_of(workers, batch_size=8, dtype=torch.float64, **options) -> Any:
    """Of all these workers stacked, or of the one worker that an int names."""
    task = task_of()
    model = FlatModel(task.model, dtype)
    chosen = workers if isinstance(workers, list) else [workers]
    shards = [torch.arange(i, SAMPLES, 2) for i in range(4)]
    sampler = Sampler(shards, batch_size=batch_size, seed=3, sampling="shuffle", workers=chosen)
    if isinstance(workers, list):
        return StackedGradient(model, task, sampler, len(workers), **options)
    return ModuleGradient(model, task, sampler, **options)


def test_clipping_by_hand():
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    clip_(gradients, 2.0)
    scale = 2 / (5 + 1e-6)
    expected = [[3 * scale, 4 * scale], [0.3, 0.4], [0.0, 0.0]]
    np.testing.assert_allclose(gradients, expected, rtol=1e-15)


def test_clipping_one_worker_is_what_torch_does_to_its_model():
    one = gradient_of(1)
    one(0)
    ours = one.value.clone()
    before = ours.norm().item()
    clip_(ours, before / 3)
    parameters = [p for p in one._model.module.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(parameters, before / 3)
    torch.testing.assert_close(ours, one.value, rtol=1e-14, atol=0)
    assert ours.norm().item() == pytest.approx(before / 3, rel=1e-5)


def test_a_norm_is_taken_in_more_digits_than_bfloat16_has():
    gradient = torch.tensor([189.0, 252.0], dtype=torch.bfloat16)
    clip_(gradient, 157.5)
    assert gradient.dtype == torch.bfloat16
    assert gradient.tolist() == [94.5, 126.0]  # ||g|| = 315, where bfloat16 has 314 and 316


@pytest.mark.parametrize("stacked", [True, False])
def test_accumulated_batches_are_one_batch_of_them_all(stacked):
    workers = [0, 1, 2] if stacked else 2
    micro = gradient_of(workers, batch_size=8, accumulate=2)
    whole = gradient_of(workers, batch_size=16)
    for step in (0, 1, 5):
        torch.testing.assert_close(micro(step), whole(step), rtol=1e-12, atol=0)
        torch.testing.assert_close(micro.value, whole.value, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", [{"clip_norm": 0.3}, {"accumulate": 3, "clip_norm": 0.4}])
def test_stacked_workers_clip_and_accumulate_as_each_does_alone(options):
    stacked = gradient_of([0, 1, 2, 3], **options)
    losses = [(step, stacked(step), stacked.value.clone()) for step in (0, 4)]
    plain = gradient_of([0, 1, 2, 3], **options | {"clip_norm": None})
    plain(0)
    norms = plain.value.norm(dim=-1)
    assert (norms > options["clip_norm"]).any()  # it is the clipping of some that is compared
    assert norms.std() > 1e-3
    for worker in range(4):
        alone = gradient_of(worker, **options)
        for step, loss, value in losses:
            torch.testing.assert_close(alone(step), loss[worker], rtol=1e-12, atol=0)
            torch.testing.assert_close(alone.value, value[worker], rtol=1e-11, atol=1e-14)


def test_the_mean_of_accumulated_batches_is_clipped_not_each():
    accumulated = gradient_of(0, accumulate=3)
    accumulated(2)
    expected = accumulated.value.clone()
    norm = expected.norm().item()
    clipped = gradient_of(0, accumulate=3, clip_norm=0.9 * norm)
    clipped(2)
    torch.testing.assert_close(clipped.value, expected * 0.9 / (1 + 1e-6 / norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_keep_their_dtype(dtype):
    gradient = gradient_of([0, 1], dtype=dtype, accumulate=2, clip_norm=0.1)
    assert gradient(0).dtype == gradient.value.dtype == dtype


def test_a_run_clips_and_accumulates(quick):
    def metrics(**overrides: Any):
        return decentral.run(quick, **overrides).metrics

    common: dict[str, Any] = {"record": {"every": 24}, "optimizer": {"name": "sgd", "lr": 0.1}}
    plain = metrics(**common)
    still = metrics(**common, gradient={"clip_norm": 1e-9})
    assert plain["consensus_distance"].iloc[-1] > 1e-3
    # Every worker moved by at most lr * clip_norm a step.
    assert still["consensus_distance"].iloc[-1] <= 24 * 0.1 * 1e-9
    accumulated = metrics(**common, gradient={"accumulate": 2})
    larger = metrics(**common, task=quick["task"] | {"batch_size": 16})
    for key in ("loss", "consensus_distance"):
        np.testing.assert_allclose(accumulated[key], larger[key], rtol=1e-9)


@pytest.mark.slow
def test_both_engines_give_the_same_run_with_all_of_it(on_shared_actors, quick):
    overrides: dict[str, Any] = {
        "workers": 2,
        "topology": {"name": "complete"},
        "optimizer": {
            "name": "adamw",
            "lr": 0.01,
            "weight_decay": 0.1,
            "weight_decay_exclude": "norms_and_biases",
        },
        "lr_schedule": {"name": "linear_to_zero", "warmup": 5},
        "gradient": {"clip_norm": 0.5, "accumulate": 2},
        "scale_lr": {"rule": "sqrt", "reference_batch": 8},
        "ray": {"cpus_per_worker": 0.5},
    }
    sim = decentral.run(quick, engine="sim", **overrides).metrics
    launched = decentral.run(quick, engine="ray", **overrides).metrics
    for column in ("loss", "lr", "consensus_distance", "eval_loss"):
        a, b = sim[column].dropna(), launched[column].dropna()
        assert len(a) > 0
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13, err_msg=column)


def test_a_run_goes_on_from_a_checkpoint_as_if_never_stopped(quick, tmp_path):
    overrides: dict[str, Any] = {
        "optimizer": {
            "name": "lion",
            "lr": 0.01,
            "weight_decay": 0.1,
            "weight_decay_exclude": "norms_and_biases",
        },
        "lr_schedule": {"name": "step", "milestones": [3, 12], "warmup": 10},
        "gradient": {"clip_norm": 0.5, "accumulate": 2},
        "scale_lr": {"rule": "linear", "reference_batch": 8},
        "checkpoint.every": 12,
    }
    whole = decentral.run(quick, out=tmp_path / "run", **overrides)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000024", ignore_errors=True)
    resumed = decentral.resume(tmp_path / "run")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    np.testing.assert_array_equal(whole.metrics["lr"], resumed.metrics["lr"])


# Input that is refused: overrides, and what the message must say.
WRONG = {
    "beta of lion": (
        {"optimizer": {"name": "lion", "lr": 0.1, "betas": [0.9, 1.0]}},
        "lion refuses.*betas must be two numbers",
    ),
    "decay of lion": (
        {"optimizer": {"name": "lion", "lr": 0.1, "weight_decay": -1}},
        "weight_decay must be at least 0; got -1",
    ),
    "option of lion": (
        {"optimizer": {"name": "lion", "lr": 0.1, "beta": [0.9, 0.99]}},
        "did you mean 'betas'",
    ),
    "decay left out of what is no choice": (
        {"optimizer.weight_decay_exclude": "biases"},
        "optimizer.weight_decay_exclude: .*'none' or 'norms_and_biases'; got 'biases'",
    ),
    "decay left out where there is none": (
        {"optimizer": {"name": "rprop", "lr": 0.1, "weight_decay_exclude": "norms_and_biases"}},
        "rprop has no weight_decay",
    ),
    "scaling rule that there is not": (
        {"scale_lr": {"rule": "cubic", "reference_batch": 8}},
        "scale_lr.rule: .*'linear' or 'sqrt'; got 'cubic'",
    ),
    "scaling from nothing": ({"scale_lr": {"rule": "sqrt"}}, "scale_lr.reference_batch: is requ"),
    "scaling from a batch of none": (
        {"scale_lr": {"rule": "sqrt", "reference_batch": 0}},
        "scale_lr.reference_batch: .*greater than 0; got 0",
    ),
    "no learning rate to scale": (
        {"optimizer.lr": None, "scale_lr": {"rule": "linear", "reference_batch": 8}},
        "optimizer.lr: is required",
    ),
    "square root rule too far": (
        {
            "optimizer": {"name": "adam", "lr": 0.1, "betas": [0.9, 0.75]},
            "scale_lr": {"rule": "sqrt", "reference_batch": 8},
        },
        "scale_lr.reference_batch: .*32 / 8 = 4.*0.75",
    ),
    "square root rule too far for rmsprop": (
        {
            "optimizer": {"name": "rmsprop", "lr": 0.1, "alpha": 0.7},
            "scale_lr": {"rule": "sqrt", "reference_batch": 8},
        },
        "scale_lr.reference_batch: .*0.7",
    ),
    "scaling under a schedule that sets the rate itself": (
        {
            "scale_lr": {"rule": "linear", "reference_batch": 8},
            "lr_schedule": {"name": "one_cycle", "max_lr": 0.1, "total_steps": 24},
        },
        "scale_lr: .*one_cycle",
    ),
    "steps given by hand": (
        {"lr_schedule": {"name": "linear_to_zero", "steps": 5}},
        "linear_to_zero takes no option 'steps'.*allowed: warmup",
    ),
    "negative warm-up": (
        {"lr_schedule": {"name": "linear_to_zero", "warmup": -1}},
        "lr_schedule.warmup: .*greater than or equal to 0; got -1",
    ),
    "warm-up that is no number": (
        {"lr_schedule": {"name": "exponential", "gamma": 0.9, "warmup": "long"}},
        "lr_schedule.warmup: .*valid integer; got 'long'",
    ),
    "warm-up as long as the run": (
        {"lr_schedule": {"name": "exponential", "gamma": 0.9, "warmup": 24}},
        "lr_schedule.warmup: must be below steps, which is 24",
    ),
    "misspelt warm-up": (
        {"lr_schedule": {"name": "exponential", "gamma": 0.9, "warmupp": 2}},
        "did you mean 'warmup'",
    ),
    "fused where it is wrong": (
        {"optimizer.fused": True, "dtype": "bfloat16"},
        "optimizer.fused: .*wrong steps with dtype: bfloat16; leave it away",
    ),
    "fused on columns": (
        {
            "optimizer.fused": True,
            "optimizer.weight_decay": 0.1,
            "optimizer.weight_decay_exclude": "norms_and_biases",
        },
        "optimizer.fused: .*wrong steps with weight_decay_exclude",
    ),
    "clip_norm of zero": ({"gradient": {"clip_norm": 0}}, "gradient.clip_norm: .*greater than 0"),
    "clip_norm without end": ({"gradient": {"clip_norm": math.inf}}, "gradient.clip_norm: "),
    "no micro-batch": ({"gradient": {"accumulate": 0}}, "gradient.accumulate: .*greater than 0"),
    "half a micro-batch": ({"gradient": {"accumulate": 1.5}}, "gradient.accumulate: "),
    "unknown key of gradient": ({"gradient": {"clip": 1}}, "gradient.clip: is not a known key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused(case, quick):
    overrides, message = WRONG[case]
    with pytest.raises(UserError, match=f"(?s){message}"):
        built(quick, **overrides)
