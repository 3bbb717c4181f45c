"""The household as a table, from `METHODS`: what the command line prints and the documentation shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorafit.layers import Shape
from lorafit.methods import METHODS

COLUMNS = ("method", "trains", "numbers", "merges", "in PEFT", "in vLLM", "paper")


@dataclass(frozen=True)
class Row:
    """One method; `numbers` is what it trains at its defaults, for the layers asked about."""

    name: str
    trains: str
    numbers: int
    merges: str
    in_peft: str
    in_vllm: str
    paper: str

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `COLUMNS`."""
        return (self.name, self.trains, f"{self.numbers:,}", self.merges, self.in_peft, self.in_vllm, self.paper)


def rows(shapes: Iterable[Shape]) -> list[Row]:
    """Every method at its defaults on layers of these shapes."""
    layers = list(shapes)
    return [
        Row(name, kind.trains, kind().num_trainable(layers), kind.merges, kind.in_peft, kind.in_vllm, kind.paper)
        for name, kind in METHODS.items()
    ]


def markdown(shapes: Iterable[Shape]) -> str:
    """The table as the documentation has it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows(shapes))])
