"""From a config to the checked parts of a run. Nothing starts before `build` has returned.

Both engines build the same experiment from the same config: the simulator once, the Ray engine
once in the driver, to check, and once on each worker.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from decentral import topology as topologies
from decentral.algorithms import COMPRESSORS, OUTER, PRESETS, SCHEDULES, Algorithm
from decentral.algorithms.a2cid2 import A2CiD2
from decentral.algorithms.adapt_then_combine import AdaptThenCombine
from decentral.algorithms.choco import Choco
from decentral.algorithms.consensus_based import ConsensusBased
from decentral.algorithms.d2 import D2
from decentral.algorithms.noloco import NoLoCo
from decentral.algorithms.parallel import Parallel
from decentral.algorithms.push_sum import PushSum
from decentral.algorithms.relay import Relay
from decentral.algorithms.schedules import ConsensusControl, Never, Period
from decentral.algorithms.zeroth_order import ZerothOrder
from decentral.asynchronous import AsynchronousRule
from decentral.clock import clock_options
from decentral.comm import Comm, accumulation_dtype
from decentral.config import (
    ChurnFault,
    Config,
    CutFault,
    DelayFault,
    JoinFault,
    KillFault,
    LoseFault,
    TaskConfig,
)
from decentral.diagnostics.objective import Objective, split
from decentral.draws import hash64
from decentral.errors import UserError
from decentral.event_queue import Matchings, acceleration
from decentral.faults import Faults
from decentral.gradients import FlatModel, ModuleGradient
from decentral.mixing import Mixing
from decentral.optimizers import (
    MakeOptimizer,
    MakeScheduler,
    check_schedule,
    excluded,
    lr_schedule,
    optimizer,
    without_decay,
)
from decentral.own import is_own, load, where
from decentral.replica import Gradient, Replica, StepRule
from decentral.signature import bind, choose
from decentral.tasks import (
    PARTITIONS,
    TASKS,
    Sampler,
    Task,
    hold_out,
    known_labels,
    label_counts,
    labels,
    length,
    narrowed,
)
from decentral.topology import Topology

_METHODS = int.from_bytes(b"methods", "little")  # apart from other uses of the same seed
_SHARED = int.from_bytes(b"shared", "little")
TOPOLOGIES = 1_000  # of fewer workers than all, to remember
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def worker_keys(seed: int, workers: Tensor) -> Tensor:
    """Random bits of each worker, int64 of the shape of `workers`, for methods that draw."""
    return hash64(_METHODS, seed, workers)


def common_key(seed: int) -> Tensor:
    """Random bits that all workers have in common, int64."""
    return hash64(_SHARED, seed)


@dataclass
class Experiment:
    """What a run consists of.

    shards: the workers' indices into `task.train`; validation: those that are held out, or None.
    """

    config: Config
    topology: Topology | None
    algorithm: Algorithm
    task: Task
    shards: list[Tensor]
    make_optimizer: MakeOptimizer
    make_scheduler: MakeScheduler | None
    faults: Faults
    matchings: Matchings | None = None  # of an asynchronous method
    validation: Tensor | None = None
    _topologies: dict[tuple[int, ...], Topology] = field(default_factory=dict)  # of some workers
    _made: dict[int, Topology] = field(default_factory=dict)  # by name, of so many workers

    @property
    def message_size(self) -> int:
        """Bytes of a model, with the buffers that are averaged."""
        model = self.task.model
        tensors = [p for p in model.parameters() if p.requires_grad]
        if self.config.buffers == "average":
            tensors += [b for b in model.buffers() if b.is_floating_point()]
        return sum(tensor.numel() for tensor in tensors) * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    @property
    def initial_lr(self) -> float:
        """The learning rate of the first step."""
        optimizer = self.make_optimizer([torch.zeros(1)])
        if self.make_scheduler is not None:
            self.make_scheduler(optimizer)
        return float(optimizer.param_groups[0]["lr"])

    @property
    def label_counts(self) -> tuple[Tensor, Tensor] | None:
        """How many samples of which class each worker has, see `tasks.label_counts`; None where the
        data tells no classes."""
        classes = known_labels(self.task.train)
        return None if classes is None else label_counts(classes, self.shards)

    def keys(self, workers: Tensor) -> Tensor:
        """See `worker_keys`."""
        return worker_keys(self.config.seed, workers)

    @property
    def shared_key(self) -> Tensor:
        """See `common_key`."""
        return common_key(self.config.seed)

    def replica(self, gradient: Gradient, comm: Comm, workers: Tensor) -> Replica:
        """The replica of `workers`, int64 [n], or of one of them, int64 []."""
        algorithm = self.algorithm
        assert not isinstance(algorithm.rule, AsynchronousRule)
        return Replica(
            gradient,
            algorithm.rule,
            comm,
            self.make_optimizer,
            self.make_scheduler,
            self.keys(workers),
            self.shared_key.to(workers.device),
            outer=algorithm.outer,
            wire=algorithm.wire,
            gossip_period=algorithm.gossip_period,
            group_period=algorithm.schedule.group_period,
            average_buffers=self.config.buffers == "average",
            watches_drift=self.watches_drift,
        )

    @property
    def watches_drift(self) -> bool:
        """Whether the workers' drift is measured at some steps."""
        return self.config.diagnostics is not None and self.config.diagnostics.drift

    def mixing(
        self, topology: Topology | None = None, members: Sequence[int] | None = None
    ) -> Mixing | None:
        """Who of `members`, by default all, averages with whom at each step.

        topology: theirs, by default the run's; None is returned where that has none.
        """
        topology = topology or self.topology
        if topology is None:
            return None
        return Mixing(
            topology,
            self.faults,
            members,
            turn_steps=self.algorithm.gossip_period,
            sender_keeps=self.algorithm.rule.requires == "column-stochastic",
        )

    def topology_of(self, members: Sequence[int]) -> Topology | None:
        """The topology of the workers that are there, sorted: its nodes are these, in order."""
        if self.topology is None or len(members) == self.config.workers:
            return self.topology
        key = tuple(members)
        if key not in self._topologies:
            if len(self._topologies) >= TOPOLOGIES:
                self._topologies.pop(next(iter(self._topologies)))
            self._topologies[key] = self._reknit(key)
        return self._topologies[key]

    def _reknit(self, members: tuple[int, ...]) -> Topology:
        assert self.topology is not None, "topology_of has looked"
        chosen = self.config.topology

        def remake(n: int) -> Topology:
            assert chosen is not None, "the topology came from there"
            if n not in self._made:
                self._made[n] = topologies.build(
                    n, chosen.name, None, chosen.weights, **chosen.options
                )
            return self._made[n]

        named = chosen is not None and chosen.name is not None
        topology = topologies.reknit(self.topology, members, remake if named else None)
        if self.algorithm.needs_topology:
            name = self.config.algorithm.name
            _check_mixing(topology, self.algorithm.rule.requires, name)
        return topology

    def sampler(self, workers: list[int], members: Sequence[int] | None = None) -> Sampler:
        """What draws the batches of these workers, where only `members` are there.

        The data of those that are not there are read by those that are: the shards of absent
        workers, by number, go around the present ones, by number.
        """
        task = self.config.task
        shards: Sequence[Tensor] | dict[int, Tensor] = self.shards
        if members is not None and len(members) < len(shards):
            absent = sorted(set(range(len(shards))) - set(members))
            own = {worker: [self.shards[worker]] for worker in members}
            for place, worker in enumerate(absent):
                own[members[place % len(members)]].append(self.shards[worker])
            shards = {worker: torch.cat(parts) for worker, parts in own.items()}
        return Sampler(
            shards=shards,
            workers=workers,
            batch_size=task.batch_size,
            seed=self.config.seed,
            sampling=task.sampling,
        )


