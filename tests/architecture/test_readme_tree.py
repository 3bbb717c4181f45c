"""The source tree in the README and the files on the disk are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src/lorafit", "examples", "scripts", "docs")
"""The folders of which the tree names every file."""


def tree(readme: str) -> dict[str, str]:
    """Path → what its line says, from the code block that follows the marker comment; folders end with a slash."""
    block = re.search(r"<!-- source tree -->\n+```text\n(.*?)\n```", readme, flags=re.DOTALL)
    assert block is not None, "the README has no block after <!-- source tree -->"
    entries: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        found = re.fullmatch(r"( *)(\S+)(?:\s{2,}(\S.*))?", line)
        assert found is not None, f"not a line of a tree: {line!r}"
        indent, name, said = len(found[1]), found[2], found[3] or ""
        above = [(depth, folder) for depth, folder in above if depth < indent]
        path = "".join(folder for _, folder in above) + name
        assert path not in entries, f"{path} twice"
        entries[path] = said
        if name.endswith("/"):
            above.append((indent, name))
    return entries


def missing(entries: dict[str, str], folders: tuple[str, ...], root: Path) -> list[str]:
    """Files below `folders` that the tree does not name; a folder without lines below it stands for all it holds."""
    whole = [
        path
        for path in entries
        if path.endswith("/") and not any(other != path and other.startswith(path) for other in entries)
    ]
    found = [path for folder in folders for path in _files(root / folder, root)]
    return [path for path in found if path not in entries and not path.startswith(tuple(whole))]


def _files(folder: Path, root: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield "/".join(parts)


@pytest.fixture(scope="module")
def entries() -> dict[str, str]:
    return tree((ROOT / "README.md").read_text(encoding="utf-8"))


def test_what_the_tree_names_is_there(entries: dict[str, str]) -> None:
    gone = [path for path in entries if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())]
    assert not gone, f"take out of the README's tree: {gone}"


def test_what_is_there_the_tree_names(entries: dict[str, str]) -> None:
    absent = missing(entries, FOLDERS, ROOT)
    assert not absent, f"add to the README's tree: {absent}"
    assert all(any(path.startswith(folder) for path in entries) for folder in FOLDERS)


def test_every_line_says_what_the_file_is_for(entries: dict[str, str]) -> None:
    silent = [path for path, said in entries.items() if not said and not path.endswith("/")]
    assert not silent, f"say in the README's tree what these are for: {silent}"


def test_the_tree_is_read_as_it_is_meant(tmp_path: Path) -> None:
    for name in ("a/b.py", "a/c/d.py", "a/data/x.json", "a/__pycache__/b.pyc", "a/.b.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    said = tree("<!-- source tree -->\n\n```text\na/\n  b.py   one\n  data/  all of it\n```\n")
    assert said == {"a/": "", "a/b.py": "one", "a/data/": "all of it"}
    assert missing(said, ("a",), tmp_path) == ["a/c/d.py"]
