"""The blocks of code on the pages of documentation, and how tests run them.

A page's blocks run one after the other, in a folder of the page's own: Python shares its names
from block to block, a block with a title is a file, and what a page shows as output is compared.
Where a block cannot run, a comment before it says why: <!-- not run: it needs AWS -->.
"""

import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from decentral import topology
from decentral.cli import main
from decentral.config import load, read
from decentral.experiment import build
from decentral.sweep.spec import read_sweep

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"
NO_CODE = {"", "text", "math"}
# Figures are the same on all processors, but for rounding, which grows where a model is trained.
TOLERANCES = {  # relative, absolute
    "output": (1e-3, 1e-6),
    "output, of training": (0.1, 0.02),
}

_FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n\s*?)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)"
    r"^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that its title says it is, and its mark."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    mark: str

    @property
    def reason(self) -> str | None:
        """Why it does not run."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else None

    @property
    def is_output(self) -> bool:
        """Whether it is what the block before it prints."""
        return self.mark in TOLERANCES

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["title"],
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
            found["mark"] or "",
        )
        for found in _FENCE.finditer(text)
    ]


def run_page(page: Path, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    """Run the blocks of `page` that are code, in `folder`, where the repository's files are too."""
    for name in ("configs", "topologies"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    modules = set(sys.modules)
    names: dict[str, Any] = {}
    printed = ""
    try:
        for block in blocks(page):
            if block.is_output:
                assert_same_output(printed, block)
            elif block.reason is None and block.language not in NO_CODE:
                capsys.readouterr()
                run_block(block, names)
                printed = capsys.readouterr().out
    finally:
        for name in set(sys.modules) - modules:
            if (folder / f"{name}.py").exists():
                del sys.modules[name]


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Run one block in the working directory; `names` are those of the page's Python."""
    if block.title is not None:
        Path(block.title).write_text(block.text)
        importlib.invalidate_caches()
    if block.language == "python" and block.title is not None:
        importlib.import_module(Path(block.title).stem)
    elif block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)
    elif block.language == "bash":
        for words in block.commands:
            assert words[0] == "decentral", f"{block}: runs {words[0]}; mark it as not run, and why"
            run_command(words[1:])
    elif block.language == "yaml":
        path = Path(block.title or "block.yaml")
        path.write_text(block.text)
        keys = read(path)
        if "task" not in keys:  # some keys, of a config that has the others
            keys = read(QUICKSTART) | {"engine": "sim"} | keys
        read_sweep(keys) if "compare" in keys else build(load(keys))
    elif block.language == "gml":
        assert block.title is not None, f"{block}: a graph needs a title, its file's name"
        topology.read(block.title)
    else:
        raise AssertionError(f"{block}: nobody runs {block.language}; mark it, and why")


def run_command(arguments: list[str]) -> None:
    """The command line, in this process. A run is short and in the simulator; no file is drawn."""
    if arguments[0] == "run" and "--resume" not in arguments:
        arguments = [*arguments, "engine=sim", "steps=20"]
        if "--out" not in arguments:  # two runs of one second would have one name
            arguments += ["--out", f"runs/{len(list(Path('runs').glob('*')))}-of-the-page"]
    if arguments[0] == "report":
        arguments = [*arguments, "--no-figures"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code in (None, 0), arguments


def assert_same_output(printed: str, block: Block) -> None:
    """What was printed is what the page shows, word by word; numbers but for rounding."""
    shown, words = block.text.split(), printed.split()
    relative, absolute = TOLERANCES[block.mark]
    assert len(shown) == len(words), f"{block} is no longer what is printed:\n{printed}"
    for one, other in zip(shown, words, strict=True):
        a, b = _number(one), _number(other)
        if a is None or b is None:
            same = one == other
        else:
            same = b == pytest.approx(a, rel=relative, abs=absolute)
        assert same, f"{block} shows {one}, printed is {other}:\n{printed}"


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