def build(config: Config, topology: Topology | None = None) -> Experiment:
    """Build and check every part of the run that `config` describes.

    `topology`, where it is at hand, saves building it again.

    Raises UserError, naming the key, if any part is wrong or the parts do not fit.
    """
    algorithm = algorithm_of(config)
    _check_gradient(config, algorithm)
    _check_fused(config)
    _check_diagnostics(config)
    topology = topology or topology_of(config, algorithm)
    faults = _faults(config, algorithm, topology)
    make_optimizer = optimizer(config.optimizer.name, config.optimizer.options)
    make_scheduler = None
    if config.lr_schedule is not None:
        schedule = config.lr_schedule
        make_scheduler = lr_schedule(schedule.name, schedule.options, config.steps)
    if config.engine == "sim" and config.sim.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; set sim.device: cpu", "sim.device")
    task = narrowed(_task(config), accumulation_dtype(DTYPES[config.dtype]))
    if excluded(config.optimizer.options) == "norms_and_biases":
        shapes = [p.shape for p in task.model.parameters() if p.requires_grad]
        make_optimizer = without_decay(make_optimizer, shapes)
    if make_scheduler is not None:
        check_schedule(make_scheduler, make_optimizer, config.steps)
    clock_options(config, topology, algorithm)
    _check_memory(config, task)
    matchings = None
    if isinstance(algorithm.rule, AsynchronousRule):
        assert topology is not None
        matchings = Matchings(topology.graphs[0], config.seed)
        if isinstance(algorithm.rule, A2CiD2) and config.workers > 1:
            chi = acceleration(matchings.laplacian(algorithm.rule.exchanges))
            algorithm = replace(algorithm, rule=algorithm.rule.accelerated(*chi))
    shards, held_out = _split(config, task)
    experiment = Experiment(
        config,
        topology,
        algorithm,
        task,
        shards,
        make_optimizer,
        make_scheduler,
        faults,
        matchings,
        held_out,
    )
    _try_first_batch(experiment)
    if config.diagnostics is not None and config.diagnostics.curvature:
        _try_curvature(experiment)
    return experiment


PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "schedule": SCHEDULES,
    "outer": OUTER,
    "wire": {name: COMPRESSORS[name] for name in ("bfloat16", "int8")},
}


# What a step rule may ask of the mixing matrix; `_check_mixing` holds a topology to it.
REQUIREMENTS = (
    "doubly stochastic",
    "doubly stochastic, static",
    "symmetric, eigenvalues above -1/3",
    "column-stochastic",
    "tree",
    "undirected, static",
)

# Rules whose messages are no models to be rounded and mixed.
OWN_MESSAGES = PushSum | Choco | Relay | NoLoCo | ConsensusBased | AsynchronousRule


def algorithm_of(config: Config) -> Algorithm:
    """A preset, with those of its parts replaced that the config names."""
    options = config.algorithm.options
    parts = {part: options.pop(part) for part in PARTS if part in options}
    gossip_period = options.pop("gossip_period", None)
    algorithm = _preset(config.algorithm.name, options)
    for part, chosen in parts.items():
        key = f"algorithm.{part}"
        if not isinstance(chosen, dict) or not isinstance(chosen.get("name"), str):
            raise UserError(f"must name one, such as {{name: {next(iter(PARTS[part]))}}}", key)
        own = {option: value for option, value in chosen.items() if option != "name"}
        kind = choose(PARTS[part], chosen["name"], f"{key}.name", part)
        algorithm = replace(algorithm, **{part: kind(**bind(kind, own, key, name=chosen["name"]))})
    if gossip_period is not None:
        shared = bind(_gossip_period, {"gossip_period": gossip_period}, "algorithm")
        algorithm = replace(algorithm, **shared)
    _check_parts(algorithm, config)
    if getattr(algorithm.rule, "plain_sgd", False):
        _require_plain_sgd(config, algorithm)
    return algorithm


