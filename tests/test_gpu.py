"""On a GPU as on the CPU: the simulator, a worker alone, workers that share one card, the wrapper.

Every test skips where there is no CUDA device. One card is enough: two ranks on one card exchange
through gloo and pinned host memory, which is what the workers of a shared card do.
"""

import importlib.util
import os
import random
import shutil
import warnings

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_on_ranks
from torch import nn

import decentral
from decentral import comm as door
from decentral import topology as topologies
from decentral.comm import StackedComm
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.cuda_graph import MOST_GRAPHS, CudaGraphs
from decentral.engines.sim import Simulator
from decentral.engines.worker import Group, Surroundings, Worker
from decentral.experiment import build
from decentral.gradients import StackedGradient
from decentral.mixing import Mixing
from decentral.peer import PeerComm
from decentral.replica import Averaging, Segment
from decentral.wrapper import wrap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed here"
)

WORKERS = 3
STEPS = 12
METHODS = {
    "gossip_pga": {"period": 4},
    "gradient_tracking": {},
    "local_sgd": {"period": 4},
}
# Codes round: where float32 differs in its last bit, a code may differ in its first.
CODED = {
    "choco_sgd": {"compression": {"name": "top_k", "fraction": 0.2}, "consensus_step": 0.4},
    "gossip_sgd": {"wire": {"name": "int8"}},
}
# A message for each neighbour; means of groups.
OTHERS = {"relay_sgd": {}, "hierarchical_sgd": {"period": 6, "group_period": 2, "groups": 2}}


def images(workers, seed):
    """A small convolutional net with BatchNorm, on random images."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(120, 1, 8, 8, generator=generator)
    y = (x.mean(dim=(1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36, 4),
        )
    return decentral.Task(model, nn.functional.cross_entropy, train=(x, y), test=(x, y))


TASKS = {
    "mlp": {"name": "digits", "batch_size": 8, "model": {"name": "mlp", "hidden": [8]}},
    "cnn": {"name": "test_gpu:images", "batch_size": 8},
}


def config_of(method, task="mlp", dtype="float64", **more):
    name, options = method, {**METHODS, **CODED, **OTHERS}[method]
    tree = name == "relay_sgd"
    return {
        "workers": WORKERS,
        "steps": STEPS,
        "dtype": dtype,
        "task": TASKS[task],
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "algorithm": {"name": name, **options},
        "topology": {"name": "path" if tree else "ring"},
        "network": {"compute_ms": 1},
        "record": {"every": 4, "evaluate_every": 12},
        **more,
    }


@pytest.fixture(autouse=True)
def whole_precision():
    """Convolutions in float32: by default cuDNN takes them in TF32, whose products have 10 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves the setting
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        yield
        torch.backends.cudnn.allow_tf32 = before


# The simulator.


def simulated(config, device):
    """The records and the replica of a run."""
    experiment = build(load(config, {"sim.device": device}))
    simulator = Simulator(experiment)
    records = [r for r in Coordinator(experiment, simulator).run() if r is not None]
    return records, simulator.replica


def exact(method):
    """rtol, atol in float64: the scale of int8 is sent in float32, whose last bit may differ."""
    return (1e-5, 1e-6) if method == "gossip_sgd" else (1e-9, 1e-12)


def assert_same_records(records, expected, rtol, atol):
    assert len(records) == len(expected) == 3
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["bytes_sent"] == theirs["bytes_sent"]
        for key in {"loss", "consensus_distance", "eval_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=rtol, abs=atol), key


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, dtype) for method in METHODS for dtype in ("float32", "float64")]
    + [(method, "float64") for method in CODED],
)
def test_the_simulator_gives_the_same_run_on_a_gpu(method, dtype, task):
    config = config_of(method, task, dtype)
    (on_cpu, cpu), (on_gpu, gpu) = (simulated(config, device) for device in ("cpu", "cuda"))
    assert gpu.x.device.type == "cuda"
    rtol, atol = (1e-4, 1e-5) if dtype == "float32" else exact(method)
    assert_same_records(on_gpu, on_cpu, rtol, atol)
    torch.testing.assert_close(gpu.x.cpu(), cpu.x, rtol=rtol, atol=atol)
    torch.testing.assert_close(gpu.buffers.cpu(), cpu.buffers, rtol=rtol, atol=atol)


