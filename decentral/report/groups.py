"""Runs that are equal but for the seed make a group; what differs between groups names them."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from decentral.config import Config
from decentral.errors import UserError
from decentral.report.runs import Run

# Of no weight for what a run finds.
APART = ("seed", "name", "checkpoint", "loggers")
LONGEST = 48  # characters of a value in a label


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone, one per seed, in order of seeds.

    `config` has dotted keys, those of APART left out.
    """

    label: str
    config: dict[str, Any]
    runs: list[Run]
    finished: list[Run] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "finished", [run for run in self.runs if run.finished])

    @property
    def shown(self) -> list[Run]:
        """Whose curves are drawn: the finished ones, or all where none has finished."""
        return self.finished or self.runs

    @property
    def status(self) -> str:
        """Such as `3 seeds`, or `2 of 3 finished, 1 failed at step 40`."""
        others = Counter(
            f"{run.status} at step {run.steps} of {run.config.steps}"
            for run in self.runs
            if not run.finished
        )
        if not others:
            return f"{len(self.runs)} seed{'s' if len(self.runs) > 1 else ''}"
        told = [f"{count} {what}" for what, count in others.items()]
        return ", ".join([f"{len(self.finished)} of {len(self.runs)} finished", *told])


def flat(config: Config) -> dict[str, Any]:
    """The config with dotted keys, what is null and what is of no weight left out."""
    leaves: dict[str, Any] = {}

    def add(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                add(item, f"{key}.{name}" if key else str(name))
        else:
            leaves[key] = value

    content = config.model_dump(exclude_none=True)
    add({key: value for key, value in content.items() if key not in APART}, "")
    return leaves


def group(runs: Sequence[Run], say: Callable[[str], None]) -> list[Group]:
    """The groups of these runs, in order of their labels; `say` is told of seeds that come twice.

    Of runs with equal config and seed, which say nothing more than one of them, that with the most
    steps is taken.
    """
    by_config: dict[str, dict[int, Run]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for run in runs:
        config = flat(run.config)
        key = json.dumps(config, sort_keys=True, default=str)
        configs[key] = config
        seeds = by_config.setdefault(key, {})
        same = seeds.setdefault(run.config.seed, run)
        if same is not run:
            better = max(same, run, key=lambda one: (one.finished, one.steps))
            seeds[run.config.seed] = better
            other = run if better is same else same
            say(f"{other.path}: left out, as {better.path} has the same config and seed")
    labels = name([configs[key] for key in by_config])
    groups = [
        Group(label, configs[key], [seeds[seed] for seed in sorted(seeds)])
        for label, (key, seeds) in zip(labels, by_config.items(), strict=True)
    ]
    return sorted(groups, key=lambda one: one.label)


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all configs, in the order of the schema."""
    keys = dict.fromkeys(key for config in configs for key in config)
    order = {key: place for place, key in enumerate(Config.model_fields)}
    keys = sorted(keys, key=lambda key: order.get(key.partition(".")[0], len(order)))
    return [
        key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs[1:])
    ]


def name(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each config, all different: short, of what differs, such as
    `gossip_pga H=8, ring, lr 0.1`."""
    keys = differing(configs) or ["algorithm.name", "algorithm.period", "topology.name"]
    first = ("algorithm.name", "algorithm.period", "topology.name", "topology.file")
    keys = [key for key in first if key in keys] + [key for key in keys if key not in first]
    labels = [_label(config, keys) for config in configs]
    if len(set(labels)) == len(labels):
        return labels
    labels = [
        ", ".join(f"{key}={short(config[key])}" for key in keys if key in config) or "no options"
        for config in configs
    ]
    counts = Counter(labels)
    places: Counter[str] = Counter()
    unique = []
    for label in labels:
        places[label] += 1
        unique.append(f"{label} #{places[label]}" if counts[label] > 1 else label)
    return unique


def _label(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    words = []
    for key in keys:
        if key not in config:
            continue
        value, last = short(config[key]), key.rpartition(".")[2]
        if key == "algorithm.period":
            if words:
                words[-1] += f" H={value}"
            else:
                words.append(f"H={value}")
        elif key == "topology.file":
            words.append(value.rpartition("/")[2])
        elif key in ("algorithm.name", "topology.name", "optimizer.name", "task.name"):
            words.append(value)
        elif last in ("name", "kind"):
            words.append(f"{key.split('.')[-2]} {value}")
        else:
            words.append(f"{last} {value}")
    if words:
        return ", ".join(words)
    sections = dict.fromkeys(key.partition(".")[0] for key in keys)
    return ", ".join(f"no {section}" for section in sections)


def short(value: Any) -> str:
    """A value of a config in a few characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        text = value
    else:
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
        text = text.strip().removesuffix("...").strip()
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]


def choose_baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    """The group that the others are compared to: that of the label, or of a part of it that one
    label alone has, or of the run in a directory; without a wish the first with parallel SGD, else
    the first. `groups` are in order, the best first.

    Raises UserError where the wish fits none, or several.
    """
    if wanted is None:
        parallel = [g for g in groups if g.config.get("algorithm.name") == "parallel_sgd"]
        return (parallel or list(groups))[0]
    fitting = (
        [g for g in groups if g.label == wanted or Path(wanted) in [run.path for run in g.runs]]
        or [g for g in groups if wanted in g.label]
    )  # fmt: skip
    if len(fitting) != 1:
        labels = "; ".join(g.label for g in (fitting or groups)[:20])
        what = "is a part of several labels" if fitting else "is no label"
        raise UserError(f"{wanted!r} {what}; take one of: {labels}", "--baseline")
    return fitting[0]