def _preset(name: str, options: dict[str, Any]) -> Algorithm:
    """The method `name`, one of the table or the user's own, with its options."""
    own = is_own(name)
    key, beside = "algorithm", ("name", "gossip_period", *PARTS)
    preset = load(name, f"{key}.name") if own else choose(PRESETS, name, f"{key}.name", key)
    bound = bind(preset, options, key, name=name, beside=beside)
    if not own:
        return preset(**bound)
    try:
        algorithm = preset(**bound)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} failed: {where(error)}", f"{key}.name") from error
    if not isinstance(algorithm, Algorithm):
        raise UserError(
            f"{name} must return a decentral.algorithms.Algorithm; got {algorithm!r:.80}",
            f"{key}.name",
        )
    _check_own_rule(algorithm, name)
    return algorithm


def _check_own_rule(algorithm: Algorithm, name: str) -> None:
    """A step rule of the user's own has all that the tables' rules have."""
    rule, key = algorithm.rule, "algorithm.name"
    if not isinstance(rule, StepRule | AsynchronousRule):
        wanted = ("equation", "source", "sends", "requires", "step")
        missing = [part for part in wanted if not hasattr(rule, part)]
        raise UserError(
            f"the step rule of {name} must have {', '.join(wanted)}; {type(rule).__name__} has no"
            f" {', '.join(missing)}",
            key,
        )
    if algorithm.needs_topology and rule.requires not in REQUIREMENTS:
        raise UserError(
            f"the step rule of {name} must ask one of these of W: {', '.join(REQUIREMENTS)};"
            f" its `requires` is {rule.requires!r}",
            key,
        )


def _gossip_period(gossip_period: Period) -> None:
    """The schema of the option that all gossip methods share."""


def _check_parts(algorithm: Algorithm, config: Config) -> None:
    name, schedule = config.algorithm.name, algorithm.schedule
    groups = schedule.groups
    if groups is not None and groups > config.workers:
        raise UserError(
            f"{config.workers} workers cannot fall into {groups} groups; take fewer groups",
            f"algorithm.{'schedule.' if 'schedule' in config.algorithm.options else ''}groups",
        )
    if groups is not None and isinstance(algorithm.rule, AsynchronousRule):
        raise UserError(
            f"in {name} workers meet in pairs and have no groups; take the schedule every",
            "algorithm.schedule",
        )
    if algorithm.gossip_period > 1 and (
        not algorithm.needs_topology
        or isinstance(algorithm.rule, D2 | Choco | Relay | AsynchronousRule)
    ):
        raise UserError(
            f"{name} has no steps without an exchange between neighbours; take it away",
            "algorithm.gossip_period",
        )
    shows = algorithm.needs_topology and isinstance(algorithm.rule, AdaptThenCombine)
    if isinstance(schedule, ConsensusControl) and not shows:
        raise UserError(
            f"consensus control watches how far gossip moves the models, which {name} does not"
            " show; use it with gossip_sgd",
            "algorithm.schedule",
        )
    if algorithm.outer is not None and not isinstance(algorithm.rule, AdaptThenCombine):
        raise UserError(
            f"{name} takes no outer optimizer; gossip and local SGD do", "algorithm.outer"
        )
    if isinstance(schedule, Never):
        if algorithm.outer is not None:
            raise UserError(
                "an outer optimizer steps at global averages, and there are none; set"
                " algorithm.schedule={name: every, period: 8}",
                "algorithm.outer",
            )
    elif isinstance(algorithm.rule, Parallel):
        raise UserError(f"{name} averages gradients at every step", "algorithm.schedule")
    elif algorithm.evaluations and not algorithm.needs_topology:
        raise UserError(f"in {name} all workers meet at every step", "algorithm.schedule")
    if algorithm.wire is not None and (
        not algorithm.needs_topology or isinstance(algorithm.rule, OWN_MESSAGES)
    ):
        raise UserError(f"{name} takes no wire format; gossip methods do", "algorithm.wire")


