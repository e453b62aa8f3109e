"""Runs on digits that are split unevenly over the workers, and how to compare them: what benchmarks
of methods share."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import decentral


def last_record(
    parts: Mapping[str, Any], alpha: float, seed: int, steps: int, workers: int
) -> dict[str, Any]:
    """Of a run with these sections of a config: an MLP of 4,810 parameters, Dirichlet `alpha`."""
    result = decentral.run(
        {
            "workers": workers,
            "steps": steps,
            "seed": seed,
            "task": {
                "name": "digits",
                "batch_size": 16,
                "model": {"name": "mlp", "hidden": [64]},
                "partition": {"kind": "dirichlet", "alpha": alpha},
            },
            "network": {"compute_ms": 1},
            "record": {"every": steps},
            **parts,
        }
    )
    return result.summary["final"]


def paired(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """The mean difference of the same seeds' figures, and its standard error."""
    differences = [a - b for a, b in zip(these, those, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return {
        "mean": statistics.mean(differences),
        "standard_error": spread / len(differences) ** 0.5,
    }
