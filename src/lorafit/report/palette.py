"""The colours of the page, once for a light and once for a dark surface.

The style sheet gets them as custom properties, the figures as plain values of the light palette, and the
page's script exchanges one for the other when the reader's system is dark. Text keeps a contrast of at least
4.5 to 1 on both surfaces (WCAG AA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final


@dataclass(frozen=True)
class Palette:
    """One set of colours, as six-digit hexadecimal values.

    Attributes:
        paper: the page.
        card: raised surfaces.
        ink: text.
        muted: labels and secondary text.
        rule: lines between things.
        grid: lines inside of plots.
        train: what was measured on training data.
        faint: raw values behind a smoothed curve.
        held: what was measured on held-out data.
        good: an improvement.
        bad: a failure.
        warn: something to look at.
        full: the highest value in a table of shades, with text on it; lower ones are mixed with what is behind.
        hues: as many kinds of things as can be told apart.
    """

    paper: str
    card: str
    ink: str
    muted: str
    rule: str
    grid: str
    train: str
    faint: str
    held: str
    good: str
    bad: str
    warn: str
    full: str
    hues: tuple[str, ...]

    def named(self) -> Mapping[str, str]:
        """Each colour by its name; hues are numbered."""
        colours: dict[str, str] = {name: value for name, value in asdict(self).items() if name != "hues"}
        return colours | {f"hue-{at}": hue for at, hue in enumerate(self.hues)}

    def css(self) -> str:
        """The colours as custom properties of a style sheet."""
        return " ".join(f"--{name}: {value};" for name, value in self.named().items())


LIGHT: Final = Palette(
    paper="#fafaf7",
    card="#ffffff",
    ink="#1b1c1f",
    muted="#5c5f66",
    rule="#dfdfd9",
    grid="#ecece7",
    train="#2c55c4",
    faint="#b3c2ea",
    held="#b8400a",
    good="#17693b",
    bad="#b3261e",
    warn="#8a5a00",
    full="#86a2f0",
    hues=("#2f5fd0", "#c2500c", "#0b7a6f", "#a3269f", "#8f7100", "#c0264d", "#0582bd", "#6a6f79"),
)

DARK: Final = Palette(
    paper="#121316",
    card="#1a1c20",
    ink="#ecebe7",
    muted="#a3a6ad",
    rule="#2f3238",
    grid="#26292e",
    train="#8fb0ff",
    faint="#3d4f7d",
    held="#ffa066",
    good="#7fd6a1",
    bad="#ff8f85",
    warn="#e9bd5b",
    full="#3f5cab",
    hues=("#82a8ff", "#ff9c5e", "#45cdbb", "#e58cef", "#dfc04a", "#ff7f9e", "#57c6f5", "#a9aeb8"),
)


def exchange() -> dict[str, str]:
    """Each colour of the light palette with its counterpart in the dark one."""
    return dict(zip(LIGHT.named().values(), DARK.named().values(), strict=True))