def _check_norm_test(config: Config, algorithm: Algorithm) -> None:
    name, test, gradient = config.algorithm.name, config.norm_test, config.gradient
    if test is None:
        return
    if algorithm.evaluations or isinstance(algorithm.rule, AsynchronousRule):
        raise UserError(
            f"the norm test looks at the gradients of a common step, which {name} does not have;"
            " set norm_test=null",
            "norm_test",
        )
    if gradient.accumulate < 2:
        raise UserError(
            "the norm test compares the batches of a step, so it takes at least 2 to begin with;"
            f" got {gradient.accumulate}. Set gradient.accumulate=2 and halve task.batch_size",
            "gradient.accumulate",
        )
    if test.max_accumulate < gradient.accumulate:
        raise UserError(
            f"must be at least gradient.accumulate, which is {gradient.accumulate}; got"
            f" {test.max_accumulate}",
            "norm_test.max_accumulate",
        )
    if gradient.clip_norm is not None:
        raise UserError(
            "the norm test needs gradients as they are, and clipping shortens them; set"
            " gradient.clip_norm=null",
            "gradient.clip_norm",
        )


def _check_gradient(config: Config, algorithm: Algorithm) -> None:
    name = config.algorithm.name
    _check_norm_test(config, algorithm)
    if config.gradient.autocast is not None and config.dtype != "float32":
        raise UserError(
            "autocast lowers float32, and leaves products of other dtypes as they are; the run's"
            f" dtype is {config.dtype}. Set dtype=float32, or gradient.autocast=null",
            "gradient.autocast",
        )
    if algorithm.evaluations and config.gradient.clip_norm is not None:
        raise UserError(
            f"{name} has no gradient of a worker to clip; set gradient.clip_norm=null",
            "gradient.clip_norm",
        )
    if isinstance(algorithm.rule, ZerothOrder) and config.dtype == "bfloat16":
        raise UserError(
            f"{name} takes differences of losses, which are lost in the eight bits of bfloat16;"
            " set dtype=float32",
            "dtype",
        )


def _check_fused(config: Config) -> None:
    """torch takes the form on request where it is wrong, too: see optimizers.fuses."""
    options = config.optimizer.options
    if not options.get("fused"):
        return
    for wrong, what in (
        (config.dtype == "bfloat16", "dtype: bfloat16"),
        (excluded(options) != "none", "weight_decay_exclude"),
    ):
        if wrong:
            raise UserError(
                f"torch's fused form takes wrong steps with {what}; leave it away: where it is"
                " right and faster it is taken anyway",
                "optimizer.fused",
            )


def _check_diagnostics(config: Config) -> None:
    chosen = config.diagnostics
    if chosen is not None and not chosen.of_the_model and not chosen.drift:
        raise UserError(
            f"names what to compute every {chosen.every} steps, and this names nothing; add"
            " gradient_norms={}, sharpness={}, trace={} or drift=true, or take it away",
            "diagnostics",
        )


def _faults(config: Config, algorithm: Algorithm, topology: Topology | None) -> Faults:
    """The script, held to what the engine, the method and the topology can do with it."""
    faults = Faults(config.faults, config.seed, config.workers)
    name, rule = config.algorithm.name, algorithm.rule
    asynchronous = isinstance(rule, AsynchronousRule)
    if asynchronous and config.min_workers is not None:
        raise UserError(
            f"the workers of {name} have no common step before which others could come; got min"
            f" {config.min_workers}. Set workers={config.workers}, or use gossip_sgd",
            "workers",
        )
    for number, fault in enumerate(faults.script):
        key = f"faults.{number}"
        if asynchronous and isinstance(fault, KillFault | JoinFault | ChurnFault):
            raise UserError(
                f"the workers of {name} have no common step before which one could go or come;"
                f" got {fault.kind}. Take it away, or use gossip_sgd",
                key,
            )
        if isinstance(fault, DelayFault | ChurnFault) and config.engine != "sim":
            raise UserError(
                f"{fault.kind} is for the simulator alone; set engine=sim, or take it away", key
            )
        if not isinstance(fault, CutFault | LoseFault | DelayFault):
            continue
        if topology is None or not algorithm.needs_topology:
            raise UserError(
                f"{fault.kind} is of messages between neighbours, and {name} sends none; take it"
                " away, or use a gossip method",
                key,
            )
        if asynchronous or isinstance(rule, Choco | Relay):
            why = (
                "exchanges in pairs, not along W"
                if asynchronous
                else "builds on every message before"
            )
            raise UserError(
                f"{name} {why}, so no link can be out; take it away, or use gossip_sgd", key
            )
        if isinstance(fault, DelayFault) and isinstance(rule, PushSum):
            raise UserError(
                f"{name} sends mass, which would be lost and come twice where a message is as it"
                " was; take it away, or use gossip_sgd",
                key,
            )
        if isinstance(fault, CutFault) and not any(
            graph.has_edge(*fault.link) or graph.has_edge(*reversed(fault.link))
            for graph in topology.graphs
        ):
            raise UserError(
                f"topology {topology.name} has no link between {fault.link[0]} and"
                f" {fault.link[1]}; name one that it has",
                f"{key}.link",
            )
    return faults


