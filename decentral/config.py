"""The config of a run: its schema, how it is read, overridden and written.

`load` is the one way in, for the command line and for Python. What the schema cannot know (the
options of a task, a topology, an algorithm) is checked where it is built: see experiment.py.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from decentral.errors import UserError
from decentral.signature import validation_error

MOST_WORKERS = 100_000
MOST_BATCHES = 1_000_000  # a step
MOST_READERS = 256  # of a worker
# Beyond these nothing is a config; but aliases of YAML can multiply a few lines to as many.
MOST_BYTES = 2**18
MOST_VALUES = 100_000
MOST_CHARACTERS = 4096  # of a text; Linux's longest path
DEEPEST = 32

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Choice(BaseModel):
    """Something chosen; keys beyond the schema are its options, checked against its signature."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Component(_Choice):
    """Something chosen by name."""

    name: str


def _by_name(chosen: object) -> object:
    return {"name": chosen} if isinstance(chosen, str) else chosen


# A name alone stands for the component without options.
Named = Annotated[Component, BeforeValidator(_by_name)]


class Partition(_Choice):
    """How training samples are split over the workers."""

    kind: str


class TaskConfig(Component):
    """validation: the fraction of the training samples that nobody trains on, held out before
    they are split over the workers, to choose by (null: none).
    """

    batch_size: PositiveInt = 32
    partition: Partition | None = None
    sampling: Literal["shuffle", "replacement"] = "shuffle"
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None


class TopologyConfig(_Choice):
    """A built-in graph by `name`, with its options, or a graph `file`."""

    name: str | None = None
    file: str | None = None
    weights: str | None = None


class NormTestConfig(_Section):
    """The batches that a step takes grow, from gradient.accumulate on: see batches.py.

    tolerance: how much noise a step's gradient may have, of its own norm. every: steps from test
    to test. max_accumulate: the most batches a step.
    """

    tolerance: Positive
    every: PositiveInt = 10
    max_accumulate: Annotated[int, Field(gt=0, le=MOST_BATCHES)]


class GradientConfig(_Section):
    """What becomes of a worker's own gradient, whatever the method does with it.

    clip_norm: the norm that it is scaled down to where it is longer (null: never). accumulate:
    the batches of task.batch_size whose mean makes one step. autocast: the precision of products
    in forward and backward pass (null: the run's dtype).
    """

    clip_norm: Positive | None = None
    accumulate: Annotated[int, Field(gt=0, le=MOST_BATCHES)] = 1
    autocast: Literal["bfloat16"] | None = None


class ScaleConfig(_Section):
    """The optimizer's options hold for `reference_batch` samples a step, over all workers.

    `load` scales them to the batch of this run and takes the section away: see `scaled` in
    optimizers.py for the rules.
    """

    rule: Literal["linear", "sqrt"]
    reference_batch: PositiveInt


class Jitter(_Choice):
    """How compute times vary: a row of JITTERS, and its options."""

    kind: str


class StragglersConfig(_Section):
    """With `probability`, a worker's step takes `slowdown` times as long."""

    probability: Probability
    slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class NodesConfig(_Section):
    """Workers that share a machine, and the links inside it.

    `workers_per_node: null`: as the attribute `node` on the nodes of the graph file says.
    """

    workers_per_node: PositiveInt | None = None
    latency_ms: NonNegative = 0.01
    bandwidth_gbps: Positive


