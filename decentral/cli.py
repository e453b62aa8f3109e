"""The commands. Exit codes: 0 done, 2 the input was wrong, 1 anything else, 130 stopped."""

import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from decentral.errors import UserError, WorkerError
from decentral.imports import uncollected
from decentral.progress import Terminal

if TYPE_CHECKING:
    import networkx as nx

    from decentral.diagnostics.connectivity import Line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Decentralised and local SGD on PyTorch and Ray: launch, simulate, compare.",
    epilog="Example: decentral run configs/quickstart.yaml engine=sim",
)
console = Console()
errors = Console(stderr=True)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [KEY=VALUE ...]",
        help="A YAML file, then overrides of its keys; null takes an optional key away."
        " With --resume no CONFIG.",
    ),
]


@app.command(
    epilog="Example: decentral run configs/quickstart.yaml algorithm.period=4 --engine sim"
)
def run(
    words: Words = None,
    engine: Annotated[str | None, typer.Option(help="sim or ray; the config's by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory to make; runs/NAME-TIME by default.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on from the newest checkpoint of a run directory.")
    ] = None,
) -> None:
    """Run one experiment and record it."""
    from decentral.config import load, parse_overrides  # torch is slow: not for --help

    words = words or []
    config = words.pop(0) if words and "=" not in words[0] else None
    changes = parse_overrides(words)
    if engine is not None:
        changes["engine"] = engine
    sys.path.insert(0, "")  # a user's own task is looked up in the working directory
    watcher = Terminal(console)
    if resume is not None:
        if config is not None or out is not None:
            raise UserError("names the run: leave CONFIG and --out out", "--resume")
        with uncollected():
            from decentral.api import resume as go_on

        result = go_on(resume, watcher=watcher, **changes)
    else:
        if config is None:
            raise UserError("name a config, for example: decentral run configs/quickstart.yaml")
        checked = load(config, changes)
        with uncollected():
            from decentral.api import execute

        out = out or Path("runs") / f"{checked.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        result = execute(checked, out, watcher)
    console.print(_summary_table(result.summary))
    console.print(f"written to {result.directory}", highlight=False, soft_wrap=True)
    if result.summary["status"] == "stopped":
        if "checkpoint_error" not in result.summary:
            console.print(f"go on with: decentral run --resume {result.directory}", soft_wrap=True)
        raise typer.Exit(130)


@app.command(
    epilog="Example: decentral compare configs/compare/digits.yaml steps=100 compare.seeds=2"
)
def compare(
    words: Words = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the sweep; runs/NAME by default. What is done there stays"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the sweep in a directory, without its CONFIG.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run the points as tasks of this Ray cluster, auto, or local for one of its own.",
        ),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw PNG and SVG files too.")
    ] = True,
) -> None:
    """Run a sweep: a config over a grid of keys and seeds, each point once; report on it.

    The same command goes on with a sweep that was stopped. Exit code 1 if points have failed.
    """
    from decentral.config import parse_overrides

    words = words or []
    config = words.pop(0) if words and "=" not in words[0] else None
    changes = parse_overrides(words)
    if (config is None) == (resume is None):
        raise UserError(
            "name a config, or a sweep to go on with: decentral compare"
            " configs/compare/digits.yaml, or decentral compare --resume DIR"
        )
    if resume is not None:
        if out is not None:
            raise UserError("names the directory: leave --out out", "--resume")
        if not (resume / "compare.yaml").exists():
            raise UserError(f"{resume} holds no sweep: it has no compare.yaml", "--resume")
        config, out = str(resume / "compare.yaml"), resume
    if ray is not None:
        changes |= {"compare.on": "ray", "ray.address": None if ray == "local" else ray}
    sys.path.insert(0, "")  # a user's own task is looked up in the working directory
    with uncollected():
        from decentral.sweep import driver, show

    assert config is not None
    try:
        comparison = driver.compare(config, out=out, observer=show.Terminal(console), **changes)
    except KeyboardInterrupt:
        console.print("stopped; what is done stays, and the same command goes on with the rest")
        raise typer.Exit(130) from None
    if len(comparison.failed) < len(comparison.table):
        console.print(show.results_table(comparison))
        page = comparison.report(figures=figures, say=_say_on_the_side)
        console.print(f"report in {page}", highlight=False, soft_wrap=True)
    console.print(f"written to {comparison.directory}", highlight=False, soft_wrap=True)
    if len(comparison.failed):
        console.print(show.failures_table(comparison))
        raise typer.Exit(1)


