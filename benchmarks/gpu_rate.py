"""How fast is the simulator on a GPU? Worker-steps per second, beside one model on as many samples.

Gossip-PGA with period 4 on a ring, SGD with momentum, float32 as torch has it by default, random
data that lie on the device: an MLP, a CNN, ResNet-20 and a small GPT. Beside it one plain torch
training step of ONE model on the same samples, drawn in the same way, and the simulator without
CUDA graphs. They take turns, and a ratio is the median over rounds. Then what a gradient of all
workers costs by itself, on a batch that stays: by how many workers a pass takes at once, for models
with convolutions; each as a CUDA graph and without one; and compiled. And what x <- W x takes,
beside degree + 1 copies of x.

    python benchmarks/gpu_rate.py --out benchmarks/results/gpu_rate.json

Without a GPU it runs on the CPU, small, and says so.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import machine
import mixing
import segments
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from segments import median_ratio
from torch import Tensor, nn
from torch.nn import functional

import decentral
from decentral.config import load
from decentral.cuda_graph import CudaGraphs
from decentral.engines.sim import Simulator
from decentral.experiment import Experiment, build
from decentral.gradients import StackedGradient
from decentral.replica import Averaging, Replica
from decentral.tasks import fetch

PERIOD = 4
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
SAMPLES = 8192
MIXED = [(64, 19_210), (64, 817_984), (256, 817_984), (1024, 817_984), (4096, 19_210)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = {"mlp": 32, "cnn": 32, "resnet20": 16, "gpt": 8}
if DEVICE == "cpu":
    BATCH = {model: max(2, size // 8) for model, size in BATCH.items()}


def main(
    workers: Annotated[list[int] | None, typer.Option(help="n; may be given repeatedly.")] = None,
    models: Annotated[list[str] | None, typer.Option(help="Of " + ", ".join(BATCH))] = None,
    rounds: Annotated[int, typer.Option(min=1, help="At most, for each model and n.")] = 9,
    seconds: Annotated[float, typer.Option(min=1, help="For all; what is left then is not.")] = 160,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Time models and numbers of workers: by default all, for 8, 64, 256 and 1024."""
    console = Console(width=120)
    started, began = os.getloadavg()[0], time.monotonic()
    if DEVICE == "cpu":
        console.print("there is no CUDA device here: on the CPU, and small")
        workers = workers or [8]
        torch.set_num_threads(1)
    workers, models = workers or [8, 64, 256, 1024], models or list(BATCH)
    rows: list[dict[str, Any]] = []
    passes: list[dict[str, Any]] = []
    cells = [(n, model) for n in workers for model in models]
    for place, (n, model) in enumerate(cells):
        left = seconds - (time.monotonic() - began)
        if left < 0:
            rows.append({"model": model, "workers": n, "left_out": "no time was left"})
            continue
        each = max(1.0, 0.5 * left / (len(cells) - place))
        rows.append(guarded(model, n, lambda e: measure(e, rounds, each)))  # noqa: B023
        if n in (64, *workers[:1]):
            passes.append(guarded(model, n, lambda e: {"ways": ways(e, left)}))  # noqa: B023
    console.print(table(rows))
    for row in passes:
        said = " ".join(f"{way['way']} {shown(way['ms'])}" for way in row.get("ways", []))
        console.print(f"gradient of {row['workers']} {row['model']}: {said or row['left_out']}")
    averages = averaging()
    console.print(averages_table(averages))
    if out is not None:
        result = {
            "benchmark": "gpu_rate",
            "settings": {"rounds": rounds, "period": PERIOD, "batch": BATCH, "optimizer": SGD},
            "sizes": rows,
            "gradients": passes,
            "averaging": averages,
            "machine": machine.describe(started) | {"device": device_name()},
        }
        machine.write(result, out)
        console.print(f"written to {out}, after {time.monotonic() - began:.0f} s")


def guarded(model: str, n: int, do: Callable[[Experiment], dict[str, Any]]) -> dict[str, Any]:
    """What `do` gives for n workers with a model, or that memory was short."""
    row: dict[str, Any] = {"model": model, "workers": n}
    try:
        row |= do(build(load(config_of(model, n))))
    except torch.OutOfMemoryError:
        row["left_out"] = "out of memory"
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return row


def config_of(model: str, n: int) -> dict[str, Any]:
    return {
        "steps": 1,  # the benchmark drives the engine itself
        "workers": n,
        "task": {"name": "gpu_rate:task", "model": model, "batch_size": BATCH[model]},
        "optimizer": {"name": "sgd"} | SGD,
        "algorithm": {"name": "gossip_pga", "period": PERIOD},
        "topology": {"name": "ring"},
        "network": {"compute_ms": 1},
        "sim": {"device": DEVICE},
    }


# Models and data.


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.past = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.past(x))