class NetworkConfig(_Section):
    """What the simulated clock reckons with.

    compute_ms: of a local step; null means measured at the start. overhead: bytes that the protocol
    adds to each byte of a message; 0.068 for TCP in Ethernet's frames of 1500 bytes, 66 bytes of
    headers and half an acknowledgement of 66 to 1448 of payload. all_reduce_gbps: what messages of
    an all-reduce were measured to reach; null means bandwidth_gbps. overlap: exchanges go on while
    the gradient is computed; null means where the method's need not wait for it, as the Ray engine
    has it. file: a graph file of the cluster, whose nodes are the workers and whose edges are all
    the cables there are, whatever the topology: it alone then says how fast links and workers are,
    where it says so, and the rest holds elsewhere.
    """

    file: str | None = None
    latency_ms: NonNegative = 0.1
    bandwidth_gbps: Positive = 10.0
    overhead: NonNegative = 0.0
    compute_ms: NonNegative | None = None
    jitter: Jitter | None = None
    stragglers: StragglersConfig | None = None
    overlap: bool | None = None
    all_reduce: Literal["ring", "tree", "hierarchical"] = "ring"
    all_reduce_gbps: Positive | None = None
    nodes: NodesConfig | None = None


class RecordConfig(_Section):
    """A record every so many steps; an evaluation every so many (null: only the last step).

    timeline: of so many steps, from the first or from where a run goes on, the clock's timeline
    is kept in timeline.json.
    """

    every: PositiveInt = 10
    evaluate_every: PositiveInt | None = None
    timeline: PositiveInt | None = None


class GradientNormsConfig(_Section):
    """Squared norms of gradient and noise, from so many batches of a step each."""

    batches: Annotated[int, Field(ge=2, le=MOST_BATCHES)] = 16


class SharpnessConfig(_Section):
    """The Hessian's largest eigenvalue, to a `tolerance` relative to it."""

    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3


class TraceConfig(_Section):
    """The Hessian's trace, from so many random vectors."""

    vectors: Annotated[int, Field(ge=2, le=MOST_BATCHES)] = 16


class DiagnosticsConfig(_Section):
    """What to compute of the averaged model every so many steps: see docs/diagnostics.md.

    samples_per_worker: at most so many of each worker's samples make the objective whose Hessian
    is looked at. drift: of the workers' models, from where the last global average left them.
    """

    every: PositiveInt
    samples_per_worker: PositiveInt = 512
    gradient_norms: GradientNormsConfig | None = None
    sharpness: SharpnessConfig | None = None
    trace: TraceConfig | None = None
    drift: bool = False

    @property
    def curvature(self) -> bool:
        """Whether the Hessian is looked at."""
        return self.sharpness is not None or self.trace is not None

    @property
    def of_the_model(self) -> bool:
        """Whether anything is computed of the averaged model."""
        return self.curvature or self.gradient_norms is not None


class CheckpointConfig(_Section):
    """A checkpoint every so many steps (null: only when the user stops the run); the newest `keep`
    stay.

    path: a folder, or a URL that fsspec knows, such as s3://bucket/run (null: in the run
    directory). Each run needs a place of its own.
    """

    every: PositiveInt | None = None
    keep: PositiveInt = 2
    path: Annotated[str, Field(min_length=1)] | None = None


class SimConfig(_Section):
    """cuda_graph: on a GPU, launch the kernels of a pass all at once, where the model permits."""

    device: Literal["cpu", "cuda"] = "cpu"
    cuda_graph: bool = True


class RayConfig(_Section):
    """`address: null` starts a local cluster for this run; `auto` or an address joins one.

    patience: how many times as long as it was busy itself since its last exchange a worker waits
    for others before it takes them for lost; see Patience in peer.py. timeout_s: the same before
    the first exchange, when they may still be loading.

    placement: neighbours share a node where they can, or each is where the graph file says if
    that names the cluster's nodes; or ranks as Ray starts the workers.

    gpus_per_worker: a fraction for workers that share a GPU. cpu_workers: so many of the workers
    have none, where the others have gpus_per_worker. compile: the model by torch.compile. readers:
    processes of each worker that read its batches ahead.

    ahead_s: for about how long workers go on by themselves and report then, where what they
    report decides nothing: records come in portions. 0: they report each by itself.
    """

    address: str | None = None
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
    cpu_workers: Count = 0
    compile: bool = False
    readers: Annotated[int, Field(ge=0, le=MOST_READERS)] = 0
    placement: Literal["neighbours", "rank"] = "neighbours"
    timeout_s: Positive = 300.0
    patience: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    ahead_s: NonNegative = 3.0

    @property
    def backend(self) -> Literal["nccl", "gloo"]:
        """Of torch.distributed, the same for all workers. NCCL knows no CPUs, and refuses two
        ranks on one card."""
        return "nccl" if self.gpus_per_worker >= 1 and not self.cpu_workers else "gloo"


