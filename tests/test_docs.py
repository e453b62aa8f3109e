"""The documentation keeps its word: its code runs, its tables are the code's, its site builds."""

import sys

import pytest
from pages import NO_CODE, ROOT, blocks, run_page

from decentral import topology as topologies
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
        assert block.mark in ("", "output") or block.reason, f"{block}: {block.mark}"
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a block that is not seen"


def test_the_page_on_topologies_has_all_of_them_and_their_figures(hooks):
    page = hooks.topology_page()
    rows = {line.split("[")[1].split("]")[0]: line for line in page.splitlines() if "](#" in line}
    assert list(rows) == list(GENERATORS)
    for name in GENERATORS:
        assert f"\n## {name}\n" in page
        beta = topologies.beta(topologies.build(16, name))
        assert f"{beta:.4f}" in rows[name] or beta == 0
    assert "| 0.9493 | 0.9968 |" in rows["ring"]  # 1/3 + 2/3 cos(2 pi / n)


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
