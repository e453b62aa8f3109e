"""The commands. Exit codes: 0 done, 2 the input was wrong, 1 anything else, 130 stopped."""

import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from decentral.errors import UserError, WorkerError
from decentral.progress import Terminal

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

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE ...]", help="Override a config key; null takes an optional key away."
    ),
]


@app.command(
    epilog="Example: decentral run configs/quickstart.yaml algorithm.period=4 --engine sim"
)
def run(
    config: Annotated[
        str | None, typer.Argument(help="A YAML file; with --resume it may be left out.")
    ] = None,
    overrides: Overrides = None,
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

    words = list(overrides or [])
    if resume is not None and config is not None:
        if "=" not in config:
            raise UserError("--resume takes the config from its directory; leave CONFIG out")
        words.insert(0, config)
    changes = parse_overrides(words)
    if engine is not None:
        changes["engine"] = engine
    watcher = Terminal(console)
    sys.path.insert(0, "")  # a user's own task is looked up in the working directory
    if resume is not None:
        if out is not None:
            raise UserError("a resumed run goes on in its own directory; leave --out out", "--out")
        from decentral.api import resume as go_on

        result = go_on(resume, watcher=watcher, **changes)
    else:
        if config is None:
            raise UserError("name a config, for example configs/quickstart.yaml")
        checked = load(config, changes)
        from decentral.api import execute

        out = out or Path("runs") / f"{checked.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        result = execute(checked, out, watcher)
    console.print(_summary_table(result.summary))
    console.print(f"written to {result.directory}", highlight=False, soft_wrap=True)
    if result.summary["status"] == "stopped":
        console.print(f"go on with: decentral run --resume {result.directory}", soft_wrap=True)
        raise typer.Exit(130)


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


def main() -> None:
    """Run the command line; never shows a traceback for what the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(standalone_mode=False)
    except UserError as error:
        _fail(2, str(error))
    except WorkerError as error:
        _fail(1, str(error))
    except KeyboardInterrupt:
        _fail(130, "stopped")
    except typer.Exit as exit:
        sys.exit(exit.exit_code)
    except Exception as error:
        import click

        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        traceback.print_exc()
        sys.exit(1)


def _fail(code: int, message: str) -> None:
    errors.print(f"[red]error:[/red] {_escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _escape(message: str) -> str:
    from rich.markup import escape

    return escape(message)
