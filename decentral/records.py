"""The run directory: config.yaml, split.npz, metrics.jsonl, summary.json, model.pt, checkpoints/.

The coordinator writes it, whichever engine runs. Every line of metrics.jsonl is flushed as it is
written, so a run that fails keeps the records so far.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from decentral.config import Config, dump
from decentral.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Record = dict[str, float | int | None]

# Columns of every record; of the second, null where a number is not finite.
NUMBERS = ("step", "bytes_sent", "time_s", "sim_time_s", "workers")
FIGURES = ("loss", "consensus_distance", "period", "lr")


def check(path: Path) -> None:
    """Raise UserError if `path` holds a run, or no run directory can be made there.

    Leaves nothing behind.
    """
    if (path / "config.yaml").exists() or (path / "metrics.jsonl").exists():
        raise UserError(
            f"{path} holds a run; take another folder, or go on with it: --resume {path}", "--out"
        )
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; take another folder", "--out") from None
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()


class RunDirectory:
    """Writes the files of one run; `started` once it holds any."""

    def __init__(self, path: Path):
        self.path = path
        self.started = False
        self._metrics: IO[str] | None = None

    def start(
        self,
        config: Config,
        shards: "Sequence[Tensor]",
        step: int,
        labels: "tuple[Tensor, Tensor] | None" = None,
    ) -> list[Record]:
        """Write the resolved config and the split, and open the metrics after step `step`.

        labels: the classes and how many samples of each every worker has, where that is known.
        Returns the records up to there: none for a new run. Later ones, of a run that went on
        beyond its checkpoint, are dropped; they will come again.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.started = True
        # A run that goes on has not ended: who watches goes by the summary.
        (self.path / "summary.json").unlink(missing_ok=True)
        write_atomically(self.path / "config.yaml", dump(config).encode())
        sizes = np.array([len(shard) for shard in shards])
        split = {"indices": np.concatenate(shards), "sizes": sizes}
        if labels is not None:
            split["classes"], split["label_counts"] = (part.numpy() for part in labels)
        with _atomic(self.path / "split.npz") as file:
            np.savez(file, allow_pickle=False, **split)
        metrics = self.path / "metrics.jsonl"
        rows = [row for row in read(metrics) if row["step"] <= step] if step else []
        write_atomically(metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._metrics = open(metrics, "a", encoding="utf-8")  # noqa: SIM115
        return rows

    def append(self, record: Record) -> None:
        """One line of metrics.jsonl."""
        assert self._metrics is not None, "start comes before append"
        self._metrics.write(json.dumps(_finite(record)) + "\n")
        self._metrics.flush()

    def finish(self, summary: Mapping[str, Any], model: "Mapping[str, Tensor] | None") -> None:
        """Write summary.json, and model.pt if there is a model; close the metrics."""
        if self._metrics is not None:
            self._metrics.close()
        text = json.dumps(_finite(summary), indent=2) + "\n"
        write_atomically(self.path / "summary.json", text.encode())
        if model is not None:
            import torch  # slow, and whoever only reads records needs none

            with _atomic(self.path / "model.pt") as file:
                torch.save(dict(model), file)


def read(metrics: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that is none, as one that was cut off, is left out."""
    return parse(metrics.read_bytes())


def parse(content: bytes) -> list[dict[str, Any]]:
    """The same of lines of one."""
    rows = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(row):
            rows.append(row)
    return rows


def _is_record(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() >= {*NUMBERS, *FIGURES}
        and all(value is None or _is_number(value) for value in row.values())
        and all(row[name] is not None for name in NUMBERS)
        and type(row["step"]) is int
        and row["step"] >= 0
    )


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and -(2**63) <= value < 2**63)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    with _atomic(path) as file:
        file.write(content)


class _atomic:
    """A binary file that takes its name only once it is complete and on the disk."""

    def __init__(self, path: Path):
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> IO[bytes]:
        self._file = open(self._partial, "wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
