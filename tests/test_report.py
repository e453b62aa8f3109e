"""Reports: statistics by hand, labels, curves, tables; and what a run directory may hold."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest

from decentral.cli import main
from decentral.config import dump, load
from decentral.errors import UserError
from decentral.report import curves, groups, networks, runs, tables, write
from decentral.report.columns import written, written_with_spread
from decentral.report.comparison import _needed_paired as needed_paired
from decentral.report.comparison import _needed_welch as needed_welch
from decentral.report.comparison import compare, holm

COLUMNS = ("loss", "consensus_distance")
HOSTILE = "</script><img src=x onerror=alert(1)>&'\"|_$\\"


def record(step, loss, **others):
    return {
        "step": step,
        "loss": loss,
        "consensus_distance": 0.1,
        "period": None,
        "lr": 0.1,
        "bytes_sent": 1000 * step,
        "time_s": 0.5 * step,
        "sim_time_s": 0.01 * step,
        "workers": 4,
    } | others


@pytest.fixture
def fake(quick, tmp_path):
    """Writes a run directory without a run: fake(FOLDER, rows, status, **overrides)."""

    def made(folder, rows, status="done", **overrides):
        folder = tmp_path / "runs" / folder
        folder.mkdir(parents=True)
        overrides = {key.replace("__", "."): value for key, value in overrides.items()}
        config = load(quick, {"steps": rows[-1]["step"] if rows else 20} | overrides)
        (folder / "config.yaml").write_text(dump(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if status is not None:
            (folder / "summary.json").write_text(json.dumps({"status": status}))
        return folder

    return made


def grouped(tmp_path):
    found = [runs.read(path) for path in runs.find([tmp_path / "runs"])]
    return groups.group(found, lambda line: None)


# Differences and chance.


def test_paired_values_are_tested_on_their_differences():
    """t = 2 / (1 / sqrt 3) at 2 degrees of freedom, where P(|T| > t) = 1 - t / sqrt(t^2 + 2)."""
    found = compare({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 2: 30.0, 1: 20.0})
    assert found is not None
    t, half = 2 * math.sqrt(3), 4.302652729911275 / math.sqrt(3)  # that quantile is in every table
    assert found.paired
    assert found.difference == pytest.approx(2)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


def test_other_seeds_give_welchs_test():
    """Equal variances 1 and sizes 3: 4 degrees of freedom, t^2 = 6, whose distribution is
    F(t) = 1/2 + 3/8 u (1 - t^2 / (12 (1 + t^2/4))), u = t / sqrt(1 + t^2/4)."""
    found = compare({0: 1.0, 1: 2.0, 2: 3.0}, {0: 3.0, 1: 4.0, 5: 5.0})
    assert found is not None
    u = math.sqrt(6) / math.sqrt(1 + 6 / 4)
    below = 0.5 + 3 / 8 * u * (1 - 6 / (12 * 2.5))
    half = 2.7764451051977987 * math.sqrt(2 / 3)
    assert not found.paired
    assert found.p == pytest.approx(2 * (1 - below))
    assert (found.low, found.high) == pytest.approx((-2 - half, -2 + half))


def test_there_is_no_test_without_spread_or_values():
    assert compare({0: 1.0}, {0: 2.0}) is None
    assert compare({0: 1.0, 1: math.inf}, {0: 2.0, 1: 3.0}) is None
    assert compare({0: 1.1, 1: 2.1}, {0: 1.0, 1: 2.0}) is None  # by 0.1 but for round-off
    assert compare({0: 1.0, 1: 1.0}, {2: 2.0, 3: 2.0}) is None


def test_the_seeds_needed_are_those_of_the_tables():
    """Cohen's d = 0.5, power 0.8, two-sided 5%: 34 pairs, or 64 in each of two groups (G*Power)."""
    assert needed_paired(0.5, 1.0) == 34
    assert needed_welch(-0.5, 1.0, 1.0) == 64
    assert needed_paired(0.2, 1.0) == 199
    assert needed_paired(1e6, 1.0) == 2
    assert needed_welch(1e-9, 1.0, 3.0) is None


