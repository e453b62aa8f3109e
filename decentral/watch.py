"""`decentral watch`: follow runs by what they write, from any machine that sees their directories.

Nothing is asked of a run itself, so it makes no difference to one whether it is watched.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from decentral.config import load
from decentral.errors import UserError
from decentral.progress import Line, Lines
from decentral.records import parse

POLL_S = 0.5


def watch(
    directories: Sequence[Path],
    console: Console,
    wait: Callable[[], None] = lambda: time.sleep(POLL_S),
) -> None:
    """Show the runs' progress until all have ended, and how each has; `wait` between two looks.

    Raises UserError if a directory holds no run, or its records cannot be read.
    """
    lines = Lines(console)
    try:
        runs = [_Run(directory) for directory in directories]
        for run in runs:
            run.show(lines, str(run.directory) if len(runs) > 1 else "")
        while runs := [run for run in runs if not run.look()]:
            wait()
    finally:
        lines.end()


class _Run:
    """One run, and how far its records have been shown."""

    def __init__(self, directory: Path):
        config = directory / "config.yaml"
        if not os.path.exists(config):
            raise UserError(
                f"{directory} holds no run: it has no config.yaml. A run makes it when its workers"
                " have started",
                "DIR",
            )
        self.directory = directory
        self._steps = load(config).steps
        self._records = _Records(directory / "metrics.jsonl")

    def show(self, lines: Lines, name: str) -> None:
        """Begin with the last record that is there already."""
        records = self._records.new()
        step = records[-1]["step"] if records else 0
        self._line: Line = lines.add(self._steps, step, name)
        if records:
            self._line.advance(step, records[-1])

    def look(self) -> bool:
        """Show what is new; whether the run has ended."""
        end = self._end()  # first: what is written before it is then there to be read
        for record in self._records.new():
            self._line.advance(record["step"], record)
        if end is not None:
            self._line.say(end)
        return end is not None

    def _end(self) -> str | None:
        """How the run has ended, in a line; None if it has not."""
        summary = self.directory / "summary.json"
        try:
            return _told(json.loads(summary.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"ended, but {summary} cannot be read: {error.strerror}"
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            return f"ended, but {summary} is damaged"


class _Records:
    """The records of a metrics.jsonl that grows, and that a run which goes on writes anew.

    Opened for each look: on a shared file system an open file may never show what others write.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file, self._read = 0, 0  # which file, and how many bytes of it, in whole lines

    def new(self) -> list[dict[str, Any]]:
        """The records since the last call, or all of a file that has taken the place."""
        try:
            with open(self._path, "rb") as file:
                there = os.fstat(file.fileno()).st_ino
                if there != self._file:
                    self._file, self._read = there, 0
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror}", "DIR") from None
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return parse(whole)


def _told(summary: Any) -> str:
    final = summary["final"]
    line = f"{summary['status']} at step {final['step'] if final else 0}"
    line += f", after {summary['seconds']:.1f} s"
    return line + (f": {summary['error']}" if "error" in summary else "")
