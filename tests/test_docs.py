"""The documentation keeps its word: its code runs, its tables are the code's, its site builds."""

import sys
from typing import Any

import numpy as np
import pytest
import yaml
from harness import D, N, Quadratic, ring, run
from pages import NO_CODE, QUICKSTART, ROOT, TOLERANCES, blocks, run_page

from decentral import topology as topologies
from decentral.algorithms import PRESETS
from decentral.topology import GENERATORS

DOCS = ROOT / "docs"
# launch/README.md is on the site too: test_launch.py runs it, on hosts.
PAGES = sorted(DOCS.glob("*.md"))
RUNNABLE = [
    page
    for page in PAGES
    if any(block.language not in NO_CODE and block.reason is None for block in blocks(page))
]


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py: what makes the rest of the site."""
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(DOCS))
    try:
        yield pytest.importorskip("hooks")
    finally:
        sys.path.remove(str(DOCS))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch, capsys):
    run_page(page, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs_or_says_why_not(page):
    for block in blocks(page):
        known = {"python", "bash", "yaml", "gml"} if block.reason is None else {block.language}
        assert block.language in known | NO_CODE, block
        assert block.mark in ("", *TOLERANCES) or block.reason, f"{block}: {block.mark}"
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a block that is not seen"


def test_the_example_of_an_own_method_is_what_its_formula_says():
    """By hand, in float64: two steps of gossip, then a global average, and so on."""
    (source,) = [b.text for b in blocks(DOCS / "own_method.md") if b.title == "mixed.py"]
    names: dict[str, Any] = {}
    exec(source, names)
    beta, lr, period = 0.8, 0.1, 3
    problem = Quadratic()
    replica = run(names["mixed_momentum"](period, beta), problem, 7, ring())

    a, c = problem.a.numpy(), problem.c.numpy()
    W = ring().matrices[0].toarray()
    x, m = np.zeros((N, D)), np.zeros((N, D))
    for k in range(7):
        mixing = np.full((N, N), 1 / N) if (k + 1) % period == 0 else W
        m = beta * m + a * (x - c)
        x, m = mixing @ (x - lr * m), mixing @ m
    np.testing.assert_allclose(replica.x, x, rtol=1e-13)


def test_the_page_on_topologies_has_all_of_them_and_their_figures(hooks):
    table, sections = hooks.topology_table(), f"\n{hooks.topology_sections()}"
    rows = {line.split("[")[1].split("]")[0]: line for line in table.splitlines()[2:]}
    assert list(rows) == list(GENERATORS)
    for name in GENERATORS:
        assert f"\n## {name}\n" in sections
        beta = topologies.beta(topologies.build(16, name))
        assert f"{beta:.4f}" in rows[name] or beta == 0
    assert "| 0.9493 | 0.9968 |" in rows["ring"]  # 1/3 + 2/3 cos(2 pi / n)


def test_the_home_page_counts_methods_and_topologies():
    home = (DOCS / "index.md").read_text()
    assert f"[{len(PRESETS)} such methods]" in home
    assert f"[{len(GENERATORS)} topologies]" in home


def test_what_a_comment_stands_for_is_there(hooks):
    text = "".join(page.read_text() for page in PAGES)
    assert text.count("<!-- made: ") == len(hooks.MADE)
    assert all(text.count(f"<!-- made: {what}, by docs/hooks.py -->") == 1 for what in hooks.MADE)
    assert "`consensus_distance` (after the local step" in hooks.config_keys()


def test_the_config_that_is_shown_is_the_quickstarts():
    (shown,) = [block.text for block in blocks(DOCS / "config.md") if block.language == "yaml"]
    assert yaml.safe_load(shown) == yaml.safe_load(QUICKSTART.read_text())


def test_pictures_are_the_same_at_every_build(hooks):
    assert hooks.topology_picture("groups") == hooks.topology_picture("groups")


@pytest.mark.parametrize(
    ("page", "link", "on_the_site"),
    [
        ("clock.md", "../benchmarks/README.md#x", "benchmarks/README.md#x"),
        ("launch/README.md", "../docs/clock.md#measure", "../clock.md#measure"),
        ("launch/README.md", "aws.yaml", "aws.yaml"),
        ("plan.md", "clock.md", "clock.md"),
    ],
)
def test_links_lead_to_where_a_page_is_on_the_site(hooks, page, link, on_the_site):
    assert hooks.site_links(f"a [link]({link}).", page) == f"a [link]({on_the_site})."


def test_formulas_are_mathml(hooks):
    made = hooks.on_page_content(r'<p><span class="arithmatex">\(a &lt; W_{ij}\)</span></p>')
    assert "<math" in made
    assert "<mi>W</mi>" in made
    assert "arithmatex" not in made


def test_a_page_that_loads_from_elsewhere_is_warned_of(hooks, caplog):
    class Page:
        class file:
            src_uri = "bad.md"

    local = '<link rel="stylesheet" href="assets/a.css"><a href="https://pytorch.org">x</a>'
    hooks.on_post_page(local, Page)
    assert not caplog.records
    hooks.on_post_page('<script src="https://unpkg.com/x.js"></script>', Page)
    assert "bad.md loads from elsewhere" in caplog.text