def test_holm_corrects_for_many_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1, 1])
    assert holm([]) == []


def test_numbers_are_written_with_the_digits_that_they_have():
    assert written_with_spread([0.94, 0.95, 0.96]) == "0.950 ± 0.010"
    assert written_with_spread([1.5e6, 2.5e6], "bytes") == "2.00 ± 0.71 MB"
    assert written_with_spread([7.0], "seconds") == "7 s"
    assert written_with_spread([1e-9, 2e-9]) == "1.500e-09 ± 7.1e-10"
    assert written(5400, "seconds") == "1.5 h"


# Groups and their labels.


def test_a_label_is_what_differs():
    pga = {"algorithm.name": "gossip_pga", "algorithm.period": 8, "topology.name": "ring"}
    local = {"algorithm.name": "local_sgd", "algorithm.period": 4}
    sgd = {"optimizer.lr": 0.1, "steps": 100}
    assert groups.name([pga | sgd, local | sgd]) == ["gossip_pga H=8, ring", "local_sgd H=4"]
    assert groups.name([pga | sgd, pga | sgd | {"optimizer.lr": 0.05}]) == ["lr 0.1", "lr 0.05"]
    assert groups.name([pga | sgd]) == ["gossip_pga H=8, ring"]
    assert groups.name([sgd, sgd | {"lr_schedule.name": "step"}]) == [
        "no lr_schedule",
        "lr_schedule step",
    ]
    # Two keys that end alike are told apart by their whole names.
    one, other = {"a.k": 1, "b.k": 2}, {"a.k": 1, "b.c": 2, "b.k": 1}
    assert len(set(groups.name([one, other, {"a.k": 2, "b.k": 1}]))) == 3


def test_runs_are_grouped_whatever_their_seeds_and_names(fake, tmp_path):
    for seed in (2, 0, 1):
        fake(f"a{seed}", [record(9, 1.0)], seed=seed, name=f"other{seed}")
    fake("again", [record(9, 3.0)], seed=1)
    fake("b0", [record(9, 2.0)], optimizer__lr=0.05)
    told = []
    found = groups.group([runs.read(p) for p in runs.find([tmp_path / "runs"])], told.append)
    assert [group.label for group in found] == ["lr 0.05", "lr 0.1"]
    assert [run.config.seed for run in found[1].runs] == [0, 1, 2]
    assert found[1].runs[1].final("loss") == 1.0
    assert len(told) == 1
    assert "again: left out" in told[0]
    assert groups.differing([group.config for group in found]) == ["optimizer.lr"]


def test_the_baseline_is_named_by_a_part_of_its_label(fake, tmp_path):
    for lr in (0.1, 0.15):
        fake(f"lr{lr}", [record(9, 1.0)], optimizer__lr=lr)
    fake("parallel", [record(9, 1.0)], algorithm={"name": "parallel_sgd"})
    found = grouped(tmp_path)
    assert groups.choose_baseline(found, None).label == "parallel_sgd, lr 0.1"
    assert groups.choose_baseline(found, "0.15").label.endswith("lr 0.15")
    with pytest.raises(UserError, match=r"--baseline: 'lr' is a part of several labels; take one"):
        groups.choose_baseline(found, "lr")
    with pytest.raises(UserError, match="'d2' is no label; take one of: gossip_pga"):
        groups.choose_baseline(found, "d2")


# Figures.


def test_a_curve_is_the_mean_over_seeds_at_the_steps_of_all(fake, tmp_path):
    fake("a", [record(5, 4.0), record(10, 2.0), record(20, 1.0)])
    fake("b", [record(5, 2.0, bytes_sent=9000), record(10, None), record(20, 3.0)], seed=1)
    fake("c", [record(5, 90.0)], "stopped", seed=2, steps=20)
    (group,) = grouped(tmp_path)
    assert group.status == "2 of 3 finished, 1 stopped at step 5 of 20"
    found = curves.curve(0, group, "loss")
    assert found is not None
    np.testing.assert_allclose(found.x["step"], [5, 20])
    np.testing.assert_allclose(found.x["bytes"], [7000, 20000])
    np.testing.assert_allclose(found.mean, [3, 2])
    np.testing.assert_allclose([found.low, found.high], [[2, 1], [4, 3]])
    assert curves.curve(0, group, "sharpness") is None


