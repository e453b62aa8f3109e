"""Checkpoints of a run: a folder each, `step-00000400`, in the run directory or anywhere else.

It holds the files that the engine's workers wrote, coordinator.json, and, written last,
checksums.json, which names every file with its size and SHA-256. A checkpoint counts as there with
that file alone, so a torn one is never taken for a good one, in object stores too, which cannot
rename a folder. Workers go on once their state is copied; a checkpoint is completed when all parts
are written. Nothing in it is a pickle of code.
"""

import functools
import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentral.config import CheckpointConfig
from decentral.coordinator import Coordinator
from decentral.engines import Engine
from decentral.errors import UserError, WorkerError
from decentral.storage import KEY, Storage, StorageError, Written, background

CHECKSUMS = "checksums.json"  # size and SHA-256 of every other file
COORDINATOR = "coordinator.json"
FOLDER = re.compile(r"step-(\d{8,})")
FILE = re.compile(r"\w[\w.-]*")


@dataclass
class _UnderWay:
    """A checkpoint that is being written: the coordinator's state as of its step, and, once the
    workers' parts are there, what completes it."""

    folder: str
    state: bytes
    completion: "Future[None] | None" = None


class Checkpoints:
    """Writes the checkpoints of a run and goes on from them; the newest `keep` stay.

    At most one is under way. One that cannot be written is told to `say`, and `failure` says why
    for as long as no later one is there; those before stay.
    """

    def __init__(
        self, storage: Storage, keep: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.storage = storage
        self.failure: str | None = None
        self.last: str | None = None  # written
        self._keep = keep
        self._say = say
        self._under_way: _UnderWay | None = None
        self._has_waited = False

    @classmethod
    def of(
        cls, config: CheckpointConfig, run: Path, say: Callable[[str], None] = lambda line: None
    ) -> "Checkpoints":
        """Those of a run directory, wherever the config has them."""
        return cls(Storage(config.path or run / "checkpoints"), config.keep, say)

    def check(self, new: bool) -> None:
        """Raise UserError if none can be written there, or a `new` run would find others."""
        if new and self._listed():
            raise UserError(
                f"{self.storage.url} holds checkpoints of a run; give each run a place of its own,"
                " or go on with that run: --resume",
                KEY,
            )
        with self.storage.probe():
            pass

    def begin(self, coordinator: Coordinator, engine: Engine) -> None:
        """Begin the checkpoint of `coordinator.step`: the workers may go on when this returns.

        One that is still under way is waited for, and the first such wait told to `say`.
        """
        self.finish(engine, wait=False)
        if self._under_way is not None:
            if not self._has_waited:
                self._has_waited = True
                self._say("a checkpoint is due before the last one is written; waiting for it")
            self.finish(engine)
        folder = _folder(coordinator.step)
        state = json.dumps(coordinator.state()).encode()
        engine.save(self.storage, folder)
        self._under_way = _UnderWay(folder, state)

    def finish(self, engine: Engine, wait: bool = True) -> None:
        """Complete the checkpoint that is under way, if its parts are written, or wait for it."""
        under_way = self._under_way
        if under_way is None:
            return
        try:
            if under_way.completion is None:
                parts = engine.saved(wait)
                if parts is None:
                    return
                under_way.completion = background(lambda: self._complete(under_way, parts))
            if wait or under_way.completion.done():
                under_way.completion.result()
                self._under_way = self.failure = None
                self.last = self.storage.at(under_way.folder)
        except (StorageError, WorkerError) as error:
            self._under_way = None
            self.failure = f"no checkpoint {under_way.folder}: {error}"
            self._say(f"warning: {self.failure}")

    def newest(self) -> int:
        """The step of the newest one that is whole, as far as can be told without reading it all.

        Raises UserError if there is none.
        """
        return _step(self.newest_files()[0])

    def newest_files(self) -> tuple[str, dict[str, Written]]:
        """The folder of that one, and what it consists of."""
        refused = []
        for folder in self._listed():
            try:
                return folder, self._files(folder)
            except StorageError as error:
                refused.append(_damaged(folder, error))
        raise self._none(refused)

    def restore(self, coordinator: Coordinator, engine: Engine) -> None:
        """Bring engine and coordinator to the newest sound one; `say` is told of newer ones.

        Raises UserError if there is none: the engine's workers are then of no use.
        """
        refused = []
        for folder in self._listed():
            try:
                files = self._files(folder)
                state = self._state(folder, files, coordinator)
                load = functools.partial(engine.load, self.storage, folder, files)
                coordinator.restore(state, load)
            except StorageError as error:
                refused.append(_damaged(folder, error))
                continue
            for line in refused:
                self._say(f"{line}; taking {folder}")
            return
        raise self._none(refused)

    def _complete(self, under_way: _UnderWay, parts: list[Written]) -> None:
        """Write what makes it count, then drop all others but the newest."""
        folder, storage = under_way.folder, self.storage
        own = storage.write(f"{folder}/{COORDINATOR}", lambda file: file.write(under_way.state))
        files = {part.name: {"size": part.size, "sha256": part.sha256} for part in (own, *parts)}
        for name in storage.files(folder).keys() - files.keys():  # of an earlier attempt
            storage.remove(f"{folder}/{name}")
        checksums = json.dumps(files, indent=2).encode()
        storage.write(f"{folder}/{CHECKSUMS}", lambda file: file.write(checksums))
        # What is newer was refused when the run went on from an older one.
        others = [other for other in self._folders() if other != folder]
        older = [o for o in others if _step(o) < _step(folder) and self._counts(o)]
        try:
            for other in others:
                if other not in older[: self._keep - 1]:
                    storage.remove(f"{other}/{CHECKSUMS}")
                    storage.remove(other)
        except StorageError as error:
            self._say(f"warning: an old checkpoint stays: {error}")

    def _folders(self) -> list[str]:
        """Newest first, whole or not."""
        return sorted(filter(FOLDER.fullmatch, self.storage.files()), key=_step, reverse=True)

    def _listed(self) -> list[str]:
        """The same, for a user. Raises UserError if that cannot be told."""
        try:
            return self._folders()
        except StorageError as error:
            raise UserError(f"{error}; mend that, or name another place", KEY) from None

    def _counts(self, folder: str) -> bool:
        return CHECKSUMS in self.storage.files(folder)

    def _files(self, folder: str) -> dict[str, Written]:
        """What a checkpoint consists of. Raises StorageError if it is not all there."""
        there = self.storage.files(folder)
        if CHECKSUMS not in there:
            raise StorageError(f"{CHECKSUMS} is missing: it was never completed")
        files = _parse(self.storage.read(f"{folder}/{CHECKSUMS}"))
        for name, file in files.items():
            if name not in there:
                raise StorageError(f"{name} is missing")
            if there[name] != file.size:
                raise StorageError(f"{name} is not what was written")
        if foreign := there.keys() - files.keys() - {CHECKSUMS}:
            raise StorageError(f"{min(foreign)} is not part of it")
        return files

    def _state(
        self, folder: str, files: dict[str, Written], coordinator: Coordinator
    ) -> dict[str, Any]:
        """The coordinator's. Raises StorageError if it is none of this run at this step."""
        content = self.storage.read(f"{folder}/{COORDINATOR}", files[COORDINATOR])
        state = _json(content)
        if not _is_of(state, coordinator.state()) or state["step"] != _step(folder):
            raise StorageError(f"{COORDINATOR} is no state of this run")
        return state

    def _none(self, refused: list[str]) -> UserError:
        place = self.storage.url
        if not refused:
            return UserError(
                f"{place} holds no checkpoint; set checkpoint.every in a run that you may resume",
                "--resume",
            )
        return UserError(
            f"{place} holds no sound checkpoint: {'; '.join(refused)}. Start the run again",
            "--resume",
        )


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _step(folder: str) -> int:
    return int(folder.removeprefix("step-"))


def _damaged(folder: str, error: StorageError) -> str:
    return f"checkpoint {folder} is damaged: {error}"


def _json(content: bytes) -> Any:
    """None if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _parse(checksums: bytes) -> dict[str, Written]:
    """The files that checksums.json names. Raises StorageError if it does not say it all."""
    files = {}
    rows = _json(checksums)
    if not isinstance(rows, dict) or COORDINATOR not in rows:
        raise StorageError(f"{CHECKSUMS} is unreadable")
    for name, row in rows.items():
        if not FILE.fullmatch(name):
            raise StorageError(f"{CHECKSUMS} names {name!r}, no file of a checkpoint")
        if not isinstance(row, dict) or row.keys() != {"size", "sha256"}:
            raise StorageError(f"{CHECKSUMS} is unreadable")
        files[name] = Written(name, row["size"], row["sha256"])
    return files


def _is_of(state: Any, other: dict[str, Any]) -> bool:
    """Whether a state is of the same run as another one, which may have had other workers."""
    free = ("members", "away", "clock")
    if not isinstance(state, dict) or not all(isinstance(state.get(key), list) for key in free):
        return False
    workers = range(len(state["clock"]))
    return (
        all(isinstance(seconds, int | float) for seconds in state["clock"])
        and all(type(i) is int and i in workers for i in (*state["members"], *state["away"]))
        and len(state["members"]) > 0
        and state["members"] == sorted(set(state["members"]))
        and _alike(*({k: v for k, v in s.items() if k not in free} for s in (state, other)))
    )


def _alike(one: Any, other: Any) -> bool:
    """Whether two states have the same keys, lengths and kinds of values."""
    if isinstance(other, dict):
        return (
            isinstance(one, dict)
            and one.keys() == other.keys()
            and all(_alike(one[key], value) for key, value in other.items())
        )
    if isinstance(other, list):
        return isinstance(one, list) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(other, float):
        return isinstance(one, int | float)
    return isinstance(one, type(other))
