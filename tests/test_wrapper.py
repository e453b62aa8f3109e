"""A training loop of one's own is a run: `wrap` gives what the simulator gives, and fits torch."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from test_readme import one_block
from torch import nn

import decentral
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.sim import Simulator
from decentral.errors import StepError
from decentral.experiment import build
from decentral.tasks import fetch
from decentral.wrapper import AveragingOptimizer

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


def own_loop(rank, config, accelerator=None):
    """The loop that somebody would write, on the batches of the run: what it ends with.

    accelerator: of Hugging Face, where the loop is written with one.
    """
    experiment = build(load(config))
    task, sampler = experiment.task, experiment.sampler([rank])
    model = task.model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank  # all start from rank 0's all the same
    options = dict(config["optimizer"])
    options.pop("name")
    optimizer = torch.optim.SGD(model.parameters(), **options)
    run = model
    if accelerator is not None:
        run = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer = decentral.wrap(run, optimizer, config["algorithm"], config["topology"])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7], gamma=0.5)
    for step in range(config["steps"]):
        inputs, target = (t[0] for t in fetch(task.train, sampler.indices(step)))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = task.loss(run(inputs.double()), target)
        loss.backward() if accelerator is None else accelerator.backward(loss)
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


# Other people's launchers.


LAUNCHED = ("gossip_pga", "gradient_tracking", "local_sgd")


def launched_loops(options):
    """What each process of a launcher does, in the group that is there: its ends, in files."""
    accelerator = None
    if options["accelerate"]:
        from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

        accelerator = Accelerator(cpu=True)
    rank = dist.get_rank()
    for config in options["configs"]:
        x, *_ = own_loop(rank, config, accelerator)
        np.save(f"{options['folder']}/{config['algorithm']['name']}-{rank}.npy", x)


SCRIPT = """import json, sys
import torch.distributed as dist
from test_wrapper import launched_loops
dist.init_process_group("gloo")
launched_loops(json.loads(sys.argv[1]))
dist.destroy_process_group()
"""


def torchrun(options):
    script = Path(options["folder"], "script.py")
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORKERS)]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent)),
    )
    assert done.returncode == 0, done.stderr


def ray_train(options):
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    here = {"PYTHONPATH": str(Path(__file__).parent)}  # the loop is this module's
    ray.init(
        num_cpus=WORKERS + 1,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        runtime_env={"env_vars": here},
    )
    try:
        TorchTrainer(
            launched_loops,
            train_loop_config=options,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RunConfig(storage_path=options["folder"]),
        ).fit()
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("launch", ["torchrun", "accelerate", "ray_train"])
def test_other_launchers_give_the_simulated_run(quick, tmp_path, launch, alone):
    for package in {"accelerate": ["accelerate"], "ray_train": ["pyarrow", "requests"]}.get(
        launch, []
    ):
        pytest.importorskip(package, reason=f"{launch} needs {package}, which is not installed")
    configs = [config_of(quick, method) for method in LAUNCHED]
    options = {"configs": configs, "folder": str(tmp_path), "accelerate": launch == "accelerate"}
    ray_train(options) if launch == "ray_train" else torchrun(options)
    for config in configs:
        simulator = Simulator(experiment := build(load(config)))
        list(Coordinator(experiment, simulator).run())
        name = config["algorithm"]["name"]
        x = np.stack([np.load(tmp_path / f"{name}-{rank}.npy") for rank in range(WORKERS)])
        np.testing.assert_allclose(x, simulator.replica.x, rtol=1e-9, atol=1e-11, err_msg=name)


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


def gradient(model, name):
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


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
    # The bias before the norm has no gradient but rounding, which a small eps would blow up.
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, eps=1e-4),
    # Not element-wise: it has moments of rows and columns.
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.02),
}


@pytest.mark.parametrize("loop", [plain, accumulated, with_closure, autocast, freezing])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_worker_alone_trains_as_the_bare_optimizer_does(alone, make, loop):
    dtype = torch.float32 if loop is autocast else torch.float64
    ends, states = [], []
    for wrapped in (False, True):
        model = network(dtype)
        optimizer = make(two_groups(model))
        if wrapped:
            optimizer = decentral.wrap(model, optimizer, "local_sgd", period=2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for step in range(6):
            loop(model, optimizer, scheduler, step)
        ends.append(model.state_dict())
        states.append(optimizer.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert states[1]["param_groups"] == states[0]["param_groups"]
    rtol, atol = (1e-4, 1e-6) if loop is autocast else (1e-12, 1e-12)
    torch.testing.assert_close(states[1]["state"], states[0]["state"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("method", ["parallel_sgd", "gossip_sgd", "gradient_tracking"])
def test_sparse_gradients_step_and_are_tracked_as_dense_ones(alone, method):
    ends = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Embedding(7, 3, sparse=wrapped), nn.Linear(3, 1))
        optimizer = sgd(model)
        if wrapped:
            optimizer = decentral.wrap(model, optimizer, method, "complete")
        for step in range(3):
            optimizer.zero_grad()
            model(torch.tensor([step, step + 2, step])).square().mean().backward()
            optimizer.step()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_a_scheduler_made_before_wrap_sets_the_learning_rate_too(alone):
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(bare, 1, gamma=0.5)
    optimizer = decentral.wrap(model, bare, "local_sgd", period=2)
    bias = model.get_parameter("0.bias")
    before = bias.detach().clone()
    for _ in range(2):
        model.zero_grad()
        bias.sum().backward()
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(bias.detach(), before - 1.0 - 0.5)


@pytest.mark.parametrize("hooked", ["bare", "wrapped"])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_a_step_are_called_once_a_step(alone, hooked, when):
    model = network()
    bare = sgd(model)
    wrapped = decentral.wrap(model, bare, "local_sgd", period=2)
    weights = []
    register = getattr(bare if hooked == "bare" else wrapped, f"register_step_{when}_hook")
    register(lambda *_: weights.append(model.get_parameter("0.weight").detach().clone()))
    before = model.get_parameter("0.weight").detach().clone()
    for step in range(3):
        model(batch(step)).square().mean().backward()
        wrapped.step()
    assert len(weights) == 3
    assert torch.equal(weights[0], before) == (when == "pre")


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
                gradient(model, "0.weight")[0, 0] = math.inf
            if step == 2:  # as whoever clips gradients does
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append((model.state_dict(), scaler.get_scale()))
        if isinstance(optimizer, AveragingOptimizer):
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
        run = cast(nn.Module, torch.compile(model)) if compiles and compiled_first else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = decentral.wrap(run, optimizer, "local_sgd", period=2)
        if compiles and not compiled_first:
            run = cast(nn.Module, torch.compile(model))
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
    "a line search": (
        lambda model: torch.optim.LBFGS(model.parameters()),
        {"algorithm": "parallel_sgd"},
        "LBFGS asks for the loss at points of its own",
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


# Several workers.


def trained(rank, steps, resumed_at=None):
    """The model after `steps`, and its optimizer; from a checkpoint where one is taken."""

    def begin():
        model = network()
        optimizer = torch.optim.AdamW(two_groups(model), lr=0.02)
        schedule = {"name": "adaptive", "initial_period": 2, "warmup": 3}
        method = {"name": "gradient_tracking", "schedule": schedule}
        return model, decentral.wrap(model, optimizer, method, {"name": "complete"})

    model, optimizer = begin()
    for step in range(steps):
        if step == resumed_at:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            model, optimizer = begin()
            state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        optimizer.zero_grad()
        loss = model(batch(step, rank)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return model, optimizer


def resuming(rank):
    ends = []
    for resumed_at in (None, 4, 7):
        model, optimizer = trained(rank, 9, resumed_at)
        x = torch.cat([p.detach().flatten() for p in model.parameters()])
        ends.append((x.tolist(), optimizer.period, optimizer.steps, optimizer.bytes_sent))
    return ends


def overflowing(rank):
    """Worker 1 finds an infinity at step 1: who has taken how many steps, and moved where."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = decentral.wrap(model, sgd(model, lr=1.0), "gossip_sgd", "ring")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.full((1, 2), float(rank + 1), dtype=torch.float64)
        scaler.scale(model(x).sum()).backward()
        if rank == 1 and step == 1:
            gradient(model, "weight").fill_(math.nan)
        scaler.step(optimizer)
        scaler.update()
    return optimizer.steps, model.weight.detach().tolist()