def test_a_group_none_of_whose_runs_has_finished_shows_those_it_has(fake, tmp_path):
    fake("a", [record(5, 4.0)], None, steps=20)
    (group,) = grouped(tmp_path)
    assert group.status == "0 of 1 finished, 1 unfinished at step 5 of 20"
    found = curves.curve(0, group, "loss")
    assert found is not None
    assert found.mean.tolist() == [4.0]


def test_the_best_group_comes_first_and_one_that_diverged_last(fake, tmp_path):
    for lr, accuracy in ((0.1, 0.5), (0.2, 0.9), (0.3, None), (0.4, 0.7)):
        fake(f"lr{lr}", [record(9, 1.0, eval_accuracy=accuracy)], optimizer__lr=lr)
    labels = [group.label for group in tables.ranked(grouped(tmp_path))]
    assert labels == ["lr 0.2", "lr 0.4", "lr 0.1", "lr 0.3"]


def test_any_column_is_drawn_and_what_is_in_force_where_it_changes(fake, tmp_path):
    rows = [record(5, 4.0, sharpness=3.0, period=4), record(10, 0.1, sharpness=2.5, period=8)]
    fake("a", rows)
    charts = {chart.column: chart for chart in curves.charts(grouped(tmp_path))}
    assert list(charts) == ["loss", "consensus_distance", "sharpness", "period"]
    assert charts["loss"].log
    assert not charts["sharpness"].log
    assert charts["period"].steps


def test_wall_clock_time_is_an_axis_of_runs_that_were_no_simulations(fake, tmp_path):
    rows = [record(5, 4.0), record(10, 2.0)]
    fake("sim", rows)
    assert [axis.name for axis in curves.axes(grouped(tmp_path))] == ["step", "bytes", "time"]
    fake("ray", rows, engine="ray")
    made = grouped(tmp_path)
    assert [axis.name for axis in curves.axes(made)] == ["step", "bytes", "time", "wall"]
    (real,) = (group for group in made if group.config["engine"] == "ray")
    found = curves.curve(0, real, "loss")
    assert found is not None
    np.testing.assert_allclose(found.x["wall"], [2.5, 5])  # not 0.05 and 0.1 as simulated


def test_targets_are_reached_or_not(fake, tmp_path):
    fake("a", [record(5, 4.0, eval_accuracy=0.5), record(10, 2.0), record(20, 0.5)])
    fake("b", [record(5, 3.0, eval_accuracy=0.95), record(10, None), record(20, 9.0)], seed=1)
    made = grouped(tmp_path)
    a, b = made[0].runs
    assert tables.first_at(a, "loss", 2.0, "step") == 10
    assert tables.first_at(b, "loss", 2.0, "sim_time_s") == math.inf
    assert tables.first_at(b, "eval_accuracy", 0.9, "bytes_sent") == 5000
    found = tables.finals(tables.figures(made, made[0], {"loss": 3.0, "eval_accuracy": 0.9}))
    shown = dict(zip(found.head, found.rows[0], strict=True))
    assert shown["steps to training loss ≤ 3"] == "7.5 ± 3.5"
    assert shown["steps to test accuracy ≥ 0.9"] == "1 of 2 reach it"


def three_seeds(fake):
    """Gossip SGD against parallel SGD, three seeds each, the differences 1, 2 and 3."""
    for seed, (loss, gain) in enumerate([(10, 1), (20, 2), (30, 3)]):
        fake(f"p{seed}", [record(9, loss)], seed=seed, algorithm={"name": "parallel_sgd"})
        fake(f"g{seed}", [record(9, loss + gain)], seed=seed, algorithm={"name": "gossip_sgd"})