def test_autocast_on_a_gpu_rounds_products_alone():
    config = config_of("gossip_pga", "cnn", "float32")
    _, plain = simulated(config, "cuda")
    _, lowered = simulated(config | {"gradient": {"autocast": "bfloat16"}}, "cuda")
    assert lowered.x.dtype == torch.float32
    off = (lowered.x - plain.x).norm() / plain.x.norm()
    assert 1e-6 < off < 0.05  # eight bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ring", "exponential"])
def test_mixing_on_a_gpu_is_the_matrix_product_and_the_same_each_time(name, dtype, monkeypatch):
    monkeypatch.setattr(door, "BLOCK_BYTES", {"cuda": 64 * 1024 * 8})  # some blocks of columns
    n, size = 64, 5000
    topology = topologies.build(n, name)
    comm = StackedComm(n, Mixing(topology), dtype, "cuda")
    x = torch.randn(n, size, dtype=torch.float64, device="cuda").to(dtype)
    W = torch.from_numpy(topology.matrix(0).toarray()).cuda()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    ends = [x.clone() for _ in range(10)]
    for end in ends:
        comm.mix_(end, 0)
        assert torch.equal(end, ends[0])
    torch.testing.assert_close(ends[0].double(), W @ x.double(), rtol=tolerance, atol=tolerance)
    out_of_place = comm.mix(x, 0).to(dtype)
    torch.testing.assert_close(out_of_place, ends[0], rtol=tolerance, atol=tolerance)


# CUDA graphs.


class Restless(nn.Module):
    """A layer that does what a CUDA graph would do once and for all, or not at all."""

    def __init__(self, how):
        super().__init__()
        self.how, self.passes = how, 0

    def forward(self, x):
        return x * self.factor(x)

    def factor(self, x):
        match self.how:
            case "dropout":
                return nn.functional.dropout(torch.ones_like(x), 0.3)
            case "counts":
                self.passes += 1
                return 1 / self.passes
            case "draws":
                return random.random()
            case "draws with numpy":
                return np.random.rand()
            case "waits":
                return torch.tensor(0.5).to(x.device)
            case "waits unseen":
                torch.cuda.synchronize()  # torch's own watch lets it pass, a recording does not
                return 0.5


def restless(workers, seed, *, how):
    task = images(workers, seed)
    assert isinstance(task.model, nn.Sequential)
    task.model.append(Restless(how))
    return task


def gradient_of(replica) -> StackedGradient:
    return replica._gradient


BY_GRAPH = {
    "mlp": {},
    "cnn": {"task": TASKS["cnn"]},
    "dropout": {"task": {"name": "test_gpu:restless", "how": "dropout", "batch_size": 8}},
    "micro-batches": {"task": TASKS["cnn"], "gradient": {"accumulate": 2, "clip_norm": 0.5}},
    "autocast": {"task": TASKS["cnn"], "gradient": {"autocast": "bfloat16"}},
}


@pytest.mark.parametrize("kind", BY_GRAPH)
def test_a_cuda_graph_gives_the_same_run_to_the_bit(kind, caplog):
    config = config_of("gossip_pga", dtype="float32") | BY_GRAPH[kind]
    seen = []
    for by_graph in (True, False):
        with_or_without = config | {"sim": {"device": "cuda", "cuda_graph": by_graph}}
        seen.append(simulated(with_or_without, "cuda"))
    (records, replica), (expected, launched) = seen
    graphs = gradient_of(replica)._graphs
    assert graphs is not None
    assert len(graphs._graphs) == (2 if kind == "micro-batches" else 1)
    assert gradient_of(launched)._graphs is None
    assert "CUDA graph" not in caplog.text
    assert torch.equal(replica.x, launched.x)
    assert torch.equal(replica.buffers, launched.buffers)
    for name, counter in launched.counters.items():
        assert torch.equal(replica.counters[name], counter), name
    assert_same_records(records, expected, 0, 0)


