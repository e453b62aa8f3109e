"""TensorBoard: event files in the run directory's folder `tensorboard`."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from decentral.config import Config, dump
from decentral.loggers import hyperparameters, scalars
from decentral.records import Record

FLUSH_S = 5
COMPARED = ("loss", "consensus_distance", "eval_loss", "eval_accuracy")  # in the HParams tab


class TensorBoard:
    """A Logger. A run that goes on hides what it had logged after its checkpoint."""

    def __init__(self, config: Config, directory: Path):
        self._config, self._folder = config, directory / "tensorboard"

    def start(self, step: int) -> str:
        self._writer = SummaryWriter(
            str(self._folder), purge_step=step + 1 if step else None, flush_secs=FLUSH_S
        )
        # add_hparams would write them, and final figures, as another run in a folder of its own.
        for summary in hparams(hyperparameters(self._config), dict.fromkeys(COMPARED, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        self._writer.add_text("config", f"```yaml\n{dump(self._config)}```")
        return f"event files in {self._folder}"

    def log(self, record: Record) -> None:
        for key, value in scalars(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()