def test_tables_hold_what_the_tests_found(fake, tmp_path):
    three_seeds(fake)
    made = grouped(tmp_path)
    baseline = groups.choose_baseline(made, None)
    figures = tables.figures(tables.ranked(made), baseline, {})
    table = tables.differences(figures, figures.main)
    expected = ["gossip_sgd", "+2", "-0.484 to +4.48", "0.074", "0.074", "paired", "5"]
    assert table.rows == [expected]
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(figures))))
    (row,) = [r for r in rows if r["group"] == "gossip_sgd" and r["figure"] == "loss"]
    assert float(row["p"]) == pytest.approx(0.0741799)
    assert float(row["mean"]) == pytest.approx(22)
    assert row["seeds_needed"] == "5"
    finals = tables.finals(figures)
    assert finals.rows[0][:3] == ["parallel_sgd", "3 seeds", "20 ± 10"]
    assert "| **20 ± 10** |" in tables.markdown([finals])
    assert r"\textbf{20 $\pm$ 10}" in tables.latex([finals])
    assert r"parallel\_sgd & 3 seeds" in tables.latex([finals])


def test_a_run_that_diverged_is_said_to_have(fake, tmp_path):
    fake("a", [record(5, 4.0), record(10, None)])
    fake("b", [record(5, 4.0), record(10, 1.0)], seed=1)
    made = grouped(tmp_path)
    assert tables.finals(tables.figures(made, made[0], {})).rows[0][2] == "1 of 2 finite"


def test_a_topology_has_bandwidths_on_its_links_and_labels_at_its_workers(fake, tmp_path):
    graph = tmp_path / "pair.gml"
    graph.write_text(
        'graph [ node [ id 0 label "A" ] node [ id 1 label "B" ] node [ id 2 label "C" ]'
        " edge [ source 0 target 1 bandwidth_gbps 10 ] edge [ source 1 target 2 ] ]"
    )
    folder = fake("a", [record(9, 1.0)], workers=3, topology={"file": str(graph)})
    counts = np.array([[4, 0], [1, 2], [0, 8]], np.int32)
    np.savez(folder / "split.npz", classes=np.array([3, 7]), label_counts=counts)
    made = grouped(tmp_path)
    (picture,) = networks.pictures(made, print)
    assert [link.label for link in picture.links] == ["10", ""]
    assert [worker.name for worker in picture.workers] == ["0 A", "1 B", "2 C"]
    assert picture.workers[1].told == "worker 1 B; 3 samples: 1 of class 3, 2 of class 7"
    heights = [bar[3] for bar in picture.workers[1].bars]
    assert heights[0] == pytest.approx(heights[1] / 2)
    graph.unlink()
    told = []
    assert networks.pictures(made, told.append) == []
    assert "pair.gml is not there any more" in told[0]


def test_a_link_that_goes_one_way_has_an_arrow_that_ends_outside_the_worker(fake, tmp_path):
    fake("a", [record(9, 1.0)], workers=4, topology={"name": "exponential"})
    (picture,) = networks.pictures(grouped(tmp_path), print)
    # i -> i+1 one way; i -> i+2 is there and back, one line.
    arrows = [link for link in picture.links if link.arrow]
    assert len(arrows) == 4
    assert len(picture.links) == 6
    places = np.array([(worker.x, worker.y) for worker in picture.workers])
    for link in arrows:
        starts = np.hypot(*(places - (link.x1, link.y1)).T)
        ends = np.hypot(*(places - (link.x2, link.y2)).T)
        i, j = int(starts.argmin()), int(ends.argmin())
        assert j == (i + 1) % 4
        assert starts[i] == pytest.approx(0)
        assert ends[j] == pytest.approx(picture.workers[j].radius)


def test_links_have_the_bandwidths_of_the_cluster_where_the_topology_says_none(fake, tmp_path):
    cluster = tmp_path / "cluster.gml"
    nodes = " ".join(f'node [ id {i} label "{i}" ]' for i in range(4))
    cables = " ".join(
        f"edge [ source {i} target {(i + 1) % 4} bandwidth_gbps {i + 1} ]" for i in range(4)
    )
    cluster.write_text(f"graph [ {nodes} {cables} ]")
    network = {"file": str(cluster), "compute_ms": 1}
    fake("a", [record(9, 1.0)], workers=4, topology={"name": "ring"}, network=network)
    (picture,) = networks.pictures(grouped(tmp_path), print)
    assert sorted(link.label for link in picture.links) == ["1", "2", "3", "4"]
    thickness = {link.label: link.thickness for link in picture.links}
    assert thickness["4"] == pytest.approx(5)
    assert thickness["1"] == pytest.approx(3)  # 1 + 4 sqrt(1/4)
    assert "Gbit/s" in picture.caption