def test_a_cuda_graph_draws_anew_at_each_step(monkeypatch):
    _, replica = simulated(config_of("gossip_pga") | BY_GRAPH["dropout"], "cuda")
    gradient = gradient_of(replica)
    batch = gradient._batch(3)
    monkeypatch.setattr(gradient, "_batch", lambda *_: batch)
    one, again, other = (gradient(step) for step in (3, 3, 5))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("counts", "changes an attribute"),
        ("draws", "draws on the host"),
        ("draws with numpy", "draws on the host"),
        ("waits", "synchroniz"),
        ("waits unseen", "captur"),
    ],
)
def test_a_model_that_a_cuda_graph_cannot_repeat_goes_without(how, reason, caplog):
    task = {"name": "test_gpu:restless", "how": how, "batch_size": 8}
    config = config_of("gossip_pga", dtype="float32") | {"task": task}
    seen = []
    for by_graph in (True, False):
        random.seed(1)
        np.random.seed(1)
        with_or_without = config | {"sim": {"device": "cuda", "cuda_graph": by_graph}}
        seen.append(simulated(with_or_without, "cuda"))
    (_, replica), (_, launched) = seen
    graphs = gradient_of(replica)._graphs
    assert graphs is not None
    assert not graphs._graphs
    (said,) = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert reason in said.lower()
    assert torch.equal(replica.x, launched.x)
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator goes on


def test_arguments_of_many_shapes_make_few_graphs():
    graphs = CudaGraphs(nn.Identity())
    for _ in range(4):
        for length in range(1, 13):
            x = torch.rand(length, device="cuda")
            assert torch.equal(
                graphs(lambda tensors: tensors[0].square().cumsum(0), (x,), "set"),
                x.square().cumsum(0),
            )
    assert len(graphs._graphs) == MOST_GRAPHS


OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "adamw": {"name": "adamw", "lr": 0.01},
    "rmsprop": {"name": "rmsprop", "lr": 0.01},  # torch has no fused form of it
}


@needs_ray
@pytest.mark.parametrize(
    ("method", "task", "optimizer"),
    [
        ("gradient_tracking", "cnn", "sgd"),
        ("gossip_pga", "mlp", "adamw"),
        ("gossip_pga", "mlp", "rmsprop"),
    ],
)
def test_a_run_begun_on_a_gpu_goes_on_on_the_cpu(method, task, optimizer, tmp_path):
    config = config_of(method, task, checkpoint={"every": 6})
    config["optimizer"] = OPTIMIZERS[optimizer]
    whole = decentral.run(config)
    on_gpu = config | {"sim": {"device": "cuda"}, "steps": 6}
    decentral.run(on_gpu, out=tmp_path / "run")
    resumed = decentral.resume(tmp_path / "run", steps=STEPS, sim={"device": "cpu"})
    for name, value in whole.model.state_dict().items():
        ours = resumed.model.state_dict()[name]
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12, msg=name)


# Workers in processes of their own.


def segments(algorithm, steps):
    """As the coordinator cuts them, without records."""
    step = 0
    while step < steps:
        average = algorithm.schedule.next_average(step)
        stop = steps if average is None else min(steps, average + 1)
        yield Segment(step, stop, algorithm.between, stop - 1 == average, record=False)
        step = stop


def rows(config):
    """What the simulator's workers end with, on the CPU: x and buffers."""
    experiment = build(load(config))
    simulator = Simulator(experiment)
    for segment in segments(experiment.algorithm, STEPS):
        simulator.run(segment)
    return simulator.replica.x, simulator.replica.buffers


def worked(rank, ports, configs, devices):
    """The same by a worker, config after config: x and buffers of this rank."""
    # This module is imported anew here, so its fixtures are not in force.
    torch.backends.cudnn.allow_tf32 = False
    ends = []
    worker = Worker()
    for port, config in zip(ports, configs, strict=True):
        meeting = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        loaded = load(config | {"engine": "ray"})
        members = tuple(range(loaded.workers))
        worker.build(loaded, None, rank, Surroundings.here(), devices[rank])
        if rank == 0:
            meeting.set("port", str(worker.listen("127.0.0.1")))
        topology = build(loaded).topology
        meets = int(meeting.get("port"))
        worker.connect("127.0.0.1", meets, "127.0.0.1", Group(members, topology))
        for segment in segments(build(loaded).algorithm, STEPS):
            assert worker.run(segment).failure is None
        replica = worker._joined
        assert replica.x.device.type == devices[rank]
        ends.append((replica.x.cpu().numpy(), replica.buffers.cpu().numpy(), dist.get_backend()))
    return ends


