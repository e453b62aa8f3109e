"""What a sweep gave: a row per point, and the best values of the keys that were to be picked."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from decentral.sweep.job import summary_of
from decentral.sweep.spec import CompareConfig, PickConfig, Point


class Picked(NamedTuple):
    """The best of a method, and of whatever else the grid varies.

    values: of the picked keys; score: mean over seeds of the column that was picked by; points: of
    all seeds. at_edge: the keys whose value is the least or the greatest that was tried, so that a
    better one may lie beyond.
    """

    method: str
    values: Mapping[str, Any]
    score: float
    points: tuple[Point, ...]
    at_edge: tuple[str, ...]


def rows(
    points: Sequence[Point], keys: Sequence[str], directories: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """What is known of each point: its values of the `keys`, how it ended, and the last record."""
    made = []
    for point in points:
        directory = directories[point.identity]
        summary = summary_of(directory)
        made.append(
            {
                "method": point.method,
                **{key: point.values.get(key) for key in keys},
                "seed": point.config.seed,
                "status": summary.get("status", "missing"),
                **(summary.get("final") or {}),
                "error": summary.get("error"),
                "directory": str(directory),
            }
        )
    return made


def pick(
    points: Sequence[Point], compare: CompareConfig, found: Sequence[Mapping[str, Any]]
) -> list[Picked]:
    """For each run but for the picked keys and the seed, the best values of these keys.

    `found` are the `rows` of the points. Values for which a seed is not done, or has no finite
    score, are not eligible; of equal ones the first of the grid is taken.
    """
    chosen = compare.pick
    if chosen is None:
        return []
    scores = {
        point.identity: row.get(chosen.by) if row["status"] == "done" else None
        for point, row in zip(points, found, strict=True)
    }
    groups: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        group = groups.setdefault(_rest(point, ("seed", *chosen.keys)), {})
        group.setdefault(_rest(point, ("seed",)), []).append(point)
    picked = []
    for group in groups.values():
        candidates = [tuple(members) for members in group.values()]
        tried = [
            (_score([scores[point.identity] for point in members], chosen), members)
            for members in candidates
        ]
        score, members = min(tried, key=lambda pair: pair[0])
        if math.isfinite(score):
            values = {key: members[0].values.get(key) for key in chosen.keys}
            at_edge = tuple(key for key in chosen.keys if _at_edge(key, values[key], candidates))
            sign = -1 if chosen.by == "validation_accuracy" else 1
            picked.append(Picked(members[0].method, values, sign * score, members, at_edge))
    return picked


def _rest(point: Point, without: Sequence[str]) -> str:
    """A point's config less some keys: what points have in common that differ in these alone."""
    raw = point.config.model_dump(exclude={"name"})
    for key in without:
        *parents, last = key.split(".")
        section: Any = raw
        for parent in parents:
            section = section.get(parent) or {}
        section.pop(last, None)
    return json.dumps(raw, sort_keys=True)


def _score(values: Sequence[float | None], chosen: PickConfig) -> float:
    """Mean over seeds, the less the better; infinite where a seed has none."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return math.inf
    return mean(there) * (-1 if chosen.by == "validation_accuracy" else 1)


def _at_edge(key: str, value: Any, candidates: Sequence[Sequence[Point]]) -> bool:
    tried = [members[0].values.get(key) for members in candidates]
    numbers = [v for v in tried if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(tried) or len(set(numbers)) < 2:
        return False
    return value in (min(numbers), max(numbers))