@app.command(epilog="Example: decentral watch runs/quickstart")
def watch(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR ...", help="Run directories, also on a shared file system."),
    ],
) -> None:
    """Follow runs from another terminal or machine until they end; Ctrl-C leaves them alone."""
    from decentral.watch import watch as follow

    try:
        follow(directories, console)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command(epilog="Example: decentral connectivity runs/local --workers 0 7 --match")
def connectivity(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR [DIR]",
            help="A run with a checkpoint: two of its workers; two finished runs: their averages.",
        ),
    ],
    workers: Annotated[
        tuple[int, int] | None, typer.Option(help="Of one run; the first and the last by default.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Along the line, ends included.")] = 11,
    match: Annotated[
        bool, typer.Option("--match", help="Renumber the hidden units of one to be near the other.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="test or train; test where the task has such data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The loss along the straight line between two trained models, and its barrier."""
    from decentral.diagnostics.connectivity import connectivity as line_between

    sys.path.insert(0, "")  # a user's own task is looked up in the working directory
    line = line_between(directories, workers=workers, points=points, match=match, data=data)
    if as_json:
        print(json.dumps(line.json(), indent=2))
    else:
        console.print(_line_table(line))


@app.command(epilog="Example: decentral report runs --baseline parallel_sgd")
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR ...", help="Run directories, or folders of them."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; `report` in DIR, or here if several.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="What to compare to: a group's label, or a part of one alone, or the directory of"
            " a run in it; parallel SGD's.",
        ),
    ] = None,
    x: Annotated[
        str, typer.Option(help="Axis to begin with: step, bytes, time (simulated), wall.")
    ] = "step",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=NUMBER",
            help="Report the way there, such as eval_accuracy=0.95; may be repeated.",
        ),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw PNG and SVG files too.")
    ] = True,
) -> None:
    """Compare runs, finished or not: report.html, figures, tables for papers."""
    from decentral.report import write

    out = out or (directories[0] if len(directories) == 1 else Path()) / "report"
    page = write(
        directories,
        out,
        baseline=baseline,
        x=x,
        targets=target or (),
        figures=figures,
        say=_say_on_the_side,
    )
    console.print(f"written to {page}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: decentral topology random_regular degree=3 -n 16 --period 8")
def topology(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|FILE [OPTION=VALUE ...]",
            help="A built-in topology with its options, or a graph file.",
        ),
    ],
    workers: Annotated[
        int | None, typer.Option("-n", help="Number of workers; a file brings its own.")
    ] = None,
    period: Annotated[
        int | None, typer.Option(min=1, help="H, for C_beta and D_beta; infinite by default.")
    ] = None,
    parameters: Annotated[
        int, typer.Option(min=1, help="Of the model, for the cost of a step; ResNet-50's.")
    ] = 25_557_032,
    latency_ms: Annotated[float, typer.Option(min=0, help="Of a link, for the cost.")] = 0.1,
    bandwidth_gbps: Annotated[
        float, typer.Option(min=1e-9, help="Of a link, for the cost.")
    ] = 10.0,
    weights: Annotated[str | None, typer.Option(help="Rule for the mixing weights.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this PNG, SVG or PDF.")] = None,
) -> None:
    """Say what a topology is worth: degrees, beta, effective neighbours, the theory's figures."""
    from decentral import topology as topologies
    from decentral.config import parse_overrides

    source, *options = words
    is_file = source not in topologies.GENERATORS and ("." in source or "/" in source)
    made = topologies.build(
        workers,
        name=None if is_file else source,
        file=source if is_file else None,
        weights=weights,
        **parse_overrides(options),
    )
    facts = topologies.describe(made, period, parameters, latency_ms, bandwidth_gbps)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        console.print(_facts_table(facts))
        console.print(_methods_table(facts))
    if plot is not None:
        topologies.plot(made, plot)
        # Beside --json, standard output is JSON and nothing else.
        (errors if as_json else console).print(f"drawn to {plot}", highlight=False, soft_wrap=True)


@app.command(
    epilog="Example: decentral measure configs/quickstart.yaml workers=3 --out cluster.gml"
)
def measure(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE ...]",
            help="A YAML file, then overrides of its keys; null takes an optional key away.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Graph file to write, .gml.")],
    seconds: Annotated[float, typer.Option(min=1, help="For all links together, about.")] = 60,
    used: Annotated[
        bool, typer.Option("--used", help="Keep the links alone that the config's topology uses.")
    ] = False,
) -> None:
    """Measure a cluster: its workers and links, as a graph file that the simulated clock reads."""
    from decentral.config import load, parse_overrides

    config, *changes = words
    checked = load(config, parse_overrides(changes))
    sys.path.insert(0, "")
    from decentral import measure as measuring  # after the path: a run's workers take it over

    say = Terminal(console).say
    cluster = measuring.measure_command(checked, out, say, seconds, used)
    console.print(_cluster_table(cluster))
    say(f"written to {out}; the simulated clock takes it with")
    say(" ".join(measuring.overrides(cluster, out)))


