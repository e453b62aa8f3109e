"""What the site has beside the pages in docs/, made while `mkdocs build` runs.

- the topologies, with figures and pictures, from the table of generators
- a picture of the main methods, and one of how fast topologies mix
- the config's keys, from the README
- the pages and files of launch/, benchmarks/ and topologies/, to which links lead
- formulas as MathML, so that the site loads nothing from elsewhere; a page that would is a warning
"""

import html
import inspect
import itertools
import logging
import math
import os
import posixpath
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
import matplotlib
import numpy as np
from latex2mathml.converter import convert
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from decentral import topology as topologies
from decentral.algorithms import Averaging, gossip_pga, gossip_sgd, local_sgd
from decentral.topology import GENERATORS

log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).parents[1]
BESIDE = ("launch", "benchmarks", "topologies")  # folders of the repository that are on the site
SMALL, LARGE = 16, 64  # workers, for the figures of a topology
SIZES = (8, 16, 32, 64, 128, 256)  # workers, for the picture of the spectral gap
SHOWN = {
    "ring": "ring",
    "torus": "torus",
    "exponential": "static exponential",
    "random_regular": "random regular, degree 4",
}
WORKERS, STEPS = 8, 8  # of the picture of the methods
METHODS = {
    "Parallel SGD": None,  # averages gradients, of all, at every step
    "Local SGD, H = 4": local_sgd(4),
    "Gossip SGD": gossip_sgd(),
    "Gossip-PGA, H = 4": gossip_pga(4),
}
# Drawn the same at every build, on no ground, so that both colour schemes can have them.
STYLE = {"svg.hashsalt": "decentral", "savefig.transparent": True}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures, and the folders beside docs/."""
    pictures = {f"pictures/{name}.svg": topology_picture(name) for name in GENERATORS}
    pictures |= {"pictures/gap.svg": gap_picture(), "pictures/methods.svg": methods_picture()}
    for path, content in pictures.items():
        files.append(File.generated(config, path, content=content))
    for folder in BESIDE:
        for source in sorted((ROOT / folder).rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                path = source.relative_to(ROOT).as_posix()
                files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put in what a comment in a page stands for, and mend links."""
    for what, make in MADE.items():
        comment = f"<!-- made: {what}, by docs/hooks.py -->"
        if comment in markdown:
            markdown = markdown.replace(comment, make())
    return site_links(markdown, page.file.src_uri)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas, which arithmatex has marked, as MathML."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match["block"] else "inline"
        latex = html.unescape(match["block"] or match["inline"]).strip()
        return convert(latex, display=display)

    marked = (
        r'<div class="arithmatex">\\\[(?P<block>.*?)\\\]</div>'
        r'|<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>'
    )
    return re.sub(marked, mathml, content, flags=re.DOTALL)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Warn, which --strict makes an error, where a reader's browser would ask another host."""
    loads = r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?http[^\s>]*"
    for loaded in re.findall(loads, output):
        log.warning("%s loads from elsewhere: %s", page.file.src_uri, loaded)
    return output


def site_links(markdown: str, page: str) -> str:
    """Links that leave a page's folder, as they are on the site: there docs/ is the root.

    `page` is its path on the site. A README of the repository links to ../docs/clock.md, a page in
    docs/ to ../benchmarks/README.md.
    """
    folder = posixpath.dirname(page)
    here = folder if page.split("/")[0] in BESIDE else posixpath.join("docs", folder)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1]))
        return "](" + posixpath.relpath(target.removeprefix("docs/"), folder or ".")

    return re.sub(r"\]\((\.\./[^)\s#:]*)", moved, markdown)


def config_keys() -> str:
    """The README's table of keys, and what follows it on records."""
    readme = (ROOT / "README.md").read_text()
    start = readme.index("| key | what it takes |")
    text = readme[start : readme.index("\n```", start)]  # its last paragraph leads on
    text = re.sub(r"\[docs/(\w+)\.md\]\(docs/", r"[\1](", text).replace("](docs/", "](")
    table, *records, _ = text.split("\n\n")
    return "\n\n".join([table, "## Records", *records])


