"""A sweep: a config with a section `compare`, and the points that it stands for.

`read_sweep` is the one way in. A point is a whole config of a run. What makes no difference to its
records (its name, where they go, where it runs) is no part of its identity, so that no two points
of a sweep, nor of a sweep that has grown, are the same run.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from decentral import config as configs
from decentral.config import Config, Count, PositiveInt
from decentral.errors import UserError
from decentral.experiment import algorithm_of
from decentral.signature import validation_error

MOST_POINTS = 10_000
NO_PART_OF_IDENTITY = {"name", "loggers", "checkpoint", "ray"}
LONGEST_NAME = 120  # of a point's directory, less its identity


def _first_seeds(seeds: object) -> object:
    return list(range(seeds)) if type(seeds) is int and 0 < seeds <= MOST_POINTS else seeds


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PickConfig(_Section):
    """Of `keys`, all in the grid, the values that are best for each method, and whatever else the
    grid varies, in the mean over seeds of the column `by` in the last record.

    Never a column of the test set: that is for the report on what was picked.
    """

    keys: Annotated[list[str], Field(min_length=1)]
    by: Literal["validation_loss", "validation_accuracy", "loss"] = "validation_loss"


class CompareConfig(_Section):
    """What a sweep varies, and where it runs.

    grid: dotted keys of the config, each with the values to try. methods: names, each with dotted
    keys and values that go over the grid's; a null takes a key away. seeds: a list, or how many
    from 0 on. baseline: the method that the report holds the others to. processes: points at a
    time (null: as many as there are cores, here or in the cluster). threads: of each.
    """

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    methods: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], dict[str, Any]] = {}
    seeds: Annotated[list[Count], Field(min_length=1), BeforeValidator(_first_seeds)] = [0]
    baseline: str | None = None
    pick: PickConfig | None = None
    on: Literal["processes", "ray"] = "processes"
    processes: PositiveInt | None = None
    threads: PositiveInt = 1


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `values`: those of the grid that are in force in it, by key."""

    config: Config
    method: str
    values: Mapping[str, Any]
    identity: str

    @property
    def name(self) -> str:
        """For people, and for a directory: unique through the identity at its end."""
        parts = [self.method, *(f"{key}={_word(value)}" for key, value in self.values.items())]
        parts.append(f"seed={self.config.seed}")
        readable = re.sub(r"[^A-Za-z0-9._=+-]", "_", "-".join(parts))[:LONGEST_NAME]
        return f"{readable}-{self.identity}"

    @property
    def label(self) -> str:
        """For messages."""
        pairs = [f"{key}={_word(value)}" for key, value in self.values.items()]
        return " ".join([self.method, *pairs, f"seed={self.config.seed}"])


@dataclass(frozen=True)
class Sweep:
    """`base`: the config without its section `compare`, as it was given; see CompareConfig."""

    name: str
    base: Mapping[str, Any]
    compare: CompareConfig
    points: Sequence[Point]

    def dump(self) -> str:
        """As YAML, from which `read_sweep` makes the same sweep anywhere on this machine."""
        section = self.compare.model_dump(exclude_defaults=True)
        return configs.to_yaml({**self.base, "compare": section})


