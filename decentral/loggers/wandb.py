"""Weights & Biases: a run there, or its files in the run directory to `wandb sync` later."""

# Where wandb is not installed, pyright takes this very file for it.
# pyright: reportAttributeAccessIssue=false

import secrets
from pathlib import Path
from typing import Literal

import wandb

from decentral.config import Config
from decentral.loggers import kept, scalars
from decentral.records import Record


class WeightsAndBiases:
    """A Logger. `mode: null` is online, or what the environment variable WANDB_MODE says.

    The run's id is kept in the run directory, so a run that goes on is the same run there.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        project: str = "decentral",
        entity: str | None = None,
        group: str | None = None,
        mode: Literal["online", "offline"] | None = None,
    ):
        self._config, self._directory = config, directory
        self._project, self._entity, self._group = project, entity, group
        self._mode: Literal["online", "offline"] | None = mode

    def start(self, step: int) -> str:
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            group=self._group,
            name=self._config.name,
            id=kept(self._directory / "wandb.id", lambda: secrets.token_hex(4)),
            resume="allow",
            mode=self._mode,
            dir=str(self._directory),
            config=self._config.model_dump(exclude_none=True, exclude={"loggers"}),
            allow_val_change=True,
            reinit="create_new",  # another run of this process may have one open
            settings=wandb.Settings(console="off", silent=True),
        )
        # W&B's own step cannot go back to a checkpoint: records would be dropped.
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            return f"offline; wandb sync {self._run.dir.removesuffix('/files')}"
        return str(self._run.url)

    def log(self, record: Record) -> None:
        self._run.log({"step": record["step"], **scalars(record)})

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)