def topology_table() -> str:
    """A row for each generator: what it is worth."""
    rows = [
        "| topology | neighbours | graphs |"
        f" beta, {SMALL} workers | beta, {LARGE} workers | effective neighbours |",
        "|---|---|---|---|---|---|",
    ]
    for name in GENERATORS:
        small, large = (topologies.describe(topologies.build(n, name)) for n in (SMALL, LARGE))
        degree = small["degree"]
        neighbours = f"{degree['mean']:.3g}"
        if degree["min"] != degree["max"]:
            neighbours += f", at most {degree['max']}"
        graphs = small["graphs"] if small["graphs"] > 1 else ""
        beta = " | ".join(f"{facts['beta']:.4f}".replace("0.0000", "0") for facts in (small, large))
        effective = small["effective_neighbours"]["gamma_0.9"]
        rows.append(f"| [{name}](#{name}) | {neighbours} | {graphs} | {beta} | {effective:.3g} |")
    return "\n".join(rows)


def topology_sections() -> str:
    """A section for each generator: what it says of itself, its options, its picture."""
    sections = []
    for name, generator in GENERATORS.items():
        options = list(inspect.signature(generator).parameters.values())[1:]  # all but n
        listed = ", ".join(f"{option.name}={option.default}" for option in options)
        sections += [f"## {name}", plain_to_markdown(inspect.getdoc(generator) or "")]
        sections += [f"Options: `{listed}`"] if listed else []
        sections += [f"![{name} of {SMALL} workers](pictures/{name}.svg){{ width=360 }}"]
    return "\n\n".join(sections)


def plain_to_markdown(text: str) -> str:
    """A docstring of this project: a list where a line begins with a name and what it means."""
    text = re.sub(r"(?<![`*])\*(?=\w)", r"\*", text)  # f(*inputs) is no emphasis
    text = re.sub(r"^(\w+(?:, \w+)*)(?:: |  +)(?=\S)", r"- `\1`: ", text, flags=re.MULTILINE)
    return re.sub(r"((?:^- .*\n?(?:^ +.*\n?)*)+)", r"\n\1\n", text, flags=re.MULTILINE).strip()


class PlainDocstrings(griffe.Extension):
    """The same for the page of the API."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain_to_markdown(obj.docstring.value)


def topology_picture(name: str) -> bytes:
    """The SVG that `decentral topology NAME -n 16 --plot` draws."""
    return _drawn(lambda path: topologies.plot(topologies.build(SMALL, name), path))


def gap_picture() -> bytes:
    """1 - beta against the number of workers."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, label in SHOWN.items():
        gaps = [1 - topologies.beta(topologies.build(n, name)) for n in SIZES]
        axes.plot(SIZES, gaps, marker="o", ms=4, label=label)
    asymptote = 4 * math.pi**2 / 3 / np.array(SIZES, dtype=float) ** 2  # of the ring
    axes.plot(SIZES, asymptote, ls=":", color="grey", label=r"$4\pi^2/3n^2$")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_xlabel("workers n")
    axes.set_title("spectral gap 1 - β")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _drawn(figure.savefig)


def methods_picture() -> bytes:
    """Who averages with whom at each of eight steps: a row a method, eight workers on a circle."""
    figure = Figure(figsize=(9, 4.2))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    angles = 2 * math.pi * np.arange(WORKERS) / WORKERS
    circle = 0.34 * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    for row, (label, algorithm) in enumerate(METHODS.items()):
        axes.text(-0.8, -row, label, ha="right", va="center", fontsize=12)
        for step in range(STEPS):
            at = circle + np.array([step, -row])
            everyone = algorithm is None or algorithm.schedule.next_average(step) == step
            if everyone:
                pairs = list(itertools.combinations(range(WORKERS), 2))
            elif algorithm.between is Averaging.NEIGHBOURS:
                pairs = list(topologies.build(WORKERS, "ring").graph(0).edges)
            else:
                pairs = []
            colour, width = ("#c2410c", 0.7) if everyone else ("#2f6fb0", 1.6)
            lines = [(at[i], at[j]) for i, j in pairs]
            axes.add_collection(LineCollection(lines, colors=colour, linewidths=width))
            axes.scatter(*at.T, s=16, color="#1d2433", zorder=3)
    for step in range(STEPS):
        axes.text(step, 0.62, f"step {step + 1}", ha="center", fontsize=10, color="#5b6472")
    axes.set_xlim(-2.9, STEPS - 0.5)
    axes.set_ylim(-len(METHODS) + 0.5, 0.85)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return _drawn(figure.savefig)


def _drawn(draw: Callable[[Path], Any]) -> bytes:
    """The SVG that `draw` makes at a path, the same at every build."""
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(STYLE):
        path = Path(folder) / "picture.svg"
        draw(path)
        return path.read_bytes()


# What a page's comments stand for.
MADE = {
    "the table of topologies": topology_table,
    "a section for each topology": topology_sections,
    "the README's table of keys, and what it says of records": config_keys,
}

# Without a date in the pictures a build is the same as the one before.
os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
