"""The pictures of the page: plotly draws them, a headless chromium takes them down."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.statistic import Spread, ratios
from benchmarks.stored import say
from benchmarks.variants import ALIKE, FLOOR, PEFT
from lorafit.report.palette import LIGHT

SIZE = (1000, 420)
NAMES = {"rank": "speed-rank.png", "sites": "speed-sites.png", "tokens": "speed-tokens.png"}
AXES = {"rank": "r", "sites": "sites", "tokens": "tokens"}
"""Picture → the key of a point that it is drawn against."""


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures of a sweep; none, with a word, where there is no chromium or plotly."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        say("no chromium here: the pictures stay as they are")
        return []
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, key in AXES.items():
        path = folder / NAMES[name]
        take(browser, figure(document["results"]["points"], key, name), path)
        made.append(path)
    return made


def along(points: Sequence[Mapping[str, Any]], key: str, hidden: int) -> list[Mapping[str, Any]]:
    """The points of one width that differ in one setting alone, in its order."""
    own = [point for point in points if point["point"]["hidden"] == hidden]
    if not own:
        return []
    centre = own[0]["point"]
    same = [one for one in own if all(value == centre[other] for other, value in one["point"].items() if other != key)]
    order = ("q, v", "attention", "mlp", "all")
    return sorted(same, key=lambda one: order.index(one["point"][key]) if key == "sites" else one["point"][key])


def predicted(point: Mapping[str, Any]) -> float:
    """LoRA's step by the floor's, if nothing but its floating-point operations were added to the floor."""
    floor = Spread.of(point["seconds"][FLOOR]).median
    return 1 + float(point["adapter_operations"] / point["gemm_rate"]) / floor


def figure(points: Sequence[Mapping[str, Any]], key: str, name: str) -> Any:
    """A panel for each width: ratios to the floor, ours drawn through, PEFT's dashed, the formula dotted."""
    from plotly.graph_objects import Figure, Scatter
    from plotly.subplots import make_subplots

    widths = list(dict.fromkeys(point["point"]["hidden"] for point in points))
    widths = [hidden for hidden in widths if len(along(points, key, hidden)) > 1]
    made: Figure = make_subplots(rows=1, cols=max(1, len(widths)), subplot_titles=[f"hidden size {h}" for h in widths])
    for column, hidden in enumerate(widths, 1):
        row = along(points, key, hidden)
        places = [str(one["point"][key]) for one in row]
        lines = [("LoRA by the formula", [predicted(one) for one in row], LIGHT.muted, "dot")]
        for number, method in enumerate(ALIKE):
            for label, dash in ((method, "solid"), (PEFT + method, "dash")):
                values = [Spread.of(ratios(one["seconds"], label, FLOOR)).median for one in row]
                lines.append((label, values, LIGHT.hues[number % len(LIGHT.hues)], dash))
        for label, values, colour, dash in lines:
            line = {"color": colour, "dash": dash, "width": 2}
            shown = Scatter(x=places, y=values, name=label, legendgroup=label, showlegend=column == 1, line=line)
            made.add_trace(shown, row=1, col=column)
        made.update_xaxes(title_text=name, type="category", row=1, col=column)
    made.update_yaxes(title_text="step / floor", row=1, col=1)
    made.update_layout(
        width=SIZE[0],
        height=SIZE[1],
        paper_bgcolor=LIGHT.paper,
        plot_bgcolor=LIGHT.card,
        font={"color": LIGHT.ink, "family": "DejaVu Sans, sans-serif", "size": 12},
        margin={"l": 60, "r": 10, "t": 40, "b": 50},
    )
    made.update_yaxes(gridcolor=LIGHT.grid, zerolinecolor=LIGHT.grid)
    made.update_xaxes(gridcolor=LIGHT.grid)
    return made


def framed(drawn: Any) -> Any:
    """A figure of the reports in a picture's size and colours, with its legend, which there is beside the figure."""
    drawn.update_layout(
        width=SIZE[0],
        height=SIZE[1],
        paper_bgcolor=LIGHT.paper,
        plot_bgcolor=LIGHT.card,
        font={"color": LIGHT.ink, "family": "DejaVu Sans, sans-serif", "size": 12},
        showlegend=len(drawn.data) > 1,
    )
    return drawn


def take(browser: str, drawn: Any, path: Path) -> None:
    """Takes down a figure as a picture."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        html = drawn.to_html(include_plotlyjs=True, full_html=True, config={"staticPlot": True})
        page.write_text(html.replace("<body>", '<body style="margin:0">'), encoding="utf-8")
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            "--virtual-time-budget=4000",
        ]
        subprocess.run(
            [browser, *flags, f"--screenshot={path}", page.as_uri()], check=True, capture_output=True, timeout=120
        )
