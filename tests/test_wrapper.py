"""A training loop of one's own is a run: `wrap` gives what the simulator gives, and fits torch."""

import io
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch import nn

import decentral
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.tasks import fetch

WORKERS = 4
METHODS = {
    "parallel_sgd": {},
    "local_sgd": {"period": 5},
    "post_local_sgd": {"period": 4},
    "qsr": {"base_period": 2, "alpha": 0.2},
    "hierarchical_sgd": {"period": 8, "group_period": 2, "groups": 2},
    "slowmo": {"period": 5},
    "diloco": {"period": 5},
    "gossip_sgd": {"wire": {"name": "int8"}, "gossip_period": 2},
    "gossip_pga": {"period": 5},
    "gossip_aga": {"initial_period": 2, "warmup": 6},
    "consensus_control": {"fraction": 0.05, "every": 3},
    "gossip_cta": {},
    "gradient_tracking": {},
    "gt_pga": {"period": 5},
    "d2": {},
    "qg_dsgdm": {},
    "decentlam": {},
    "sgp": {},
    "relay_sgd": {},
    "noloco": {"period": 3},
    "choco_sgd": {"compression": {"name": "random_k", "fraction": 0.2}, "consensus_step": 0.4},
}


def config_of(quick, method):
    own_momentum = method in ("qg_dsgdm", "decentlam")
    return quick | {
        "workers": WORKERS,
        "steps": 16,
        "algorithm": {"name": method, **METHODS[method]},
        "topology": {"name": "path" if method in ("relay_sgd", "d2") else "ring"},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0 if own_momentum else 0.9},
        "lr_schedule": {"name": "step", "milestones": [7], "gamma": 0.5},
        "record": {"every": 16},
    }


def own_loop(rank, config):
    """The loop that somebody would write, on the batches of the run: what it ends with."""
    experiment = build(load(config))
    task, sampler = experiment.task, experiment.sampler([rank])
    model = task.model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank  # all start from rank 0's all the same
    options = dict(config["optimizer"])
    options.pop("name")
    optimizer = torch.optim.SGD(model.parameters(), **options)
    optimizer = decentral.wrap(model, optimizer, config["algorithm"], config["topology"])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7], gamma=0.5)
    for step in range(config["steps"]):
        inputs, target = (t[0] for t in fetch(task.train, sampler.indices(step)))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = task.loss(model(inputs.double()), target)
        loss.backward()
        optimizer.step(loss=loss)
        scheduler.step()
    x = torch.cat([p.detach().flatten() for p in model.parameters()])
    return x.numpy(), optimizer.bytes_sent, optimizer.period, optimizer.consensus_distance()


def own_loops(rank, configs):
    return [own_loop(rank, config) for config in configs]


@pytest.mark.slow
def test_a_loop_of_ones_own_is_the_simulated_run(quick):
    configs = [config_of(quick, method) for method in METHODS]
    seen = run_on_ranks(WORKERS, own_loops, configs)
    for number, config in enumerate(configs):
        name = config["algorithm"]["name"]
        simulator = Simulator(experiment := build(load(config)))
        coordinator = Coordinator(experiment, simulator)
        list(coordinator.run())
        ends = [seen[rank][number] for rank in range(WORKERS)]
        x = torch.stack([torch.from_numpy(end[0]) for end in ends])
        torch.testing.assert_close(x, simulator.replica.x, rtol=1e-9, atol=1e-11, msg=name)
        assert sum(end[1] for end in ends) == simulator.replica.comm.bytes_sent, name
        assert {end[2] for end in ends} == {experiment.algorithm.schedule.period}, name
        apart = (x - x.mean(0)).square().sum(1).mean().sqrt()
        assert ends[0][3] == pytest.approx(float(apart), rel=1e-9, abs=1e-12), name


# With one worker, the wrapped optimizer is the bare one.