def resnet20() -> nn.Module:
    """Of He et al. 2016 for CIFAR-10, with a projection where the shape changes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    widths = [16] * 4 + [32] * 3 + [64] * 3
    for before, width in pairwise(widths):
        layers.append(Residual(before, width, 1 if before == width else 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for part in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        # Written out: vmap takes torch's fused attention one worker at a time.
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        seen = scores.softmax(-1) @ v
        x = x + self.out(seen.transpose(-2, -3).flatten(-2))
        return x + self.narrow(functional.gelu(self.wide(self.between(x))))


class GPT(nn.Module):
    """Four layers of width 128 on 64 characters of 64 kinds: 0.8 million parameters."""

    def __init__(self, kinds: int = 64, length: int = 64, width: int = 128):
        super().__init__()
        self.what, self.where = nn.Embedding(kinds, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(4)), nn.LayerNorm(width))
        self.head = nn.Linear(width, kinds)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[-1], device=tokens.device)
        return self.head(self.blocks(self.what(tokens) + self.where(place)))


def characters(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def task(workers: int, seed: int, *, model: str) -> decentral.Task:
    """Random data for a model of BATCH, on the device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = {
            "mlp": lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)),
            "cnn": cnn,
            "resnet20": resnet20,
            "gpt": GPT,
        }[model]()
    if model == "gpt":
        text = torch.randint(64, (SAMPLES, 65), generator=generator).to(DEVICE)
        return decentral.Task(module, characters, train=(text[:, :-1], text[:, 1:]))
    shape = (64,) if model == "mlp" else (3, 32, 32)
    x = torch.randn(SAMPLES, *shape, generator=generator).to(DEVICE)
    y = torch.randint(10, (SAMPLES,), generator=generator).to(DEVICE)
    return decentral.Task(module, functional.cross_entropy, train=(x, y))


def cnn() -> nn.Module:
    """Two stages, 25,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 10),
    )


# Steps.


def measure(experiment: Experiment, rounds: int, seconds: float) -> dict[str, Any]:
    n = experiment.config.workers
    simulator = Simulator(experiment)
    ours = simulation(simulator)
    launched = simulation(Simulator(without_graphs(experiment)))
    train = single_model(experiment)
    halves = {"simulated": ours, "launched": launched, "single": train}
    for half in halves.values():  # to warm up
        half()
    times: dict[str, list[float]] = {name: [] for name in halves}
    began = time.monotonic()
    while len(times["single"]) < rounds and (
        not times["single"] or time.monotonic() - began < seconds
    ):
        for name in list(halves)[:: 1 if len(times["single"]) % 2 == 0 else -1]:
            times[name].append(timed(halves[name]) / PERIOD)
    step_s = statistics.median(times["simulated"])
    replica = simulator.replica
    assert isinstance(replica, Replica), "the methods measured here have steps"
    return {
        "parameters": sum(p.numel() for p in experiment.task.model.parameters()),
        "rounds": len(times["single"]),
        "step_ms": step_s * 1e3,
        "worker_steps_per_s": n / step_s,
        "launched_ms": statistics.median(times["launched"]) * 1e3,
        "single_model_ms": statistics.median(times["single"]) * 1e3,
        "ratio": median_ratio(times["simulated"], times["single"]),
        "graph": median_ratio(times["simulated"], times["launched"]),
        "parts_ms": parts(experiment, replica),
    }


def without_graphs(experiment: Experiment) -> Experiment:
    config = experiment.config.model_dump(exclude_unset=True)
    return build(load(config, {"sim.cuda_graph": False}))


def simulation(simulator: Simulator) -> Callable[[], None]:
    """A period of the simulator: steps of gossip, the last with a global average."""
    return segments.in_a_row(simulator.run, PERIOD, Averaging.NEIGHBOURS, global_average=True)


def single_model(experiment: Experiment) -> Callable[[], None]:
    """PERIOD steps of one model, each on all workers' samples, drawn as the simulator does."""
    model = copy.deepcopy(experiment.task.model).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    sampler = experiment.sampler(list(range(experiment.config.workers)))
    step = 0

    def period() -> None:
        nonlocal step
        for _ in range(PERIOD):
            batch = fetch(experiment.task.train, sampler.indices(step))
            inputs, target = (part.flatten(0, 1) for part in batch)
            optimizer.zero_grad()
            experiment.task.loss(model(inputs), target).backward()
            optimizer.step()
            step += 1

    return period


def parts(experiment: Experiment, replica: Replica) -> dict[str, float]:
    """Milliseconds of each part of a simulated step, timed alone: the best of three."""
    sampler = experiment.sampler(list(range(experiment.config.workers)))
    gradient = replica._gradient

    def best_ms(part: Callable[[], object]) -> float:
        part()
        return min(timed(part) for _ in range(3)) * 1e3

    with torch.no_grad():
        draw = best_ms(lambda: fetch(experiment.task.train, sampler.indices(1)))
        return {
            "draw": draw,
            "gradient": best_ms(lambda: gradient(1)) - draw,
            "optimizer": best_ms(lambda: replica.descend(gradient.value)),
            "neighbours": best_ms(lambda: replica.comm.mix_(replica.x, 0)),
            "everyone": best_ms(lambda: replica.mean_(replica.x)),
        }