def assert_worked(configs, seen, backend):
    for number, config in enumerate(configs):
        x, buffers = rows(config)
        for rank, ends in enumerate(seen):
            own, own_buffers, used = ends[number]
            name = f"{config['algorithm']['name']}, worker {rank}"
            rtol, atol = exact(config["algorithm"]["name"])
            for seen_here, expected in ((own, x[rank]), (own_buffers, buffers[rank])):
                np.testing.assert_allclose(seen_here, expected, rtol, atol, err_msg=name)
            assert used == backend


SHARED = {"ray": {"gpus_per_worker": 0.25}}
MIXED = {"ray": {"gpus_per_worker": 0.25, "cpu_workers": 1}}
WHOLE = {"ray": {"gpus_per_worker": 1}}


def test_workers_that_share_a_card_give_the_simulated_run():
    configs = [config_of(method, "cnn") | SHARED for method in (*METHODS, *CODED, *OTHERS)]
    ports = [free_port() for _ in configs]
    seen = run_on_ranks(WORKERS, worked, ports, configs, ["cuda"] * WORKERS)
    assert_worked(configs, seen, "gloo")


def test_workers_on_gpus_and_cpus_give_the_simulated_run():
    configs = [config_of(method, "cnn") | MIXED for method in METHODS]
    ports = [free_port() for _ in configs]
    seen = run_on_ranks(WORKERS, worked, ports, configs, ["cuda", "cpu", "cuda"])
    assert_worked(configs, seen, "gloo")


def test_a_worker_with_a_card_of_its_own_takes_nccl():
    configs = [config_of("local_sgd", "cnn", workers=1) | WHOLE]
    seen = run_on_ranks(1, worked, [free_port()], configs, ["cuda"])
    assert_worked(configs, seen, "nccl")


@needs_ray
@pytest.mark.parametrize(
    ("section", "told"),
    [({"gpus_per_worker": 0.25}, "some share one"), ({**MIXED["ray"]}, "some have none")],
)
def test_ray_workers_that_share_a_card_exchange_through_gloo(section, told):
    from decentral.engines.ray import RayEngine

    config = config_of("gossip_pga", "cnn", workers=4, ray=section)
    expected, _ = simulated(config, "cpu")
    said = []
    experiment = build(load(config, {"engine": "ray"}))
    engine = RayEngine(experiment, said.append)
    try:
        devices = engine.ask(_device)
        parents = set(engine.ask(_parent))
        nursery = {p.pid for p in psutil.Process().children() if "decentral.nursery" in p.cmdline()}
        records = [r for r in Coordinator(experiment, engine).run() if r is not None]
    finally:
        engine.close()
    assert sorted(devices) == ["cpu"] * section.get("cpu_workers", 0) + ["cuda"] * (
        4 - section.get("cpu_workers", 0)
    )
    assert any(told in line and "gloo" in line for line in said)
    assert parents == nursery
    assert_same_records(records, expected, 1e-9, 1e-12)


def _device(worker):
    return worker.device


def _parent(worker):
    return os.getppid()


# Memory.

SIZE = 4 * 2**20  # float32: 16 MiB, of which the GPU's allocator makes no other number
LITTLE = 2**20


def exchanged(rank):
    """Extra bytes on the GPU at the peak of a mix and of a mean, how many this rank hears, and
    how far the results are off; pinned or not, the buffers in host memory."""
    x = torch.arange(SIZE, device="cuda", dtype=torch.float32) / SIZE + rank
    topology = topologies.build(dist.get_world_size(), "path")
    comm = PeerComm(Mixing(topology), device="cuda")
    mixed, seen = torch.empty_like(x), []

    def mix():
        comm.mix_(mixed.copy_(x), 0)
        return mixed

    for act in (mix, lambda: comm.mean(x, 0)):
        act()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = act()
        torch.cuda.synchronize()
        seen.append((torch.cuda.max_memory_allocated() - before, float((result - x)[1234])))
        del result
    pinned = all(buffer.is_pinned() for spare in comm._buffers.values() for buffer in spare)
    return seen, pinned