class KillFault(_Section):
    """A worker dies before a step: `on_worker_failure` says what then becomes of it."""

    kind: Literal["kill"]
    worker: Count
    step: Count


class JoinFault(_Section):
    """A worker that is away comes, or comes back, before a step."""

    kind: Literal["join"]
    worker: Count
    step: Count


class _Window(_Section):
    """Steps start .. stop-1; to the end of the run without a stop."""

    start: Count = 0
    stop: PositiveInt | None = None

    @model_validator(mode="after")
    def _some_step(self) -> "_Window":
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(
                f"steps are start .. stop-1, so stop must be above start; stop is {self.stop} and"
                f" start {self.start}"
            )
        return self

    def covers(self, step: int) -> bool:
        """Whether `step` is one of them."""
        return self.start <= step and (self.stop is None or step < self.stop)


class CutFault(_Window):
    """Two workers hear nothing of each other, in either direction."""

    kind: Literal["cut"]
    link: Annotated[list[Count], Field(min_length=2, max_length=2)]


class SlowFault(_Window):
    """A worker's local steps take `factor` times as long."""

    kind: Literal["slow"]
    worker: Count
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class LoseFault(_Window):
    """Each exchange of two neighbours, in both directions at once, or each message, is lost."""

    kind: Literal["lose"]
    probability: Probability
    of: Literal["exchanges", "messages"] = "exchanges"


class DelayFault(_Window):
    """Each message comes so many steps late with this probability."""

    kind: Literal["delay"]
    probability: Probability
    steps: PositiveInt


_RETURN: dict[str, Any] = {"return": (Probability, ...)}  # no name for an attribute of a class


class ChurnFault(create_model("_Churn", __base__=_Window, **_RETURN)):
    """At each step each live worker leaves, and each that is away returns, with a probability."""

    kind: Literal["churn"]
    leave: Probability

    @property
    def return_(self) -> float:
        return getattr(self, "return")


Fault = Annotated[
    KillFault | JoinFault | CutFault | SlowFault | LoseFault | DelayFault | ChurnFault,
    Field(discriminator="kind"),
]


class Config(_Section):
    """A run.

    `workers: {min: 4, max: 16}`, here `min_workers` and `workers`, takes as many as the cluster has
    room for. on_worker_failure: see docs/faults.md. `buffers` are float ones, such as BatchNorm's
    statistics: see evaluation.py. loggers: where the records go too; names, or names with options:
    see loggers/.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: Annotated[int, Field(gt=0, le=MOST_WORKERS)]
    min_workers: PositiveInt | None = None
    on_worker_failure: Literal["replace", "shrink", "stop"] = "replace"
    steps: PositiveInt
    engine: Literal["sim", "ray"] = "sim"
    task: TaskConfig
    optimizer: Component
    lr_schedule: Component | None = None
    gradient: GradientConfig = GradientConfig()
    buffers: Literal["average", "local", "recalibrate"] = "average"
    norm_test: NormTestConfig | None = None
    scale_lr: ScaleConfig | None = None
    algorithm: Component
    topology: TopologyConfig | None = None
    network: NetworkConfig = NetworkConfig()
    faults: list[Fault] = []
    record: RecordConfig = RecordConfig()
    diagnostics: DiagnosticsConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    loggers: list[Named] = []
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    sim: SimConfig = SimConfig()
    ray: RayConfig = RayConfig()


def load(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read a config from a YAML file or a mapping, apply dotted overrides, check it.

    A key whose value is null is taken away, so its default holds. A relative `topology.file`,
    `network.file` or `task.file` is looked up from the working directory, then beside the config
    file; a relative `checkpoint.path` is of the working directory. What `scale_lr` asks for is
    done, and the section gone: the optimizer's options are those in force.

    Raises UserError naming each key at fault, what came, and what is allowed.
    """
    raw = dict(source) if isinstance(source, Mapping) else read(Path(source))
    raw = _without_nulls(override(raw, overrides or {}))
    if "compare" in raw:
        raise UserError("makes this a sweep; run it with decentral compare", "compare")
    _split_workers(raw)
    find_files(raw, Path() if isinstance(source, Mapping) else Path(source).parent)
    _fix_checkpoints(raw)
    check_keys(raw, Config)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise validation_error(error) from None
    if config.min_workers is not None and config.min_workers > config.workers:
        raise UserError(
            f"must be at most workers, or workers.max, which is {config.workers}; got"
            f" {config.min_workers}",
            "min_workers",
        )
    _check_cpu_workers(config)
    return _scale(config) if config.scale_lr is not None else config


