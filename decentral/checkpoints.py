"""Checkpoints of a run: a folder each, `checkpoints/step-00000400`, there whole or not at all.

It holds what the engine saved of its workers and coordinator.json. Written under another name
first, so a torn checkpoint is never taken for a good one. Nothing in it is a pickle of code.
"""

import json
import os
import shutil
from pathlib import Path

from decentral.coordinator import Coordinator
from decentral.engines import Engine
from decentral.errors import UserError
from decentral.records import write_atomically

KEEP = 2


def save(run: Path, coordinator: Coordinator, engine: Engine) -> Path:
    """Write the checkpoint of `coordinator.step`, and drop all but the newest few."""
    folder = run / "checkpoints" / f"step-{coordinator.step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    engine.save(partial)
    for file in partial.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    write_atomically(partial / "coordinator.json", json.dumps(coordinator.state()).encode())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for old in _all(run)[:-KEEP]:
        shutil.rmtree(old)
    return folder


def latest(run: Path) -> Path:
    """The newest checkpoint of a run directory, or a UserError if there is none."""
    folders = _all(run)
    if not folders:
        raise UserError(
            f"{run} holds no checkpoint; set checkpoint.every in a run that you may resume",
            "--resume",
        )
    return folders[-1]


def restore(folder: Path, coordinator: Coordinator, engine: Engine) -> None:
    """Bring engine and coordinator to where the checkpoint was taken."""
    engine.load(folder)
    coordinator.restore(json.loads((folder / "coordinator.json").read_text()))


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was taken."""
    return int(folder.name.removeprefix("step-"))


def _all(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))