@pytest.fixture
def alone():
    """A group of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).to(dtype)


def batch(step, rank=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64).to(dtype)


def two_groups(model):
    decays = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": decays}, {"params": others, "lr": 0.03, "weight_decay": 0.0}]


def plain(model, optimizer, scheduler, step):
    optimizer.zero_grad()
    model(batch(step)).square().mean().backward()
    optimizer.step()
    scheduler.step()


def accumulated(model, optimizer, scheduler, step):
    optimizer.zero_grad(set_to_none=False)
    for micro in range(3):
        (model(batch(3 * step + micro)).square().mean() / 3).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    scheduler.step()


def with_closure(model, optimizer, scheduler, step):
    def closure():
        model.zero_grad()  # not the optimizer's
        loss = model(batch(step)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    scheduler.step()


def autocast(model, optimizer, scheduler, step):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch(step, dtype=next(model.parameters()).dtype)).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step()


def freezing(model, optimizer, scheduler, step):
    optimizer.zero_grad()
    (model(batch(step)).square().mean() if step % 2 else model[0](batch(step)).mean()).backward()
    for parameter in model[3].parameters():  # the first half of the steps gives it no gradient
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for parameter in model[1].parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1, 0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("loop", [plain, accumulated, with_closure, autocast, freezing])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_worker_alone_trains_as_the_bare_optimizer_does(alone, make, loop):
    dtype = torch.float32 if loop is autocast else torch.float64
    ends = []
    for wrapped in (False, True):
        model = network(dtype)
        optimizer = make(two_groups(model))
        if wrapped:
            optimizer = decentral.wrap(model, optimizer, "local_sgd", period=2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for step in range(6):
            loop(model, optimizer, scheduler, step)
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_scheduler_made_before_wrap_sets_the_learning_rate_too(alone):
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(bare, 1, gamma=0.5)
    optimizer = decentral.wrap(model, bare, "local_sgd", period=2)
    before = model[0].bias.detach().clone()
    for step in range(2):
        model.zero_grad()
        model[0].bias.sum().backward()
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(model[0].bias.detach(), before - 1.0 - 0.5)


def test_grad_scaler_scales_and_skips_as_with_the_bare_optimizer(alone):
    ends = []
    for wrapped in (False, True):
        model = network(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrapped:
            optimizer = decentral.wrap(model, optimizer, "local_sgd", period=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(batch(step, dtype=torch.float32)).square().mean()).backward()
            if step == 1:
                model[0].weight.grad[0, 0] = math.inf
            if step == 2:  # as whoever clips gradients does
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append((model.state_dict(), scaler.get_scale()))
        if wrapped:
            assert optimizer.steps == 3
    assert ends[0][1] == ends[1][1] == 4.0
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model_trains_as_a_plain_one(alone, compiled_first):
    ends = []
    for compiles in (False, True):
        model = network()
        run = torch.compile(model) if compiles and compiled_first else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = decentral.wrap(run, optimizer, "local_sgd", period=2)
        if compiles and not compiled_first:
            run = torch.compile(model)
        for step in range(3):
            optimizer.zero_grad()
            run(batch(step)).square().mean().backward()
            optimizer.step()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-9, msg=name)


# What does not fit is refused, with a remedy.


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def stepped(model):
    optimizer = sgd(model, momentum=0.9)
    model(batch(0)).sum().backward()
    optimizer.step()
    return optimizer


REFUSED = {
    "asynchronous": (
        sgd,
        {"algorithm": "ad_psgd", "topology": "ring"},
        "algorithm.name: in ad_psg",
    ),
    "no gradient": (sgd, {"algorithm": "zo_sgd"}, "algorithm.name: zo_sgd asks for losses"),
    "particles": (sgd, {"algorithm": "cbo"}, "algorithm.name: cbo asks for losses"),
    "no such method": (sgd, {"algorithm": "gossip"}, "algorithm.name: there is no algorithm"),
    "no such option": (sgd, {"algorithm": "local_sgd", "perod": 2}, "algorithm.perod"),
    "wrong option": (sgd, {"algorithm": "local_sgd", "period": 0}, "algorithm.period"),
    "no topology": (sgd, {"algorithm": "gossip_sgd"}, "topology: gossip_sgd averages over a gra"),
    "no such topology": (sgd, {"algorithm": "gossip_sgd", "topology": "rign"}, "'ring'"),
    "momentum twice": (
        lambda model: sgd(model, momentum=0.9),
        {"algorithm": "decentlam", "topology": "ring"},
        "brings its own momentum",
    ),
    "buffers": (sgd, {"algorithm": "parallel_sgd", "buffers": "recalibrate"}, "buffers: must be"),
    "timeout": (sgd, {"algorithm": "parallel_sgd", "timeout_s": 0}, "timeout_s: must be above"),
    "not element-wise": (
        lambda model: torch.optim.Adafactor(model.parameters()),
        {"algorithm": "parallel_sgd"},
        "Adafactor is not element-wise",
    ),
    "a line search": (
        lambda model: torch.optim.LBFGS(model.parameters()),
        {"algorithm": "parallel_sgd"},
        "LBFGS does not step",
    ),
    "in training": (stepped, {"algorithm": "parallel_sgd"}, "has taken steps already"),
    "left out": (
        lambda model: torch.optim.SGD(model[0].parameters(), lr=0.1),
        {"algorithm": "parallel_sgd"},
        "1.weight trains but is not in the optimizer",
    ),
    "another model's": (
        lambda model: torch.optim.SGD([*model.parameters(), *network().parameters()], lr=0.1),
        {"algorithm": "parallel_sgd"},
        "none of the model's",
    ),
}


@pytest.mark.parametrize(("make", "options", "told"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(alone, make, options, told):
    model = network()
    with pytest.raises(decentral.UserError, match=told):
        decentral.wrap(model, make(model), **options)


def test_a_wrapper_needs_a_group_of_workers():
    model = network()
    with pytest.raises(decentral.UserError, match="init_process_group"):
        decentral.wrap(model, sgd(model), "parallel_sgd")


def test_a_model_is_refused_whose_tensors_share_no_buffer(alone):
    model = network()
    model[3].float()
    with pytest.raises(decentral.UserError, match=r"float32 on cpu, torch\.float64 on cpu"):
        decentral.wrap(model, sgd(model), "parallel_sgd")
    inside = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(decentral.UserError, match="wrap the module inside"):
        decentral.wrap(inside, sgd(inside), "parallel_sgd")


def test_a_wrapped_model_and_optimizer_are_held_to_what_they_were(alone):
    model = network()
    optimizer = decentral.wrap(model, bare := sgd(model), "gossip_aga", "ring")
    with pytest.raises(decentral.UserError, match="wrap it once"):
        decentral.wrap(model, optimizer, "parallel_sgd")
    with pytest.raises(decentral.UserError, match="add groups before wrap"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(decentral.UserError, match=r"optimizer\.step\(loss=loss\)"):
        optimizer.step()
    with pytest.raises(decentral.UserError, match="bare optimizer"):
        optimizer.load_state_dict(bare.state_dict())
    state = optimizer.state_dict()
    state["decentral"]["workers"] = 2
    with pytest.raises(decentral.UserError, match="start as many"):
        optimizer.load_state_dict(state)
    model.float()
    with pytest.raises(decentral.UserError, match=r"0\.weight is elsewhere"):
        optimizer.step(loss=1.0)


def test_a_method_that_reckons_with_one_learning_rate_takes_no_other(alone):
    model = network()
    optimizer = decentral.wrap(
        model, torch.optim.SGD(two_groups(model), lr=0.1), "slowmo", period=2
    )
    with pytest.raises(decentral.UserError, match=r"groups have \[0\.03, 0\.1\]"):
        optimizer.step()