def _check_cpu_workers(config: Config) -> None:
    ray, wrong = config.ray, None
    if not ray.cpu_workers:
        return
    if not ray.gpus_per_worker:
        wrong = "the others have GPUs; set ray.gpus_per_worker, or leave cpu_workers out"
    elif ray.cpu_workers >= config.workers:
        wrong = (
            f"must be below workers, which is {config.workers}; got {ray.cpu_workers}."
            " For CPUs alone set ray.gpus_per_worker=0"
        )
    elif config.min_workers is not None:
        wrong = "which workers go and come is not known of an elastic run; give one number"
    if wrong:
        raise UserError(wrong, "ray.cpu_workers")


def override(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys set. Raises UserError where one leads through what is no section."""
    _check_size(raw)
    changed = _copy(raw)
    for key, value in overrides.items():
        _check_size(value, key)
        _override(changed, key, value)
    return changed


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["a.b=1", "c=null"]` to `{"a.b": 1, "c": None}`; values are read as YAML."""
    overrides = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"an override is key=value, for example steps=100; got {word!r}")
        try:
            overrides[key] = _parse(value)
        except ValueError:
            raise UserError(f"the value is not YAML; got {value!r:.80}", key) from None
    return overrides


def dump(config: Config) -> str:
    """The config as YAML, defaults filled in; `load` reads it back to an equal config."""
    return to_yaml(config.model_dump(exclude_none=True))


def to_yaml(raw: Mapping[str, Any]) -> str:
    """A mapping as `load` and `read` take it."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """safe_load that also reads 1e-3 as a number, as YAML 1.2 and every user do."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<), but not more than anybody would write."""
        super().flatten_mapping(node)
        if len(node.value) > 1000:
            raise yaml.YAMLError("a mapping of more than 1000 keys")


class _Dumper(yaml.SafeDumper):
    """safe_dump that puts quotes around a text which _Loader would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, not yet held to any schema. Raises UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the config {path}: {reason}") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} is no config: it has more than {MOST_BYTES} bytes")
    try:
        raw = _parse(content.decode())
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    _check_size(raw)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of keys such as workers: 8; got {raw!r:.80}")
    return raw


def _parse(text: str) -> Any:
    """The value that YAML text stands for: data alone, no object of Python's. Raises ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # the parser raises whatever it trips over, as at 2026-99-99
        raise ValueError(str(error) or type(error).__name__) from None