def _require_plain_sgd(config: Config, algorithm: Algorithm) -> None:
    options = config.optimizer.options
    why = "follows no gradient" if algorithm.evaluations else "brings its own momentum"
    if config.optimizer.name != "sgd" or options.get("momentum") or options.get("nesterov"):
        raise UserError(
            f"{config.algorithm.name} {why} and needs plain SGD; set"
            " optimizer.name=sgd optimizer.momentum=null",
            "optimizer",
        )


def topology_of(config: Config, algorithm: Algorithm) -> Topology | None:
    chosen = config.topology
    if chosen is None:
        if algorithm.needs_topology:
            raise UserError(
                f"{config.algorithm.name} averages over a graph; set topology.name or"
                " topology.file",
                "topology",
            )
        return None
    topology = topologies.build(
        config.workers, chosen.name, chosen.file, chosen.weights, **chosen.options
    )
    if algorithm.needs_topology:
        _check_mixing(topology, algorithm.rule.requires, config.algorithm.name)
    return topology


def _check_mixing(topology: Topology, requires: str | None, method: str) -> None:
    """Hold the topology to what the method asks of W."""
    if requires == "column-stochastic":
        topologies.require_column_stochastic(topology, method)
        return
    if requires == "undirected, static":
        topologies.require_static(topology, method)
        topologies.require_undirected(topology, method)
        return
    if requires == "tree":
        topologies.require_tree(topology, method)
        return
    topologies.require_doubly_stochastic(topology, method)
    if requires == "doubly stochastic, static":
        topologies.require_static(topology, method)
    elif requires == "symmetric, eigenvalues above -1/3":
        topologies.require_symmetric_above(topology, -1 / 3, method)
    else:
        assert requires == "doubly stochastic", requires


def _task(config: Config) -> Task:
    name = config.task.name
    builtin = not is_own(name)
    if builtin:
        make: Callable[..., Any] = choose(TASKS, name, "task.name", "task")
    else:
        make = load(name, "task.name")
    options = bind(
        make,
        config.task.options,
        "task",
        given=("workers", "seed"),
        name=name,
        beside=tuple(TaskConfig.model_fields),
    )
    try:
        task = make(workers=config.workers, seed=config.seed, **options)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(
                f"{name} does not fit into the memory of this machine; make its data or its model"
                " smaller",
                "task",
            ) from None
        if builtin:
            raise
        raise UserError(f"{name} failed: {where(error)}", "task.name") from error
    if not isinstance(task, Task):
        raise UserError(f"{name} must return a decentral.Task; got {task!r:.80}", "task.name")
    if not any(p.requires_grad for p in task.model.parameters()):
        raise UserError(f"the model of {name} has no parameter that trains", "task.name")
    return task