def normalising(rank):
    """One step of batch normalisation: the averaged model within the context, and after it."""
    model = nn.BatchNorm1d(1, dtype=torch.float64)
    optimizer = decentral.wrap(model, sgd(model, lr=1.0), "local_sgd", period=3)
    for _ in range(rank + 1):
        model(torch.full((2, 1), float(rank), dtype=torch.float64))
    model.bias.grad = torch.full_like(model.bias, rank)
    optimizer.step()
    own = [t.tolist() for t in model.state_dict().values()]
    apart = optimizer.consensus_distance()
    with optimizer.averaged():
        mean = {name: t.tolist() for name, t in model.state_dict().items()}
    assert [t.tolist() for t in model.state_dict().values()] == own
    model.get_buffer("running_mean").fill_(float(rank))
    for _ in range(2):
        optimizer.step()  # without a gradient of its own bias goes on along the last
    averaged, counted = model.state_dict()["running_mean"], model.num_batches_tracked
    assert counted is not None
    return mean, apart, averaged.item(), counted.item()


def staying_local(rank):
    model = nn.BatchNorm1d(1, dtype=torch.float64)
    optimizer = decentral.wrap(model, sgd(model), "parallel_sgd", buffers="local")
    model(torch.full((2, 1), float(rank), dtype=torch.float64))
    optimizer.step()
    return model.get_buffer("running_mean").item()


