"""Writes the table of methods into README.md and docs/methods.md, between its two marks.

python scripts/tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from lorafit import files
from lorafit.cli.methods import default_shapes
from lorafit.methods.table import markdown

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/methods.md")
BEGIN, END = "<!-- methods -->", "<!-- end of methods -->"


def written(text: str) -> str:
    """The page with the table as it is now."""
    table = f"{BEGIN}\n\n{markdown(default_shapes())}\n\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for name in PAGES:
        page = ROOT / name
        files.write_text(page, written(page.read_text(encoding="utf-8")))
        print(f"{name}: written")