def _check_memory(config: Config, task: Task) -> None:
    """Refuse what cannot fit: the replicas that this process holds, and the batches of a step.

    A lower bound: parameters and gradients, samples and their indices, and nothing else.
    """
    replicas = config.workers if config.engine == "sim" else 1
    parameters = sum(p.numel() for p in task.model.parameters())
    sample = sum(torch.as_tensor(part).nbytes for part in task.train[0])
    itemsize = DTYPES[config.dtype].itemsize
    needs = {
        "workers": replicas * 2 * parameters * itemsize,
        "task.batch_size": replicas * config.task.batch_size * (8 + sample),
    }
    total = psutil.virtual_memory().total
    if config.engine == "sim" and config.sim.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
    for key, size in needs.items():
        if size > total:
            raise UserError(
                f"{replicas} workers would need more than {size / 1e9:.3g} GB in one process, of"
                f" {total / 1e9:.3g} GB that there are; take fewer workers, a smaller model or"
                " smaller batches",
                key,
            )


def _split(config: Config, task: Task) -> tuple[list[Tensor], Tensor | None]:
    """The workers' shards, and the samples that are held out of them: indices into `task.train`."""
    partition, fraction = config.task.partition, config.task.validation
    if task.shards is not None:
        if fraction is not None:
            raise UserError(
                f"{config.task.name} gives each worker its own data, of which none can be held"
                " out; take task.validation away",
                "task.validation",
            )
        if partition is not None:
            raise UserError(
                f"{config.task.name} gives each worker its own data; take task.partition away",
                "task.partition",
            )
        if len(task.shards) != config.workers:
            raise UserError(
                f"{config.task.name} has {len(task.shards)} shards for {config.workers} workers",
                "task.name",
            )
        return list(task.shards), None
    kind = partition.kind if partition is not None else "iid"
    split = choose(PARTITIONS, kind, "task.partition.kind", "partition")
    given = ("labels", "workers", "seed")
    options = partition.options if partition is not None else {}
    bound = bind(split, options, "task.partition", given=given, name=kind, beside=("kind",))
    # Only iid can do without classes, which not every data set has.
    classes = labels(task.train) if kind != "iid" else torch.zeros(length(task.train))
    if fraction is None:
        return split(classes, config.workers, config.seed, **bound), None
    held_out, rest = hold_out(len(classes), fraction, config.seed)
    shards = split(classes[rest], config.workers, config.seed, **bound)
    return [rest[shard] for shard in shards], held_out


def _try_first_batch(experiment: Experiment) -> None:
    """One forward and backward pass of worker 0: what cannot run fails here, by name."""
    name = experiment.config.task.name
    model = FlatModel(copy.deepcopy(experiment.task.model), experiment.dtype)
    autocast = experiment.config.gradient.autocast
    gradient = ModuleGradient(model, experiment.task, experiment.sampler([0]), autocast=autocast)
    try:
        with torch.random.fork_rng(devices=[]):
            loss = gradient(0)
    except Exception as error:
        raise UserError(f"{name} fails on its first batch: {where(error)}", "task.name") from error
    if loss.dim() != 0:
        shape = tuple(loss.shape)
        raise UserError(f"the loss of {name} must be a scalar; its shape is {shape}", "task.name")
    if not math.isfinite(loss.item()):
        raise UserError(f"the loss of {name} is {loss.item()} at the start", "task.name")


def _try_curvature(experiment: Experiment) -> None:
    """One product with the Hessian on the first batch of worker 0."""
    dtype = accumulation_dtype(experiment.dtype)
    model = FlatModel(copy.deepcopy(experiment.task.model), dtype)
    model.module.eval()
    samples = experiment.sampler([0]).indices(0).flatten()
    try:
        with torch.random.fork_rng(devices=[]):
            Objective(model, experiment.task, model.b, split(samples)).hessian_product(
                model.x, torch.ones_like(model.x)
            )
    except Exception as error:
        raise UserError(
            f"the model of {experiment.config.task.name} or its loss has no second derivative that"
            f" torch can take: {where(error)}. Take sharpness and trace away",
            "diagnostics",
        ) from error
