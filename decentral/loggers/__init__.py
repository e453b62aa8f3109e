"""Where the records of a run go besides metrics.jsonl: TensorBoard, W&B, MLflow, Ray's metrics.

`build` makes the loggers that a config names, before anything starts; the packages of others are
not imported. `Loggers` hands them the records. Each logs in a thread of its own: a run waits for
none of them, and goes on without one that fails.
"""

import importlib
import json
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from decentral.config import Config
from decentral.errors import UserError
from decentral.records import Record
from decentral.signature import bind, choose

LOGGERS = {  # the module that holds it, and its class
    "tensorboard": ("decentral.loggers.tensorboard", "TensorBoard"),
    "wandb": ("decentral.loggers.wandb", "WeightsAndBiases"),
    "mlflow": ("decentral.loggers.mlflow", "MLflow"),
    "ray": ("decentral.loggers.ray", "RayMetrics"),
}
CLOSE_S = 60.0  # for a logger to send what it still holds at the end


class Logger(Protocol):
    """Made from (config, run directory) and its own options, which checks them and starts nothing.

    Whatever it raises later ends the logger, not the run.
    """

    def start(self, step: int) -> str:
        """Open for the records after `step`, the config as hyperparameters; says where to look."""
        ...

    def log(self, record: Record) -> None:
        """One record, its numbers against its step."""
        ...

    def close(self, status: str) -> None:
        """No more records will come: the run is done, stopped or failed."""
        ...


def build(config: Config, directory: Path | None) -> dict[str, Logger]:
    """The loggers of a run by name, checked and not yet started.

    Raises UserError, naming the key, for an unknown one, a wrong option or a missing package.
    """
    loggers: dict[str, Logger] = {}
    for position, chosen in enumerate(config.loggers):
        name, key = chosen.name, f"loggers.{position}"
        module, attribute = choose(LOGGERS, name, f"{key}.name", "logger")
        if name in loggers:
            raise UserError(f"{name} is there twice; take one of them away", key)
        if directory is None:
            raise UserError(
                f"{name} goes with a run directory, and this run has none; name one with out=",
                "loggers",
            )
        try:
            kind = getattr(importlib.import_module(module), attribute)
            given = ("config", "directory")
            options = bind(kind, chosen.options, key, given=given, name=name, beside=("name",))
            loggers[name] = kind(config, directory, **options)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{name} needs the package {error.name}, which is not installed here;"
                f" pip install 'decentral[{name}]'",
                key,
            ) from None
    return loggers


class Loggers:
    """The loggers of a run; `say` is told where to look, and of each that fails."""

    def __init__(self, loggers: Mapping[str, Logger], say: Callable[[str], None]):
        self._loggers, self._say = loggers, say
        self._threads: list[_Thread] = []

    def start(self, step: int) -> None:
        """Start all. Raises UserError if one cannot start: at this point the run has cost nothing.

        Whatever happens, `close` must come after.
        """
        for name, logger in self._loggers.items():
            try:
                where = logger.start(step)
            except Exception as error:
                raise UserError(
                    f"{name} cannot start: {_told(error)}; mend it, or take {name} away", "loggers"
                ) from error
            self._say(f"{name}: {where}")
            self._threads.append(_Thread(name, logger, self._say))

    def log(self, record: Record) -> None:
        for thread in self._threads:
            thread.put(record)

    def close(self, status: str) -> None:
        """Wait, within bounds, until all is logged. May be called twice."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.put(status)
        for thread in threads:
            thread.join(CLOSE_S)
            if thread.is_alive():
                self._say(f"{thread.name} has not ended after {CLOSE_S:g} s and is left alone")


class _Thread(threading.Thread):
    """Logs records, one after the other, until a status comes in the place of one."""

    def __init__(self, name: str, logger: Logger, say: Callable[[str], None]):
        super().__init__(name=name, daemon=True)
        self._logger, self._say = logger, say
        self._items: queue.SimpleQueue[Record | str] = queue.SimpleQueue()
        self.start()

    def put(self, item: Record | str) -> None:
        if self.is_alive():  # a logger that failed is not there any more
            self._items.put(item)

    def run(self) -> None:
        try:
            while not isinstance(item := self._items.get(), str):
                self._logger.log(item)
            self._logger.close(item)
        except Exception as error:
            self._say(f"{self.name} failed, and the run goes on without it: {_told(error)}")


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record but its step; a period of null is no number."""
    return {key: value for key, value in record.items() if key != "step" and value is not None}


def hyperparameters(config: Config) -> dict[str, bool | int | float | str]:
    """The resolved config under dotted keys; the loggers are no part of what is trained."""
    flat: dict[str, bool | int | float | str] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for inner, item in value.items():
                add(f"{key}.{inner}" if key else inner, item)
        else:
            flat[key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)

    add("", config.model_dump(exclude_none=True, exclude={"loggers"}))
    return flat


def kept(path: Path, make: Callable[[], str]) -> str:
    """The text in a file, made where there is none: what a resumed run finds again."""
    if not path.exists():
        path.write_text(make() + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _told(error: Exception) -> str:
    """The first line: some packages append advice, or a whole traceback."""
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {first}"