def deserting(rank):
    """Worker 1 does not step: what worker 0 and 2 are told, and are told again."""
    model = network()
    optimizer = decentral.wrap(model, sgd(model), "gossip_sgd", "ring", timeout_s=1.0)
    told = []
    if rank != 1:
        for _ in range(2):
            with pytest.raises(StepError) as failure:
                optimizer.step()
            told.append(str(failure.value))
    return told


def scenarios(rank):
    parts = (resuming, overflowing, normalising, staying_local, deserting)
    return {part.__name__: part(rank) for part in parts}


@pytest.fixture(scope="module")
def three_workers():
    return run_on_ranks(3, scenarios)


@pytest.mark.slow
def test_a_resumed_loop_is_the_one_that_nobody_stopped(three_workers):
    for worker in three_workers:
        whole, *resumed = worker["resuming"]
        assert resumed == [whole, whole]
        assert whole[1] != 2  # the period has moved


@pytest.mark.slow
def test_an_infinity_on_one_worker_is_no_step_on_all(three_workers):
    # Two steps of gradient -(rank + 1) with W = J: the mean, -2, after each.
    for worker in three_workers:
        assert worker["overflowing"] == (2, [[pytest.approx(-4.0)] * 2])


@pytest.mark.slow
def test_the_averaged_model_is_there_while_it_is_asked_for(three_workers):
    # After rank + 1 batches of mean `rank`, running_mean is rank (1 - 0.9^(rank + 1)).
    running = [rank * (1 - 0.9 ** (rank + 1)) for rank in range(3)]
    for rank, worker in enumerate(three_workers):
        mean, apart, averaged, counted = worker["normalising"]
        assert mean["bias"] == pytest.approx([-1.0])
        assert mean["running_mean"] == pytest.approx([sum(running) / 3])
        assert mean["num_batches_tracked"] == rank + 1
        assert apart == pytest.approx(math.sqrt(2 / 3))
        assert averaged == pytest.approx(1.0)  # float buffers, at the global average
        assert counted == rank + 1


@pytest.mark.slow
def test_buffers_stay_each_workers_own_where_they_are_to(three_workers):
    means = [worker["staying_local"] for worker in three_workers]
    assert means == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.slow
def test_a_failed_exchange_names_worker_and_step(three_workers):
    for rank in (0, 2):
        first, again = three_workers[rank]["deserting"]
        assert first.startswith(f"worker {rank} at step 0: ")
        assert again == first


@pytest.mark.slow
def test_torchrun_runs_the_script_that_the_readme_shows(tmp_path):
    lines = one_block("diff", "decentral.wrap").splitlines()
    assert sum(line.startswith("+") and len(line) > 1 for line in lines) == 7
    for script, marks, launcher in (
        ("before", " -", []),
        ("after", " +", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]),
    ):
        path = tmp_path / f"{script}.py"
        path.write_text("".join(f"{line[1:]}\n" for line in lines if (line or " ")[0] in marks))
        done = subprocess.run(
            [sys.executable, *launcher, str(path)],
            capture_output=True,
            text=True,
            timeout=240,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
        assert done.returncode == 0, done.stderr
        accuracies = [float(word) for word in re.findall(r"accuracy (\d\.\d+)", done.stdout)]
        assert len(accuracies) == (1 if script == "before" else 4)
        assert min(accuracies) > 0.85
        if script == "after":
            assert len(set(accuracies)) == 1, "all evaluate the mean"
