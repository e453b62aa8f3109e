"""The config of a run: its schema, how it is read, overridden and written.

`load` is the one way in, for the command line and for Python. What the schema cannot know (the
options of a task, a topology, an algorithm) is checked where it is built: see experiment.py.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from decentral.errors import UserError
from decentral.signature import validation_error

PositiveInt = Annotated[int, Field(gt=0)]
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


class Partition(_Choice):
    """How training samples are split over the workers."""

    kind: str


class TaskConfig(Component):
    batch_size: PositiveInt = 32
    partition: Partition | None = None
    sampling: Literal["shuffle", "replacement"] = "shuffle"


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
    max_accumulate: PositiveInt


class GradientConfig(_Section):
    """What becomes of a worker's own gradient, whatever the method does with it.

    clip_norm: the norm that it is scaled down to where it is longer (null: never). accumulate:
    the batches of task.batch_size whose mean makes one step. autocast: the precision of products
    in forward and backward pass (null: the run's dtype).
    """

    clip_norm: Positive | None = None
    accumulate: PositiveInt = 1
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

    probability: Annotated[float, Field(ge=0, le=1)]
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
    an all-reduce were measured to reach; null means bandwidth_gbps. overlap: an exchange that need
    not wait for the gradient goes on while it is computed. file: a graph file of the cluster, whose
    nodes are the workers and whose edges are all the cables there are, whatever the topology: it
    alone then says how fast links and workers are, where it says so, and the rest holds elsewhere.
    """

    file: str | None = None
    latency_ms: NonNegative = 0.1
    bandwidth_gbps: Positive = 10.0
    overhead: NonNegative = 0.0
    compute_ms: NonNegative | None = None
    jitter: Jitter | None = None
    stragglers: StragglersConfig | None = None
    overlap: bool = False
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
    device: Literal["cpu", "cuda"] = "cpu"


class RayConfig(_Section):
    """`address: null` starts a local cluster for this run; `auto` or an address joins one.

    placement: neighbours share a node where they can, or each is where the graph file says if
    that names the cluster's nodes; or ranks as Ray starts the workers.
    """

    address: str | None = None
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
    placement: Literal["neighbours", "rank"] = "neighbours"
    timeout_s: Positive = 300.0


class Config(_Section):
    """A run. `buffers` are float ones, such as BatchNorm's statistics: see evaluation.py."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: PositiveInt
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
    record: RecordConfig = RecordConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    sim: SimConfig = SimConfig()
    ray: RayConfig = RayConfig()


def load(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read a config from a YAML file or a mapping, apply dotted overrides, check it.

    A key whose value is null is taken away, so its default holds. A relative `topology.file`
    or `network.file` is looked up from the working directory, then beside the config file; a
    relative `checkpoint.path` is of the working directory. What `scale_lr` asks for is done, and
    the section gone: the optimizer's options are those in force.

    Raises UserError naming each key at fault, what came, and what is allowed.
    """
    raw = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    raw = _without_nulls(override(raw, overrides or {}))
    _find_graphs(raw, Path() if isinstance(source, Mapping) else Path(source).parent)
    _fix_checkpoints(raw)
    _check_keys(raw, Config)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise validation_error(error) from None
    return _scale(config) if config.scale_lr is not None else config


def override(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys set. Raises UserError where one leads through what is no section."""
    changed = _copy(raw)
    for key, value in overrides.items():
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
            overrides[key] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"the value is not YAML; got {value!r}", key) from None
    return overrides


def dump(config: Config) -> str:
    """The config as YAML, defaults filled in; `load` reads it back to an equal config."""
    return yaml.dump(config.model_dump(exclude_none=True), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """safe_load that also reads 1e-3 as a number, as YAML 1.2 and every user do."""


class _Dumper(yaml.SafeDumper):
    """safe_dump that puts quotes around a text which _Loader would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of keys such as workers: 8; got {raw!r:.80}")
    return raw


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


def _find_graphs(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths of graph files absolute: a run may be resumed from elsewhere."""
    for section in (raw.get("topology"), raw.get("network")):
        if not isinstance(section, dict):
            continue
        name = section.get("file")
        if isinstance(name, str):
            beside = not Path(name).exists() and (folder / name).exists()
            section["file"] = str((folder / name if beside else Path(name)).absolute())


def _fix_checkpoints(raw: dict[str, Any]) -> None:
    """Make the path of checkpoints absolute, for the same reason."""
    section = raw.get("checkpoint")
    path = section.get("path") if isinstance(section, dict) else None
    if isinstance(path, str) and path and "://" not in path:
        assert isinstance(section, dict)
        section["path"] = str(Path(path).expanduser().absolute())


def _check_keys(raw: Mapping[str, Any], schema: type[BaseModel], path: str = "") -> None:
    """Unknown keys, with the nearest known one: pydantic alone cannot say what is allowed."""
    fields = schema.model_fields
    for key, value in raw.items():
        if key in fields:
            section = _section_of(fields[key].annotation)
            if section is not None and isinstance(value, Mapping):
                _check_keys(value, section, f"{path}{key}.")
        elif schema.model_config.get("extra") == "forbid":
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {path}{close[0]}? " if close else ""
            raise UserError(f"is not a known key; {hint}allowed: {', '.join(fields)}", path + key)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
