"""Every Python block of the documentation runs: those of one page one after the other, in one namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SKIPPED = re.compile(r"notest: \S+ \S+.*")
"""What a block says that is not run: the reason."""


class Block(NamedTuple):
    """A block of Python: the line it begins on, what stands behind the word python, and the code."""

    line: int
    mark: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python *(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(text.count("\n", 0, one.start("code")), one["mark"], one["code"]) for one in found]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# TRL and peft use names that newer releases of transformers deprecate.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if page.is_file() and blocks(page)], ids=_name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("documentation_page")
    # Dataclasses and pickle look up the module that a class was defined in.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ran = 0
    for block in blocks(page):
        if not block.mark:
            # Blank lines in front: a traceback then names the line of the page.
            source = "\n" * block.line + block.code
            exec(compile(source, str(page), "exec", dont_inherit=True), vars(module))
            ran += 1
    assert ran, f"{page.name} has Python blocks, and none of them runs"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_are_run_or_say_why_not(page: Path) -> None:
    for block in blocks(page):
        assert not block.mark or SKIPPED.fullmatch(block.mark), f"{page.name}:{block.line}: {block.mark!r}"


def test_the_pages_have_blocks() -> None:
    assert all(blocks(ROOT / name) for name in ("README.md", "CONTRIBUTING.md", "docs/all-of-it.md"))