# Other ways to the gradient.


def ways(experiment: Experiment, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward pass of all workers on one batch, in several ways."""
    replica = Simulator(experiment).replica
    assert isinstance(replica, Replica), "the methods measured here have steps"
    gradient = replica._gradient
    assert isinstance(gradient, StackedGradient)
    n = experiment.config.workers
    batch = gradient._batch(0)
    convolves = any(isinstance(m, nn.Conv2d) for m in experiment.task.model.modules())
    found: dict[str, Any] = {}
    for chunk in [c for c in (4, 16, 64, 256) if c < n] + [n] if convolves else [n]:
        gradient.chunk = chunk
        found[f"by {chunk}"] = best_pass(lambda: gradient._passes(batch, "set"))
        if DEVICE == "cuda":
            graphs = CudaGraphs(experiment.task.model)
            found[f"by {chunk}, graph"] = best_pass(
                lambda: graphs(lambda b: gradient._passes(b, "set"), batch, "set")  # noqa: B023
            )
            del graphs
    if DEVICE == "cuda" and seconds > 60 and experiment.config.task.options["model"] == "mlp":
        gradient._stacked = torch.compile(gradient._stacked)  # type: ignore[assignment]
        try:
            found["compiled"] = best_pass(lambda: gradient._passes(batch, "set"))
        except Exception as error:  # torch raises what it likes
            found["compiled"] = f"{type(error).__name__}: {error}"[:200]
    return [{"way": way, "ms": ms} for way, ms in found.items()]


def best_pass(do: Callable[[], object]) -> float:
    for _ in range(3):
        do()
    return statistics.median(timed(do) for _ in range(5)) * 1e3


# Averaging.


def averaging() -> list[dict[str, Any]]:
    """x <- W x for the static graphs of mixing.py, by the clock."""
    rows = []
    for n, size in MIXED if DEVICE == "cuda" else [(9, 20)]:
        x = torch.randn(n, size, device=DEVICE)
        for topology in mixing.built(n):
            if len(topology.matrices) == 1:
                row = mixing.mixing(topology, x, pairs=3)
                kept = ("topology", "workers", "parameters", "copies", "mix_ms", "copy_ms")
                rows.append({key: row[key] for key in kept} | {"ratio": row["clock_ratio"]})
    return rows


def averages_table(rows: list[dict[str, Any]]) -> Table:
    grid = Table(title="x <- W x, in times of degree + 1 copies of x", box=box.SIMPLE_HEAD)
    names = list(dict.fromkeys(row["topology"] for row in rows))
    for name in ("n", "D", "copy, ms", *names):
        grid.add_column(name, justify="right")
    for size in dict.fromkeys((row["workers"], row["parameters"]) for row in rows):
        own = [row for row in rows if (row["workers"], row["parameters"]) == size]
        copy_ms = statistics.median(row["copy_ms"] for row in own)
        grid.add_row(*map(str, size), f"{copy_ms:.3f}", *(f"{row['ratio']:.2f}" for row in own))
    return grid


# Time.


def timed(do: Callable[[], object]) -> float:
    """Seconds until all is computed."""
    synchronize()
    start = time.perf_counter()
    do()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"


def table(rows: list[dict[str, Any]]) -> Table:
    grid = Table(
        title=f"gossip_pga, period {PERIOD}, ring, on {device_name()}",
        caption="step: ms of a simulated step; rate: worker-steps/s. launched: ms without CUDA"
        " graphs. single: ms of a plain training step of one model on the same samples; ratio: step"
        " / single, median over rounds. Then ms of each part, timed alone.",
        box=box.SIMPLE_HEAD,
    )
    names = ("model", "n", "step", "rate", "launched", "single", "ratio")
    names += ("draw", "grad", "optim", "mix", "all")
    for name in names:
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        head = (row["model"], str(row["workers"]))
        if "left_out" in row:
            grid.add_row(*head, row["left_out"])
            continue
        grid.add_row(
            *head,
            f"{row['step_ms']:.2f}",
            f"{row['worker_steps_per_s']:,.0f}",
            f"{row['launched_ms']:.2f}",
            f"{row['single_model_ms']:.2f}",
            f"{row['ratio']:.2f}",
            *(f"{ms:.2f}" for ms in row["parts_ms"].values()),
        )
    return grid


def shown(value: Any) -> str:
    return f"{value:.2f} ms;" if isinstance(value, float) else f"{value}"


if __name__ == "__main__":
    typer.run(main)