@app.command(epilog="Example: decentral doctor configs/quickstart.yaml")
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG [KEY=VALUE ...]]",
            help="A config whose ray.address to take; a local cluster by default.",
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of the cluster, such as auto or 10.0.0.1:6379.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For all links together, about.")] = 20,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a node has to answer.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is wrong with a cluster, and how to mend it: versions, network, GPUs, clocks.

    Exit code 0: all is well; 1: something is wrong.
    """
    from decentral import doctor as doctoring
    from decentral.config import RayConfig, load, parse_overrides

    cluster = RayConfig()
    if words:
        config, *changes = words
        cluster = load(config, parse_overrides(changes)).ray
    if address is not None:
        cluster = cluster.model_copy(update={"address": address})
    seen = doctoring.diagnose(cluster, _say_on_the_side, seconds, timeout)
    found = doctoring.findings(seen)
    if as_json:
        print(json.dumps(doctoring.as_json(seen, found), indent=2))
    else:
        doctoring.show(seen, found, console)
    if any(finding.wrong for finding in found):
        raise typer.Exit(1)


@app.command(
    epilog="Example: decentral plan --workers 16 --bandwidth-gbps 1 --latency-ms 0.5"
    " --parameters 25.5e6 --compute-ms 146"
)
def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE ...]",
            help="With --task: keys of its config, such as task.batch_size=16.",
        ),
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Graph file of the cables, with latencies and bandwidths.")
    ] = None,
    measure_config: Annotated[
        Path | None,
        typer.Option(
            "--measure",
            metavar="CONFIG",
            help="First measure the cluster at hand with this config's workers and task through"
            " Ray, and write it to the --cluster file.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-n", help="On equal links, without a --cluster.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Of a link, one way; of a file's edge without one.")
    ] = None,
    bandwidth_gbps: Annotated[
        float | None, typer.Option(min=1e-9, help="Of a link; of a file's edge without one.")
    ] = None,
    all_reduce_gbps: Annotated[
        float | None, typer.Option(min=1e-9, help="What an all-reduce reaches; a link's.")
    ] = None,
    all_reduce_ms: Annotated[
        float | None, typer.Option(min=1e-9, help="Measured, of this model, over all workers.")
    ] = None,
    exchange_ms: Annotated[
        float | None, typer.Option(min=1e-9, help="Measured, of this model, with one neighbour.")
    ] = None,
    compute_ms: Annotated[float | None, typer.Option(min=0, help="Of one local step.")] = None,
    parameters: Annotated[
        float | None, typer.Option(min=1, help="Of the model, such as 25.5e6; a --task knows.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be repeated.")
    ] = None,
    topology: Annotated[
        list[str] | None, typer.Option(help="Only this topology; may be repeated.")
    ] = None,
    period: Annotated[list[int] | None, typer.Option(help="Only this H; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training; ranks by them.")] = None,
    data: Annotated[
        str, typer.Option(help="Of the workers, alike or not: iid or non_iid.")
    ] = "iid",
    epochs: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=NUMBER", help="To the target, if known; may be repeated."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="In an epoch.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="In a step, over all workers.")] = None,
    task: Annotated[str | None, typer.Option(help="To search with, or write a config of.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Search: accuracy=0.95 or loss=0.2; needs --task.")
    ] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Search these; 0.1, 0.3 and 1. May be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of the search.")] = 3,
    max_steps: Annotated[int, typer.Option(min=1, help="Of a run of the search.")] = 400,
    every: Annotated[int, typer.Option(min=1, help="Steps from evaluation to evaluation.")] = 5,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes of the search; one a core.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all rows.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="Write the config of the best there; needs --task.")
    ] = None,
) -> None:
    """Say what to run on a cluster: method, topology and period by the time they take.

    Ranked by the time to the target: found by the simulator with --task and --target, or from
    --epochs. With --steps by the time they take, methods whose transient stage is longer after the
    others. Without either: of the methods whose step is at most 10% longer than the shortest, that
    with the shortest transient stage; a fast network is a reason to average more.
    """
    from decentral.plan import Cluster, Measured, Request, Work, count
    from decentral.plan.show import estimates_table, found_table

    work = Work(data, steps, _epochs(epochs or []), samples, batch)
    sys.path.insert(0, "")  # a user's own task is looked up in the working directory
    if measure_config is not None:
        _measure_cluster(measure_config, cluster)
    request = Request(
        workers=count(cluster, workers),
        task=task,
        words=tuple(words or ()),
        dtype=dtype,
        parameters=parameters,
        lrs=tuple(lr or (0.1, 0.3, 1.0)),
        target=target,
        steps=max_steps if steps is None else steps,
        max_steps=max_steps,
        every=every,
        seeds=seeds,
        write=write,
    )
    size = request.size
    made = Cluster.build(
        cluster,
        workers,
        latency_ms,
        bandwidth_gbps,
        all_reduce_gbps,
        compute_ms,
        Measured(all_reduce_ms, exchange_ms),
        size,
    )
    chosen = method or (), topology or (), period or ()
    with errors.status("planning"):  # on a terminal alone
        answer = request.answer(made, size, work, *chosen, jobs=jobs, say=_say_on_the_side)
    if as_json:
        print(json.dumps(answer.json(), indent=2))
    else:
        console.print(estimates_table(answer, top))
        if answer.found is not None:
            console.print(found_table(answer, top))
    if write is not None:
        answer.write(write)
        _say_on_the_side(f"written to {write}")


def _measure_cluster(config: Path, out: Path | None) -> None:
    """What `decentral measure` does, for a plan that follows."""
    from decentral import measure as measuring
    from decentral.config import load

    if out is None:
        raise UserError(
            "writes what it measures to a graph file; say which with --cluster FILE.gml",
            "--measure",
        )
    if out.exists():
        raise UserError(
            f"{out} is there already; take another name, or --measure away", "--cluster"
        )
    measuring.measure_command(load(config), out, _say_on_the_side)
    _say_on_the_side(f"written to {out}")


def _say_on_the_side(line: str) -> None:
    """Beside --json, standard output is JSON and nothing else."""
    errors.print(line, highlight=False, soft_wrap=True)


def _epochs(words: list[str]) -> dict[str, float]:
    epochs = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            epochs[name] = float(number)
        except ValueError:
            epochs[name] = 0.0
        if not epochs[name] > 0:
            raise UserError(f"is METHOD=NUMBER, such as gossip_pga=109; got {word!r}", "--epochs")
    return epochs


@app.command(epilog="Example: decentral methods gossip_pga d2")
def methods(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Only these; all by default.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown.")] = False,
) -> None:
    """List the methods: equation, source, what they send, what they ask of the topology."""
    from decentral.algorithms import PRESETS, describe
    from decentral.signature import choose

    for name in names or []:
        choose(PRESETS, name, "NAME", "method")
    rows = [row for row in describe() if not names or row["name"] in names]
    if markdown:
        print(_methods_page(rows), end="")
        return
    for row in rows:
        options = f" ({row['options']})" if row["options"] else ""
        console.print(f"[bold]{row['name']}[/bold]{escape(options)}: {escape(row['summary'])}")
        for part in ("equation", "source", "sends", "requires", "holds"):
            console.print(f"  {part:9}{escape(row[part])}", highlight=False, soft_wrap=True)


def _methods_page(rows: list[dict[str, str]]) -> str:
    """docs/methods.md, from the table of methods."""
    lines = [
        "# Methods",
        "",
        "Made by `decentral methods --markdown`. D is the number of parameters, W the mixing",
        "matrix, g the stochastic gradient, gamma the learning rate. A global average replaces the",
        "mixing of its step: W = J = 11'/n. Held are the floats of a worker that stay from step to",
        "step, beside parameters, gradient and what the local optimizer remembers.",
    ]
    for row in rows:
        lines += ["", f"## {row['name']}", "", row["summary"], ""]
        if row["options"]:
            lines.append(f"- options: `{row['options']}`")
        lines += [f"- equation: `{row['equation']}`", f"- source: {row['source']}"]
        lines += [f"- sends a step: {row['sends']}", f"- asks of W: {row['requires']}"]
        lines.append(f"- holds: {row['holds']}")
    return "\n".join(lines) + "\n"


def _facts_table(facts: dict[str, Any]) -> Table:
    table = Table(title=facts["name"], show_header=False)
    for name, value in facts.items():
        if name in ("name", "transient_steps", "step_cost_s", "transient_s"):
            continue
        if name == "period" and value is None:
            shown = "never"
        elif value is None and not facts["doubly_stochastic"]:
            shown = "for a doubly stochastic W"
        else:
            shown = _fact(value)
        table.add_row(name.replace("_", " "), shown)
    return table


def _methods_table(facts: dict[str, Any]) -> Table:
    """What each method costs a step, and the order of its transient stage."""
    table = Table(
        title="communication, and the transient stage up to a constant",
        caption="transient: before linear speed-up; iid: all workers' data alike",
    )
    for column in ("method", "s/step", "steps iid", "non-iid", "s iid", "non-iid"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, cost in facts["step_cost_s"].items():
        row = [method, f"{cost:.3g}"]
        for figures in ("transient_steps", "transient_s"):
            stage = (facts[figures] or {}).get(method)
            row += [_order(stage[data]) if stage else "-" for data in ("iid", "non_iid")]
        table.add_row(*row)
    return table


def _line_table(line: "Line") -> Table:
    """The losses along a line, and the barrier below them."""
    how = " matched," if line.matched else ""
    table = Table(
        title=" to ".join(line.ends),
        caption=f"{line.data} data;{how} distance {line.distance:.4g}, barrier {line.barrier:.4g}",
    )
    for column in ("along", "loss", "accuracy")[: 2 if line.accuracy is None else 3]:
        table.add_column(column, justify="right")
    columns = [line.loss] if line.accuracy is None else [line.loss, line.accuracy]
    for t, *figures in zip(line.at, *columns, strict=True):
        table.add_row(f"{t:.3g}", *map(_number, figures))
    return table


def _order(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2g}"


def _cluster_table(cluster: "nx.Graph") -> Table:
    """A measured cluster: least, median and greatest of what differs."""
    table = Table(title=f"{len(cluster)} workers, {cluster.number_of_edges()} links")
    for column in ("", "least", "median", "greatest"):
        table.add_column(column, justify="right" if column else "left")
    columns = {
        "step, ms": [
            cluster.graph["compute_ms"] * scale for _, scale in cluster.nodes(data="compute_scale")
        ],
        "latency, ms": [value for *_, value in cluster.edges(data="latency_ms")],
        "bandwidth, Gbit/s": [value for *_, value in cluster.edges(data="bandwidth_gbps")],
        "all-reduce, Gbit/s": [cluster.graph["all_reduce_gbps"]],
    }
    for name, values in columns.items():
        spread = (min(values), statistics.median(values), max(values))
        table.add_row(name, *(f"{value:.4g}" for value in spread))
    return table


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_fact(item)}" for key, item in value.items())
    if value is None:
        return "infinite"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _summary_table(summary: dict[str, Any]) -> Table:
    final = summary["final"] or {}
    table = Table(title=f"{summary['name']}: {summary['algorithm']}", show_header=False)
    rows = {
        "steps": final.get("step"),
        "loss": _number(final.get("loss")),
        "consensus distance": _number(final.get("consensus_distance")),
        "eval loss": _number(final.get("eval_loss")),
        "accuracy, averaged model": _number(final.get("eval_accuracy")),
        "accuracy, workers' own": _number(final.get("eval_accuracy_workers")),
        "sent by all workers": f"{final['bytes_sent'] / 1e6:.1f} MB" if final else None,
        "simulated time": f"{final['sim_time_s']:.2f} s" if final else None,
        "training time": f"{final['time_s']:.1f} s" if final else None,
        "with start-up": f"{summary['seconds']:.1f} s",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never shows a traceback for what the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(arguments)  # handles its own usage errors, and Ctrl-C, and exits
    except UserError as error:
        _fail(2, str(error))
    except WorkerError as error:
        _fail(1, str(error))


def _fail(code: int, message: str) -> None:
    errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)
