"""Files in a folder that may lie anywhere: on a disk, or behind any URL that fsspec knows.

Checkpoints go there, from the driver and from each worker. A file is hashed while it is written,
and looked through before it is loaded. Nothing is renamed: object stores cannot.
"""

import copy
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from decentral.errors import UserError

KEY = "checkpoint.path"
BLOCK = 1 << 20  # bytes read at once
T = TypeVar("T")


class StorageError(Exception):
    """A file could not be written or read, or is not what was written. The message says which."""


class Written(NamedTuple):
    """A file as it was written: its name in its folder, its bytes, their SHA-256 in hex."""

    name: str
    size: int
    sha256: str


class Storage:
    """A folder, by its path or URL; files in it are named `folder/file`.

    `url` is for people, `address` says the same from any working directory. Raises UserError if
    fsspec does not know the protocol, or the package for it is not there.
    """

    def __init__(self, url: str | Path):
        self.url = str(url)
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{self.url} needs a package that is not here: {error}", KEY) from None
        except ValueError as error:
            raise UserError(
                f"is a path, or a URL that fsspec knows, such as s3://bucket/run; got {self.url!r}"
                f" ({error})",
                KEY,
            ) from None
        self._is_local = isinstance(self._fs, LocalFileSystem)
        if not self._is_local and any(letter in root for letter in "*?["):
            raise UserError(f"must hold none of * ? [ in a URL; got {self.url!r}", KEY)
        self._root = root.rstrip("/")
        self.address = self._fs.unstrip_protocol(self._root)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.address,)

    def at(self, name: str) -> str:
        """The URL of a file or folder in it, for people."""
        return f"{self.url.rstrip('/')}/{name}"

    def write(self, name: str, fill: Callable[[IO[bytes]], object]) -> Written:
        """Write a file, whose content `fill` writes to what it is given.

        Raises StorageError; what is there of the file then is no file that anyone counts on.
        """
        sink = None
        try:
            with self._create(name) as file:
                sink = _Hashed(file)
                fill(cast("IO[bytes]", sink))  # all of it that a writer needs
                if self._is_local:
                    file.flush()
                    os.fsync(file.fileno())
        except Exception as error:  # each store has exceptions of its own
            # torch.save hides what stopped it behind an error of its own.
            cause = error if sink is None or sink.failure is None else sink.failure
            raise StorageError(f"cannot write {self.at(name)}: {_reason(cause)}") from error
        return Written(name.rpartition("/")[2], sink.size, sink.digest.hexdigest())

    def read(self, name: str, written: Written | None = None) -> bytes:
        """The content of a file. Raises StorageError, also if it is not what was `written`."""
        with self._open(name) as file:
            content = _reading(name, file.read)
        if written is not None and hashlib.sha256(content).hexdigest() != written.sha256:
            raise StorageError(f"{written.name} is not what was written")
        return content

    def load(
        self, folder: str, name: str, files: Mapping[str, Written], take: Callable[[Any], object]
    ) -> None:
        """Let `take` have the state in a file, tensors on the CPU: only data, never code.

        Raises StorageError if it is none of `files`, not what was written, or not for `take`.
        """
        if name not in files:
            raise StorageError(f"{name} is missing")
        path = f"{folder}/{name}"
        digest = hashlib.sha256()
        with self._open(path) as file:
            while block := _reading(name, lambda: file.read(BLOCK)):
                digest.update(block)
        if digest.hexdigest() != files[name].sha256:
            raise StorageError(f"{name} is not what was written")
        with self._open(path) as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch does not say what a file of another kind raises
                raise StorageError(f"{name} holds no state that is safe to load") from error
        try:
            take(state)
        except Exception as error:  # so many parts, so many ways not to fit
            raise StorageError(f"{name} is no state of this run") from error

    def files(self, folder: str = "") -> dict[str, int]:
        """Name and bytes of all that is in a folder; empty if there is no such folder."""
        try:
            self._fs.invalidate_cache()  # others write here too
            there = self._fs.ls(f"{self._root}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:  # as in write
            raise StorageError(f"cannot read {self.at(folder)}: {_reason(error)}") from error
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in there}

    def remove(self, name: str) -> None:
        """Take a file, or a folder with all that is in it, away. Raises StorageError."""
        try:
            self._fs.rm(f"{self._root}/{name}", recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:  # as in write
            raise StorageError(f"cannot remove {self.at(name)}: {_reason(error)}") from error

    @contextmanager
    def probe(self) -> Iterator[str]:
        """The name of a file that is there for the while, and holds its own name.

        Raises UserError if none can be written. Leaves nothing behind.
        """
        name = f"probe-{uuid.uuid4().hex}"
        root = Path(self._root)
        made = [f for f in (root, *root.parents) if not f.exists()] if self._is_local else []
        try:
            self.write(name, lambda sink: sink.write(name.encode()))
            yield name
        except StorageError as error:
            raise UserError(f"{error}; take another place", KEY) from None
        finally:
            with suppress(StorageError):  # where it could not be written
                self.remove(name)
            for folder in made:
                with suppress(OSError):  # no longer empty, or never made
                    folder.rmdir()

    def _create(self, name: str) -> IO[bytes]:
        path = f"{self._root}/{name}"
        try:
            return self._fs.open(path, "wb")
        except FileNotFoundError:  # stores without folders need none
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self._fs.open(path, "wb")

    def _open(self, name: str) -> IO[bytes]:
        return _reading(name, lambda: self._fs.open(f"{self._root}/{name}", "rb"))


class Writing:
    """A state on its way into a file: copied to the host's memory at once, then written by a
    thread, so that its owner may go on and change it."""

    def __init__(self, storage: Storage, name: str, state: Any):
        own = _copied(state)
        self._future = background(lambda: storage.write(name, lambda file: torch.save(own, file)))

    def result(self, wait: bool) -> Written | StorageError | None:
        """The file, or why it could not be written; None while it is being written."""
        if not wait and not self._future.done():
            return None
        try:
            return self._future.result()
        except StorageError as error:
            return error


def all_written(parts: Sequence[Written | StorageError | None]) -> list[Written] | None:
    """All parts, or None while one of them is being written. Raises StorageError if one failed."""
    written = []
    if any(part is None for part in parts):
        return None
    for part in parts:
        if isinstance(part, StorageError):
            raise part
        written.append(part)
    return written


def background(function: Callable[[], T]) -> "Future[T]":
    """What the function will have returned; a process that ends does not wait for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # handed to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class _Hashed:
    """Writes to a file and hashes what it writes; `failure` is what the file raised."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self.failure: Exception | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except Exception as error:
            self.failure = error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def _reading(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # each store has exceptions of its own
        raise StorageError(f"{name.rpartition('/')[2]} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """In one line."""
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or " ".join(str(error).split()) or type(error).__name__


def _copied(value: Any) -> Any:
    """A copy of a state, its tensors in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) is list:
        return [_copied(item) for item in value]
    return copy.deepcopy(value)
