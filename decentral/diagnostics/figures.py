"""What a run computes of its averaged model, every so many steps. Both engines call it.

All draws are functions of (seed, step), and the state of torch's generators is put back, so a run
is the same with and without. The model is a copy of its own, in float32 at least.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from decentral.comm import accumulation_dtype
from decentral.config import DiagnosticsConfig
from decentral.diagnostics.curvature import hutchinson, top_eigenvalue
from decentral.diagnostics.norms import gradient_norms
from decentral.diagnostics.objective import Objective, fixed_sample, split
from decentral.draws import hash64, normal, signs
from decentral.experiment import Experiment
from decentral.gradients import FlatModel
from decentral.tasks import Sampler

_BATCHES = int.from_bytes(b"norms", "little")
_START = int.from_bytes(b"lanczos", "little")
_SIGNS = int.from_bytes(b"trace", "little")


class Diagnostics:
    """The figures of averaged models that config.diagnostics asks for."""

    def __init__(self, experiment: Experiment, device: str):
        config = experiment.config
        assert config.diagnostics is not None, "asked for"
        self._config: DiagnosticsConfig = config.diagnostics
        self._task = experiment.task
        self._seed = config.seed
        dtype = accumulation_dtype(experiment.dtype)
        self._model = FlatModel(copy.deepcopy(experiment.task.model), dtype, device)
        self._model.module.eval()
        # A batch of as many samples as a step takes, in the run's own way of drawing them.
        batch = config.task.batch_size * config.gradient.accumulate
        self._sampler = Sampler(
            experiment.shards,
            batch,
            int(hash64(_BATCHES, config.seed)),
            config.task.sampling,
            range(config.workers),
        )
        # So far apart, two batches have no epoch in common, and are independent.
        self._stride = max(len(shard) for shard in experiment.shards) // batch + 2
        self._sample = fixed_sample(experiment.shards, self._config.samples_per_worker, config.seed)

    def of(self, step: int, x: Tensor, buffers: Tensor) -> dict[str, float]:
        """The figures of the model x [D] with buffers [B], `step` steps finished."""
        device, config, figures = self._model.device, self._config, {}
        x, buffers = x.to(self._model.dtype), buffers.to(self._model.dtype)
        with torch.random.fork_rng([torch.cuda.current_device()] if device != "cpu" else []):
            if config.gradient_norms is not None:
                norms = gradient_norms(
                    self._gradients(step, x, buffers, config.gradient_norms.batches)
                )
                figures |= {f"gradient_square_{name}": v for name, v in norms._asdict().items()}
            objective = Objective(self._model, self._task, buffers, self._sample)

            def product(v: Tensor) -> Tensor:
                return objective.hessian_product(x, v)

            if config.sharpness is not None:
                start = normal(hash64(_START, self._seed, step), len(x), x.dtype).to(device)
                figures["sharpness"] = top_eigenvalue(product, start, config.sharpness.tolerance)
            if config.trace is not None:
                vectors = (
                    signs(hash64(_SIGNS, self._seed, step, number), len(x), x.dtype).to(device)
                    for number in range(config.trace.vectors)
                )
                trace, error = hutchinson(product, vectors)
                figures |= {"hessian_trace": trace, "hessian_trace_error": error}
        return figures

    def _gradients(self, step: int, x: Tensor, buffers: Tensor, m: int) -> Iterator[Tensor]:
        """m stochastic gradients [D] at x: each the mean over the workers' own, on a batch each."""
        for number in range(step * m, (step + 1) * m):
            samples = self._sampler.indices(number * self._stride).flatten()
            yield Objective(self._model, self._task, buffers, split(samples)).gradient(x)


def diagnostics_of(experiment: Experiment, device: str) -> Diagnostics | None:
    """What computes the figures of the averaged model, if the config asks for any."""
    chosen = experiment.config.diagnostics
    return Diagnostics(experiment, device) if chosen is not None and chosen.of_the_model else None