def test_an_exchange_takes_a_buffer_for_each_neighbour_that_is_heard():
    seen = run_on_ranks(WORKERS, exchanged)
    W = topologies.build(WORKERS, "path").matrices[0].toarray()
    models = torch.arange(WORKERS, dtype=torch.float64).numpy()
    for rank, (((mixing, mixed), (averaging, mean)), pinned) in enumerate(seen):
        heard = (1, 2, 1)[rank]
        assert mixing <= heard * 4 * SIZE + LITTLE
        assert averaging <= 4 * SIZE + LITTLE
        assert mixed == pytest.approx((W @ models)[rank] - rank, abs=1e-5)
        assert mean == pytest.approx(1.0 - rank, abs=1e-5)
        assert pinned


def stepped(rank, port):
    """Peak bytes above what lies there between steps, of a step without and with an exchange."""
    config = config_of("gossip_sgd", dtype="float32") | SHARED
    config["algorithm"] = {"name": "gossip_sgd"}
    config["task"] = {**TASKS["mlp"], "model": {"name": "mlp", "hidden": [1024, 1024]}}
    meeting = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    loaded = load(config | {"engine": "ray"})
    worker = Worker()
    worker.build(loaded, None, rank, Surroundings.here(), "cuda")
    if rank == 0:
        meeting.set("port", str(worker.listen("127.0.0.1")))
    group = Group(tuple(range(WORKERS)), build(loaded).topology)
    worker.connect("127.0.0.1", int(meeting.get("port")), "127.0.0.1", group)
    peaks = []
    for step, between in enumerate([Averaging.NEIGHBOURS, Averaging.NOBODY, Averaging.NEIGHBOURS]):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        worker.run(Segment(step, step + 1, between, False, record=False))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return peaks[1:], 4 * worker._joined.x.numel()


def test_a_step_with_an_exchange_takes_no_more_than_that_beside_the_local_step():
    for (alone, exchanging), model in run_on_ranks(WORKERS, stepped, free_port()):
        assert exchanging <= max(alone, 2 * model) + LITTLE  # a ring: two neighbours


# The wrapper, and what torch puts around a model.


def looped(rank):
    """Ends of the same loop with a bare and a wrapped optimizer: plain, float16 with a GradScaler,
    and compiled."""
    compiles = shutil.which("gcc") is not None
    torch.cuda.set_device(0)
    return {
        kind: [loop(kind, wrapped) for wrapped in (False, True)]
        for kind in ("plain", "float16", *(["compiled"] if compiles else []))
    }


def loop(kind, wrapped):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    model = model.cuda()
    run = torch.compile(model) if kind == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if wrapped:
        optimizer = wrap(model, optimizer, "local_sgd", period=2)
    scaler = torch.amp.GradScaler("cuda", enabled=kind == "float16")
    for step in range(6):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=kind == "float16"):
            loss = run(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {name: value.cpu().numpy() for name, value in model.state_dict().items()}


def test_a_wrapped_loop_alone_trains_as_a_bare_one():
    (ends,) = run_on_ranks(1, looped)
    for kind, (bare, wrapped) in ends.items():
        for name, value in bare.items():
            torch.testing.assert_close(
                torch.from_numpy(wrapped[name]),
                torch.from_numpy(value),
                rtol=1e-5,
                atol=1e-6,
                msg=f"{kind}: {name}",
            )


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C compiler")
def test_a_worker_whose_model_is_compiled_trains_as_another():
    plain = config_of("local_sgd", "mlp", "float32", workers=1) | WHOLE
    configs = [plain, plain | {"ray": {"gpus_per_worker": 1, "compile": True}}]
    ports = [free_port() for _ in configs]
    ((one, other),) = run_on_ranks(1, worked, ports, configs, ["cuda"])
    torch.testing.assert_close(
        torch.from_numpy(other[0]), torch.from_numpy(one[0]), rtol=1e-4, atol=1e-5
    )
