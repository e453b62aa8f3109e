"""MLflow: a run on a tracking server, or in a store of one's own."""

# Where mlflow is not installed, pyright takes this very file for it.
# pyright: reportMissingImports=false, reportCallIssue=false

import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from decentral.config import Config
from decentral.loggers import hyperparameters, kept, scalars
from decentral.records import Record

STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """A Logger. `tracking_uri: null` is what MLFLOW_TRACKING_URI says, or MLflow's own default.

    The run's id is kept in the run directory, so a run that goes on is the same run there. A
    parameter cannot change in MLflow: where a run that goes on has another, it is a tag.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        tracking_uri: str | None = None,
        experiment: str = "decentral",
    ):
        self._config, self._directory = config, directory
        self._tracking_uri, self._experiment = tracking_uri, experiment

    def start(self, step: int) -> str:
        self._client = MlflowClient(tracking_uri=self._tracking_uri)
        self._id = kept(self._directory / "mlflow.id", self._new_run)
        self._client.update_run(self._id, status="RUNNING")
        before = self._client.get_run(self._id).data.params
        now = {key: str(value) for key, value in hyperparameters(self._config).items()}
        self._client.log_batch(
            self._id,
            params=[Param(key, now[key]) for key in now if key not in before],
            tags=[RunTag(key, now[key]) for key in now if before.get(key, now[key]) != now[key]],
        )
        return f"run {self._id} of experiment {self._experiment}, {self._client.tracking_uri}"

    def log(self, record: Record) -> None:
        step, now_ms = int(record["step"] or 0), int(time.time() * 1000)
        metrics = [Metric(key, value, now_ms, step) for key, value in scalars(record).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, STATUS[status])

    def _new_run(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        number = (
            self._client.create_experiment(self._experiment)
            if experiment is None
            else experiment.experiment_id
        )
        return self._client.create_run(number, run_name=self._config.name).info.run_id
