"""`decentral.run` from Python: what goes in, what comes out, and what it leaves untouched."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from torch import nn

import decentral
from decentral import topology as topologies
from decentral.progress import Watcher
from decentral.tasks import digits

ROOT = Path(__file__).parents[1]


def same_model(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_metrics(one, other):
    frames = [result.metrics.drop(columns="time_s") for result in (one, other)]
    return frames[0].equals(frames[1])


def python(code):
    """What a fresh interpreter prints."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return process.stdout.strip()


def test_a_mapping_a_path_and_a_string_are_the_same_config(quick, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(quick))
    results = [decentral.run(source, steps=6) for source in (quick, path, str(path))]
    assert all(same_metrics(results[0], other) for other in results[1:])
    assert all(same_model(results[0], other) for other in results[1:])


def test_overrides_reach_the_run(quick):
    overrides: dict[str, Any] = {"algorithm.period": 2, "record.every": 2}
    result = decentral.run(quick, steps=6, **overrides)
    assert result.metrics.step.tolist() == [2, 4, 6]
    assert result.metrics.period.tolist() == [2, 2, 2]
    assert result.config.steps == 6
    assert result.summary["final"]["step"] == 6


def test_metrics_are_a_table_of_the_records(quick):
    result = decentral.run(quick)
    assert isinstance(result.metrics, pandas.DataFrame)
    assert result.metrics.step.tolist() == list(range(3, 25, 3))
    assert result.metrics.eval_loss.notna().tolist() == [
        step in (12, 24) for step in range(3, 25, 3)
    ]
    assert result.metrics.loss.iloc[-1] < result.metrics.loss.iloc[0]


def test_the_model_is_the_average_and_ready_to_use(quick):
    """It gives the accuracy and the loss that the last record holds, on the same test set."""
    result = decentral.run(quick)
    test = digits(workers=4, seed=0).test
    assert isinstance(test, torch.utils.data.TensorDataset)
    x, y = test.tensors
    result.model.eval()
    with torch.no_grad():
        output = result.model(x.double())
    final = result.summary["final"]
    assert nn.functional.cross_entropy(output, y).item() == pytest.approx(final["eval_loss"])
    accuracy = (output.argmax(1) == y).double().mean().item()
    assert accuracy == pytest.approx(final["eval_accuracy"], abs=1e-6)
    assert 0.3 < accuracy < 1