def _check_size(value: Any, key: str | None = None) -> None:
    """Raise UserError for values that no config has: too many or too deep, among them those that
    contain themselves, integers beyond 64 bits, texts that no file name could be."""
    waiting: list[tuple[Any, str | None, int]] = [(value, key, (key or "").count("."))]
    seen = 0
    while waiting:
        item, path, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise UserError(
                f"a config has at most {MOST_VALUES} values, nested {DEEPEST} deep; this one has"
                " more. If it uses aliases (*name), write out what they stand for",
                None if path is None else path[:80],
            )
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise UserError("an integer is of 64 bits at most; take a smaller one", path)
        if isinstance(item, str) and (len(item) > MOST_CHARACTERS or not _is_text(item)):
            raise UserError(
                f"a text has at most {MOST_CHARACTERS} characters, none of them null or half of a"
                f" pair; got {item!r:.80}",
                path,
            )
        if isinstance(item, Mapping):
            waiting += [(name, path, depth) for name in item]
            children = item.items()
        else:
            children = enumerate(item) if isinstance(item, list | tuple) else ()
        prefix = "" if path is None else f"{path}."
        waiting += [(child, f"{prefix}{name}", depth + 1) for name, child in children]


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    if isinstance(value, np.generic):  # from a grid such as np.linspace
        return value.item()
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    section = raw
    for depth, parent in enumerate(parents):
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            path = ".".join(parents[: depth + 1])
            raise UserError(f"cannot be set: {path} is {section!r}, not a section", key)
    section[last] = _copy(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _scale(config: Config) -> Config:
    from decentral.optimizers import scaled  # torch is slow, and few configs need it here

    assert config.scale_lr is not None
    if config.lr_schedule is not None and config.lr_schedule.name in ("cyclic", "one_cycle"):
        raise UserError(
            f"{config.lr_schedule.name} sets the learning rate from its own options, so there is"
            " nothing to scale; take scale_lr away and scale lr_schedule.max_lr by hand",
            "scale_lr",
        )
    options = scaled(
        config.optimizer.name,
        config.optimizer.options,
        rule=config.scale_lr.rule,
        batch=config.workers * config.task.batch_size * config.gradient.accumulate,
        reference_batch=config.scale_lr.reference_batch,
    )
    optimizer = Component(name=config.optimizer.name, **options)
    return config.model_copy(update={"optimizer": optimizer, "scale_lr": None})


def _split_workers(raw: dict[str, Any]) -> None:
    """`workers: {min: 4, max: 16}` becomes `min_workers` and `workers`."""
    workers = raw.get("workers")
    if not isinstance(workers, dict):
        return
    if set(workers) != {"min", "max"}:
        raise UserError(
            f"must be a number, or {{min: 4, max: 16}}; got the keys {', '.join(workers)}",
            "workers",
        )
    raw["workers"], raw["min_workers"] = workers["max"], workers["min"]


def find_files(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths of graph files, and of a built-in task's data, absolute: a run may be resumed
    from elsewhere."""
    for section in (raw.get("topology"), raw.get("network"), raw.get("task")):
        if not isinstance(section, dict) or ":" in str(section.get("name")):
            continue
        name = section.get("file")
        if isinstance(name, str):
            beside = not os.path.exists(name) and os.path.exists(folder / name)
            section["file"] = str((folder / name if beside else Path(name)).absolute())


def _fix_checkpoints(raw: dict[str, Any]) -> None:
    """Make the path of checkpoints absolute, for the same reason."""
    section = raw.get("checkpoint")
    path = section.get("path") if isinstance(section, dict) else None
    if isinstance(path, str) and path and "://" not in path:
        assert isinstance(section, dict)
        section["path"] = str(Path(path).expanduser().absolute())


def check_keys(raw: Mapping[str, Any], schema: type[BaseModel], path: str = "") -> None:
    """Unknown keys, with the nearest known one: pydantic alone cannot say what is allowed."""
    fields = schema.model_fields
    for key, value in raw.items():
        if key in fields:
            section = _section_of(fields[key].annotation)
            if section is not None and isinstance(value, Mapping):
                check_keys(value, section, f"{path}{key}.")
        elif schema.model_config.get("extra") == "forbid":
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {path}{close[0]}? " if close else ""
            raise UserError(f"is not a known key; {hint}allowed: {', '.join(fields)}", path + key)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