def read_sweep(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Sweep:
    """Read a sweep from a YAML file or a mapping, apply dotted overrides, and expand it.

    `compare.grid.optimizer.lr` and `compare.methods.local_sgd.algorithm.period` are overrides
    too: of a key of the grid, and of a key of a method.

    Raises UserError naming the key at fault, and the point where it is one. The parts of points
    are not built here.
    """
    folder = Path() if isinstance(source, Mapping) else Path(source).parent
    raw = dict(source) if isinstance(source, Mapping) else configs.read(Path(source))
    overrides = dict(overrides or {})
    raw = _override(raw, overrides)
    section = raw.pop("compare", None)
    if not isinstance(section, Mapping):
        raise UserError(
            "is what a sweep is made of; add, for example, compare: {grid: {optimizer.lr: [0.1,"
            f" 0.3]}}, seeds: 3}}; got {section!r}",
            "compare",
        )
    section = {key: value for key, value in section.items() if value is not None}
    configs.check_keys(section, CompareConfig, "compare.")
    try:
        compare = CompareConfig.model_validate(section)
    except ValidationError as error:
        raise validation_error(error, "compare") from None
    _check_varied(raw, compare, overrides)
    configs.find_files(raw, folder)
    compare = _with_absolute_files(compare, folder)
    points = _expand(raw, compare)
    _check_effect(points, compare)
    _check_choices(points, compare)
    return Sweep(str(raw.get("name", "compare")), raw, compare, points)


def _override(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`override`, but what follows `compare.grid.` is one key, and so for a method's."""
    deep = ("compare.grid.", "compare.methods.")
    changed = configs.override(raw, {k: v for k, v in overrides.items() if not k.startswith(deep)})
    for key, value in overrides.items():
        if not key.startswith(deep):
            continue
        _, kind, name = key.split(".", 2)
        path, last = ("compare", kind), name
        if kind == "methods" and "." in name:
            method, last = name.split(".", 1)
            path = (*path, method)
        section = changed
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"cannot be set: {part} is {section!r}, not a section", key)
        if value is None and len(path) == 2:  # of a method's keys a null is a value
            section.pop(last, None)
        else:
            section[last] = value
    return changed


def _check_varied(
    raw: Mapping[str, Any], compare: CompareConfig, overrides: Mapping[str, Any]
) -> None:
    """Raise UserError for a key that the sweep sets itself, or that would have no effect."""
    places = {"compare.grid": compare.grid}
    places |= {f"compare.methods.{name}": keys for name, keys in compare.methods.items()}
    for place, keys in places.items():
        for key in keys:
            if key in ("seed", "name", "engine") or key.split(".")[0] in ("compare", "ray"):
                raise UserError(
                    f"is the same for all points, or the sweep's to set; take {key} away"
                    + (", and set compare.seeds" if key == "seed" else ""),
                    f"{place}.{key}",
                )
    if "seed" in raw:
        raise UserError(
            "a sweep has its seeds from compare.seeds; set it there, such as"
            f" compare.seeds=[{raw['seed']}], and take seed away",
            "seed",
        )
    if raw.get("engine", "sim") != "sim":
        raise UserError("a sweep runs in the simulator; set engine=sim", "engine")
    everywhere = [set(keys) for keys in compare.methods.values()]
    for key in overrides:
        if key in compare.grid:
            raise UserError(
                f"is in the grid, which would go over it; set compare.grid.{key}=[...]", key
            )
        if everywhere and key in set.intersection(*everywhere):
            raise UserError(
                f"is set by every method, which would go over it; set compare.methods.NAME.{key}",
                key,
            )


def _with_absolute_files(compare: CompareConfig, folder: Path) -> CompareConfig:
    """Paths of files in the grid and in the methods, as `find_files` makes them."""

    def found(key: str, value: Any) -> Any:
        raw = configs.override({}, {key: value})
        configs.find_files(raw, folder)
        for part in key.split("."):
            raw = raw[part]
        return raw

    grid = {key: [found(key, value) for value in values] for key, values in compare.grid.items()}
    methods = {
        name: {key: found(key, value) for key, value in keys.items()}
        for name, keys in compare.methods.items()
    }
    return compare.model_copy(update={"grid": grid, "methods": methods})


def _expand(raw: Mapping[str, Any], compare: CompareConfig) -> list[Point]:
    """All points, each once: methods first, the seeds fastest."""
    points: dict[str, Point] = {}
    for count, (name, cell, seed) in enumerate(_cells(compare)):
        if count >= MOST_POINTS:
            raise UserError(f"a sweep has at most {MOST_POINTS} points; try fewer", "compare.grid")
        own = compare.methods[name] if name is not None else {}
        changes = {key: value for key, value in cell.items() if key not in own} | own
        try:
            point = _point(raw, {**changes, "seed": seed}, name, compare.grid)
        except UserError as error:
            told = " ".join(f"{key}={_word(value)}" for key, value in changes.items())
            where = " ".join(part for part in (name, told) if part)
            raise UserError(f"{error.message}; at the point {where}", error.key) from None
        points.setdefault(point.identity, point)
    return list(points.values())


def _cells(compare: CompareConfig) -> Iterator[tuple[str | None, dict[str, Any], int]]:
    for name in compare.methods or (None,):
        for values in product(*compare.grid.values()):
            for seed in compare.seeds:
                yield name, dict(zip(compare.grid, values, strict=True)), seed


def _point(
    raw: Mapping[str, Any],
    changes: Mapping[str, Any],
    name: str | None,
    grid: Mapping[str, Sequence[Any]],
) -> Point:
    config = configs.load(raw, changes)
    if config.network.compute_ms is None:
        raise UserError(
            "points that run beside each other cannot measure how long a step takes; say it, such"
            " as network.compute_ms=2",
            "network.compute_ms",
        )
    if config.checkpoint.path is not None:
        raise UserError(
            "each point has its checkpoints in its own run directory; take it away",
            "checkpoint.path",
        )
    named = config.topology is not None and config.topology.name is not None
    if named and not algorithm_of(config).needs_topology:
        # Its edges are no cables: a run whose workers do not average over them is the same without.
        config = config.model_copy(update={"topology": None})
    method = name or config.algorithm.name
    config = config.model_copy(update={"name": method})
    resolved = config.model_dump()
    values = {key: found for key in grid if (found := _at(resolved, key)) is not None}
    return Point(config, method, values, _identity(config))


def _identity(config: Config) -> str:
    """A hash of what differs from the defaults: options that are new some day change nothing."""
    kept = config.model_dump(exclude_defaults=True, exclude=NO_PART_OF_IDENTITY)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _check_effect(points: Sequence[Point], compare: CompareConfig) -> None:
    """Raise UserError for a key of the grid whose values make no difference to any point."""
    for key, values in compare.grid.items():
        if len(values) > 1 and len({json.dumps(p.values.get(key)) for p in points}) == 1:
            raise UserError(
                "makes no difference: every method sets it, or none uses it; take it out of the"
                " grid",
                f"compare.grid.{key}",
            )


def _check_choices(points: Sequence[Point], compare: CompareConfig) -> None:
    methods = sorted({point.method for point in points})
    if compare.baseline is not None and compare.baseline not in methods:
        raise UserError(
            f"is one of the methods, {', '.join(methods)}; got {compare.baseline!r}",
            "compare.baseline",
        )
    pick = compare.pick
    if pick is None:
        return
    for key in pick.keys:
        if key not in compare.grid:
            raise UserError(
                f"are keys of the grid, {', '.join(compare.grid)}; got {key!r}",
                "compare.pick.keys",
            )
    if pick.by.startswith("validation"):
        for point in points:
            if point.config.task.validation is None:
                raise UserError(
                    "is picked by a validation split, which the points need; set"
                    " task.validation=0.1, or compare.pick.by=loss, of the training",
                    "compare.pick.by",
                )


def _at(resolved: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    value: Any = resolved
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _word(value: Any) -> str:
    """A value of the grid in a word: of a section its values alone."""
    if isinstance(value, Mapping):
        return "+".join(_word(item) for item in value.values())
    if isinstance(value, list | tuple):
        return "+".join(_word(item) for item in value)
    if isinstance(value, str) and "/" in value:
        return Path(value).stem
    return "null" if value is None else str(value)
