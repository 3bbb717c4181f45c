"""Every example in a docstring is run; a module that cannot be imported fails here."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"


def _modules() -> list[str]:
    paths = sorted((SOURCE / "lorafit").rglob("*.py"))
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in paths]
    # Importing `__main__` runs the program.
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("name", _modules())
def test_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__name__ == name
    assert doctest.testmod(module).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    modules = map(importlib.import_module, ("lorafit", "lorafit.methods.lora", "lorafit.errors"))
    assert all(any(found.examples for found in finder.find(module)) for module in modules)
