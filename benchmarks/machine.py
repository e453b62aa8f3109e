"""Where figures were taken: hardware, versions and load, for the JSON that benchmarks write."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe(started: float) -> dict[str, Any]:
    """`started`: the load average of a minute when the benchmark began, `os.getloadavg()[0]`."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": {"start": started, "end": os.getloadavg()[0]},
        "system": platform.system(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("decentral", "torch", "numpy")},
        },
    }


def write(figures: dict[str, Any], out: Path) -> None:
    """Write figures as JSON, four significant digits, so that a diff shows what changed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_rounded(figures), indent=2, ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cpu_model() -> str:
    """The processor's name; /proc knows it where Linux runs, `platform` often does not."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
