"""Each benchmark runs, small, and writes the fields that its readers count on. Nothing is timed."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import typer
from typer.testing import CliRunner

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "churn": ["--steps", "60"],
    "driver_kills": ["--engine", "sim", "--kills", "2", "--steps", "150"],
    "gossip_pga_digits": ["--steps", "24", "--seeds", "2", "--workers", "4"],
    "gpu_rate": ["--workers", "2", "--models", "mlp", "--models", "gpt", "--rounds", "1"],
    "heterogeneity": ["--steps", "3", "--seeds", "1", "--workers", "4"],
    "overhead": ["--hidden", "8", "--rounds", "3"],
    "peers": ["--workers", "2", "--hidden", "8", "--rounds", "1"],
    "papers": ["--only", "deep_digits", "--steps", "6", "--seeds", "1"],
    "planner": [
        "--cluster",
        "house5",
        "--target",
        "accuracy=0.4",
        "--steps",
        "12",
        "--seeds",
        "2",
        "--lr",
        "0.3",
        "--jobs",
        "1",
    ],
    "memory": ["--workers", "2", "--hidden", "8", "--steps", "2"],
    "mixing": ["--workers", "9", "--parameters", "20", "--pairs", "1"],
    "scale": [
        *("--workers", "4", "--rounds", "1"),
        *("--recorded", "10", "--digits", "4", "--logistic", "4"),
    ],
    "simulator_rate": ["--workers", "3", "--repeats", "1", "--seconds", "0"],
    "soak": ["--kills", "1", "--steps", "600", "--seed", "206"],  # killed after 2 s
    "startup": [
        *("--workers", "2", "--starts", "1", "--segments", "1", "--steps", "30"),
        *("--lengths", "1", "--lengths", "5"),
    ],
    "wire_formats": ["--steps", "6", "--seeds", "2", "--workers", "4"],
    "transients": [
        *("--trials", "3", "--steps", "40", "--stage", "20", "--samples", "20", "--law", "own"),
        *("--workers", "4", "--workers", "6"),
    ],
}
NEEDS_HOSTS = {
    "clock_against_reality": ["--rate", "1000", "--records", "2", "--hidden", "8"],
    "exchange": ["--rate", "1000", "--megabytes", "0.01", "--rounds", "1"],
    "overlap": ["--rate", "1000", "--workers", "2", "--hidden", "8", "--rounds", "1"],
}
if hosts.why_not() is None:
    SMALL |= NEEDS_HOSTS


AS_A_USER = ("soak",)  # which looks at the processes that descend from it


class Outputs:
    """What each script wrote and printed; it runs when it is first asked for, warnings as errors.

    In this process, for imports take longer than most scripts; AS_A_USER and driver_kills on Ray as
    users run them.
    """

    def __init__(self, folder):
        self._folder = folder
        self._made = {}

    def __getitem__(self, name):
        if name not in self._made:
            out = self._folder / f"{name}.json"
            run = run_as_a_user if name in AS_A_USER else run_here
            printed = run(name, [*SMALL[name], "--out", str(out)])
            self._made[name] = json.loads(out.read_text(encoding="utf-8")), printed
        return self._made[name]


def run_here(name, options):
    """What a script prints, which may change how this process takes signals."""
    app = typer.Typer()
    app.command()(importlib.import_module(name).main)
    before = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(app, options, catch_exceptions=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.exit_code == 0, done.output
    return done.stdout


def run_as_a_user(name, options):
    script = str(BENCHMARKS / f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", script, *options],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield Outputs(tmp_path_factory.mktemp("benchmarks"))


def test_every_benchmark_is_run_here_and_has_a_committed_result():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {
        "digits",
        "machine",
        "ranks",
        "segments",
        "trials",
    }
    assert scripts == set(SMALL | NEEDS_HOSTS)
    assert {path.stem for path in (BENCHMARKS / "results").glob("*.json")} == scripts
    for name in scripts:
        text = (BENCHMARKS / f"{name}.py").read_text(encoding="utf-8")
        assert text.endswith('\n\nif __name__ == "__main__":\n    typer.run(main)\n'), name


@pytest.mark.parametrize("name", SMALL)
def test_a_result_has_the_fields_of_the_committed_one(name, outputs):
    committed = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert fields(outputs[name][0]) == fields(committed)


@pytest.mark.parametrize("name", SMALL)
def test_a_result_says_where_it_was_taken(name, outputs):
    taken = outputs[name][0]["machine"]
    assert taken["cpu"]
    assert taken["cores"] >= 1
    assert taken["threads"] >= 1
    assert {"python", "torch", "decentral"} <= set(taken["versions"])


def test_a_run_whose_driver_was_killed_is_the_one_that_nobody_killed(outputs):
    (row,) = outputs["driver_kills"][0]["engines"]
    assert row["kills"] == 2
    assert row["largest_difference"] == 0
    assert row["left_after_15_s"] == []


def test_a_ray_run_whose_driver_was_killed_goes_on_and_leaves_no_worker(tmp_path):
    out = tmp_path / "kills.json"
    options = ["--engine", "ray", "--kills", "1", "--steps", "150", "--out", str(out)]
    run_as_a_user("driver_kills", options)
    (row,) = json.loads(out.read_text())["engines"]
    assert row["kills"] == row["resumed"] == 1
    assert row["largest_difference"] <= 1e-6
    assert row["left_after_15_s"] == []


def test_the_verdict_of_gossip_pga_digits_follows_its_figures(outputs):
    result, text = outputs["gossip_pga_digits"]
    versus, methods = result["gossip_pga_minus_gossip_sgd"], result["methods"]
    below = versus["steps_with_smaller_distance"] == versus["steps_compared"]
    mean = methods["gossip_pga"]["accuracy"]["mean"] - methods["gossip_sgd"]["accuracy"]["mean"]
    assert mean == pytest.approx(versus["accuracy"]["mean"], abs=2e-4)  # four digits are written
    assert versus["distance_below_at_every_step"] == below
    assert versus["accuracy_at_least"] == (versus["accuracy"]["mean"] >= 0)
    said = "holds" if below and versus["accuracy_at_least"] else "does not hold"
    assert f"The claim {said} for these figures" in " ".join(text.split())


def test_the_parts_of_a_start_are_all_of_it_and_a_segment_costs_what_its_line_says(outputs):
    result, _ = outputs["startup"]
    start, rows = result["start"], result["steering"]
    assert sum(start["parts_s"].values()) == pytest.approx(start["seconds"], rel=1e-2)
    assert all(seconds > 0 for seconds in start["processor_s"].values())
    assert ("nursery" in start["processor_s"]) == (sys.platform == "linux")
    (short, short_ms), (long, long_ms) = ((row["steps"], row["segment_ms"]) for row in rows)
    assert (short, long) == (1, 5)
    at_zero = short_ms - (long_ms - short_ms) / 4
    assert result["segment_ms"] == pytest.approx(at_zero, rel=0.01, abs=0.01)
    waiting = result["waiting"]  # 22 steps after the first segment, which ends at 8, 10, 16, ...
    assert [waiting[name]["calls"] for name in ("segment", "ahead", "all")] == [5, 1, 1]
    assert all(row["step_ms"] > 20 for row in waiting.values())


def test_simulator_rate_measures_the_sizes_asked_for(outputs):
    sizes = outputs["simulator_rate"][0]["sizes"]
    models = ["mlp", "cnn", "gpt"]
    assert [(row["model"], row["workers"]) for row in sizes] == [(model, 3) for model in models]
    assert {row["parameters"] for row in sizes if row["model"] == "mlp"} == {19_210}
    for row in sizes:
        assert 1 < row["at_once"] <= row["workers"]
        assert min(row[key] for key in ("step_ms", "ratio", "one_by_one_ratio")) > 0


def test_a_soaked_run_ends_whole_without_the_worker_that_was_killed(outputs):
    result, _ = outputs["soak"]
    assert result["kills"] == 1
    assert result["runs_that_ended"] == result["runs_whole"] == result["runs"]
    assert result["processes_left"] == 0
    assert result["holds"]


def fields(value):
    """The names in a result, nested: values left out, the rows of a list taken together."""
    if isinstance(value, dict):
        return {key: fields(item) for key, item in value.items()}
    if isinstance(value, list):
        return [fields(value[0])] if value else []
    return None