def test_without_out_nothing_is_written(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick["checkpoint"] = {"every": 3}
    result = decentral.run(quick, steps=6)
    assert result.directory is None
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_input_raises_before_anything_starts(quick, tmp_path):
    watcher = Diary()
    with pytest.raises(decentral.UserError) as refused:
        decentral.run(quick, out=tmp_path / "run", watcher=watcher, **{"algorithm.period": 0})
    assert refused.value.key == "algorithm.period"
    assert isinstance(refused.value, ValueError)
    assert watcher.entries == []
    assert list(tmp_path.iterdir()) == []


class Diary(Watcher):
    """Writes down all that a watcher is told."""

    def __init__(self, stop_at=None):
        self.entries = []
        self._stop_at, self._step = stop_at, 0

    def say(self, line):
        self.entries.append(("say", line))

    def begin(self, experiment, step):
        self.entries.append(("begin", experiment.config.name, step))

    def advance(self, step, record):
        self._step = step
        self.entries.append(("advance", step, record and record["step"]))

    def end(self):
        self.entries.append(("end",))

    def wants_stop(self):
        return self._step == self._stop_at


def test_a_watcher_hears_begin_then_every_segment_then_end(quick):
    diary = Diary()
    decentral.run(quick, steps=10, watcher=diary)
    # Segments end at an average (period 4), a record (every 3) and the last step.
    segments = [(3, 3), (4, None), (6, 6), (8, None), (9, 9), (10, 10)]
    expected = [("begin", "quick", 0), *[("advance", *s) for s in segments], ("end",)]
    assert diary.entries == expected


def test_a_watcher_may_stop_the_run_between_segments(quick, tmp_path):
    diary = Diary(stop_at=4)
    result = decentral.run(quick, out=tmp_path, watcher=diary)
    assert result.summary["status"] == "stopped"
    assert result.metrics.step.tolist() == [3]
    told = f"stopped at step 4; checkpoint in {tmp_path / 'checkpoints/step-00000004'}"
    assert diary.entries[-2:] == [("say", told), ("end",)]

    again = Diary()
    decentral.resume(tmp_path, watcher=again)
    assert again.entries[0] == ("begin", "quick", 4)


def test_a_stop_at_the_last_step_is_no_stop(quick):
    result = decentral.run(quick, steps=8, watcher=Diary(stop_at=8))
    assert result.summary["status"] == "done"


def test_a_watcher_hears_the_end_of_a_run_that_fails(quick):
    class Failing(Diary):
        def advance(self, step, record):
            raise RuntimeError("no more")

    diary = Failing()
    with pytest.raises(RuntimeError, match="no more"):
        decentral.run(quick, watcher=diary)
    assert diary.entries == [("begin", "quick", 0), ("end",)]


def test_a_topology_that_only_the_clock_uses_is_said(quick):
    diary = Diary()
    decentral.run(quick, steps=4, watcher=diary, **{"algorithm.name": "local_sgd"})
    assert diary.entries[0] == (
        "say", "local_sgd averages over no topology: ring serves the clock alone"
    )  # fmt: skip


def test_the_same_seed_is_the_same_run_and_another_another(quick):
    one, same, other = (decentral.run(quick, steps=6, seed=seed) for seed in (5, 5, 6))
    assert same_metrics(one, same)
    assert same_model(one, same)
    assert not same_metrics(one, other)


def test_the_seed_alone_decides_what_a_model_draws(quick, monkeypatch):
    """Dropout, whatever the caller has drawn from torch's global generator before."""

    def make(workers, seed):
        task = digits(workers, seed)
        task.model = nn.Sequential(nn.Dropout(0.5), task.model)
        return task

    monkeypatch.setattr("decentral.experiment.TASKS", {"mine": make})
    quick["task"] = {"name": "mine", "batch_size": 4}
    one = decentral.run(quick, steps=3)
    torch.rand(5)
    assert same_model(one, decentral.run(quick, steps=3))
    assert not same_model(one, decentral.run(quick, steps=3, seed=1))


@pytest.mark.parametrize("out", [False, True])
def test_a_run_leaves_torchs_generator_and_settings_as_they_were(quick, tmp_path, out):
    torch.manual_seed(17)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    decentral.run(quick, steps=6, out=tmp_path / "run" if out else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()


def test_runs_do_not_share_a_model(quick):
    """A task may hand out the same module twice: every run trains a copy."""
    one = decentral.run(quick, steps=3)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    decentral.run(quick, steps=6)
    assert all(torch.equal(one.model.state_dict()[name], before[name]) for name in before)


def test_a_tasks_own_model_is_not_trained(quick, monkeypatch):
    task = digits(workers=4, seed=0)
    before = [parameter.clone() for parameter in task.model.parameters()]
    monkeypatch.setattr("decentral.experiment.TASKS", {"mine": lambda workers, seed: task})
    quick["task"] = {"name": "mine", "batch_size": 4}
    decentral.run(quick, steps=3)
    for parameter, value in zip(task.model.parameters(), before, strict=True):
        assert parameter.dtype == value.dtype == torch.float32
        assert torch.equal(parameter, value)


def test_one_line_of_a_topology_is_public():
    assert topologies.build(4, "ring").n == 4


def test_public_names_are_there():
    for name in decentral.__all__:
        assert getattr(decentral, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        decentral.nothing  # noqa: B018


HEAVY = "[m for m in ('torch', 'ray', 'matplotlib', 'sklearn', 'pandas') if m in sys.modules]"


def test_importing_decentral_imports_nothing_heavy():
    assert python(f"import sys, decentral; print({HEAVY})") == "[]"


def test_help_imports_nothing_heavy():
    code = "import sys; from decentral.cli import app; app(['--help'], standalone_mode=False);"
    assert python(f"{code} print({HEAVY})").splitlines()[-1] == "[]"


def test_a_mistake_in_a_config_is_told_before_anything_heavy_is_imported():
    code = f"""
import sys
from decentral.cli import app
from decentral.errors import UserError
try:
    app(["run", "no such.yaml"], standalone_mode=False)
except UserError:
    print("told", {HEAVY})
"""
    assert python(code).splitlines()[-1] == "told []"


@pytest.mark.slow
def test_a_run_imports_no_ray_no_plotting_no_scikit_learn_and_no_compiler():
    """Seconds of each run's start, and in each worker's process. torch._dynamo is the compiler."""
    code = """
import sys, decentral
decentral.run({
    "workers": 2, "steps": 2, "engine": "sim", "task": {"name": "digits"},
    "optimizer": {"name": "adam", "lr": 0.1}, "algorithm": {"name": "gossip_sgd"},
    "lr_schedule": {"name": "cosine", "T_max": 2}, "topology": {"name": "ring"},
})
names = ('ray', 'matplotlib', 'sklearn', 'torch._dynamo')
print([m for m in names if m in sys.modules])
"""
    assert python(code) == "[]"