# What a run directory may hold.


class Touch:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_damaged_runs_are_named_and_left_out(fake, tmp_path):
    good = [record(5, 4.0), record(10, 2.0)]
    fake("good", good)
    mark = tmp_path / "mark"
    pickled = fake("pickled", good, seed=1)
    np.savez(
        pickled / "split.npz",
        classes=np.array([0]),
        label_counts=np.array([Touch(mark)] * 4, dtype=object),
    )
    (fake("no_metrics", good) / "metrics.jsonl").unlink()
    (fake("no_config", good) / "config.yaml").write_text("workers: [")
    (fake("no_summary", good) / "summary.json").write_text("[1")
    (fake("odd_summary", good) / "summary.json").write_text('{"status": 3}')
    (fake("short", good) / "metrics.jsonl").write_text(json.dumps(good[0]) + '\n{"step": 10, "lo')
    fake("backwards", [*good, record(10, 1.0)])
    told = []
    page_path = write([tmp_path / "runs"], tmp_path / "out", figures=False, say=told.append)
    left_out = {re.search(r"runs/(\w+): left out; \S", line)[1] for line in told}  # type: ignore
    assert left_out == {
        *("pickled", "no_metrics", "no_config", "no_summary", "odd_summary", "short", "backwards")
    }
    assert not mark.exists()
    assert "Left out of this report: 7" in page_path.read_text()


def test_what_comes_from_a_run_is_text_and_nothing_else(fake, tmp_path):
    task = {"name": HOSTILE, "batch_size": 8}
    for seed in (0, 1):
        fake(f"a{seed}<b>", [record(9, 1.0 + seed, **{HOSTILE: 3.0})], seed=seed, task=task)
    fake("b", [record(9, 3.0)])
    text = write([tmp_path / "runs"], tmp_path / "out", figures=False).read_text()
    assert "<img" not in text
    assert "a0<b>" not in text
    assert text.count("<script") == text.count("</script>") == 2
    content = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert content
    data = json.loads(content[1])
    assert any(HOSTILE in group["label"] for group in data["groups"])
    markdown = (tmp_path / "out/table.md").read_text()
    assert "<" not in markdown
    assert all(line.replace("\\|", "").count("|") in (0, 8) for line in markdown.splitlines())
    latex = (tmp_path / "out/table.tex").read_text()
    assert r"\textless{}/script\textgreater{}" in latex


@pytest.mark.slow
def test_the_command_writes_everything(fake, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    fake("a", [record(9, 1.0)])
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "runs"), "--target", "loss=15", "--x", "bytes"])
    assert ended.value.code == 0
    out = tmp_path / "runs/report"
    assert str(out / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert {path.name for path in out.iterdir()} == {
        *("report.html", "table.md", "table.tex", "table.csv", "figures")
    }
    drawn = {path.name for path in (out / "figures").iterdir()}
    names = [f"{column}-{axis}" for column in COLUMNS for axis in ("step", "bytes", "time")]
    names.append("topology-1")
    assert drawn == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert '"x":"bytes"' in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "DIR: nowhere is no directory"),
        (["."], "DIR: . holds no run"),
        (["runs", "--x", "hours"], "--x: must be step, bytes, time; got 'hours'"),
        (["runs", "--target", "acc=1"], "--target: is COLUMN=NUMBER for a column of the runs: los"),
        (["runs", "--target", "loss=low"], "--target: is COLUMN=NUMBER, such as loss=0.9; got"),
    ],
)
def test_bad_arguments(fake, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "runs":
        fake("a", [record(9, 1.0)])
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
