"""The page in a browser, opened from disk: everything draws, nothing is requested, nothing is complained of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.report import write_report
from lorafit.report.palette import DARK, LIGHT, Palette

pytest.importorskip("selenium", reason="the browser tests need selenium")
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.browser

FIGURES = """
const { figures } = JSON.parse(document.getElementById("figures").textContent);
return [...document.querySelectorAll("[data-figure]")].map((frame) => ({
  key: frame.dataset.figure,
  expected: figures[frame.dataset.figure].data.length,
  traces: frame.querySelectorAll(".scatterlayer .trace").length,
  ink: [...frame.querySelectorAll(".scatterlayer .trace")].every(
    (trace) => [...trace.querySelectorAll("path.js-line, path.point")].some((path) => path.getAttribute("d"))),
  width: frame.querySelector(".main-svg").getBoundingClientRect().width,
  room: frame.getBoundingClientRect().width,
}))
"""
KINDS = """
const frame = document.querySelector("[data-figure=anatomy]");
return [
  [...frame.querySelectorAll(".scatterlayer .trace")].map((t) => getComputedStyle(t.querySelector("path.point")).fill),
  [...frame.parentElement.querySelectorAll(".legend li")].map((item) => getComputedStyle(item, "::before").color),
]
"""
OVERFLOW = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
COLOURS = """
const stroke = (key) => getComputedStyle([...document.querySelectorAll(
  `[data-figure="${key}"] .scatterlayer path.js-line`)].pop()).stroke;
return { page: getComputedStyle(document.body).backgroundColor, held: stroke("loss"), rate: stroke("learning-rate") }
"""


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("whole", ["loss", "learning-rate", "gradient", "throughput", "memory"]),
        ("resumed", ["loss", "accuracy", "learning-rate", "gradient", "throughput", "memory"]),
        ("hostile", ["loss", "learning-rate", "gradient", "throughput", "memory"]),
        ("pruned", ["loss", "learning-rate", "gradient", "throughput", "memory", "ranks"]),
        ("parted", ["loss", "learning-rate", "gradient", "throughput", "memory", "anatomy"]),
        ("bare", []),
    ],
)
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_opens_from_disk(
    open_page: Any, request: pytest.FixtureRequest, path: Path, kind: str, figures: list[str], width: int
) -> None:
    report = write_report(request.getfixturevalue(kind).write(path), path.with_name("report.html"))
    opened = open_page(report, width=width)
    drawn = opened.run(FIGURES)
    assert [figure["key"] for figure in drawn] == figures
    for figure in drawn:
        assert figure["traces"] == figure["expected"] > 0, figure
        assert figure["ink"], figure
        assert figure["width"] == pytest.approx(figure["room"], abs=1.5), figure
    assert opened.run(OVERFLOW) == 0, "nothing sticks out sideways"
    assert opened.run("return window.pwned") is None
    # Longer than anything that is requested late.
    opened.browser.execute_async_script("setTimeout(arguments[0], 300)")
    requests = opened.requests()
    assert report.as_uri() in requests
    assert [address for address in requests if not address.startswith(("file:", "data:", "blob:"))] == []
    assert {address for address in requests if address.startswith("file:")} == {report.as_uri()}
    assert opened.complaints() == []


CELLS = """
const seen = (cell) => {
  const shade = getComputedStyle(cell, "::before");
  const { width, height } = cell.getBoundingClientRect();
  return { rank: Number(cell.textContent), shade: Number(shade.opacity), colour: shade.backgroundColor, width, height };
};
return [...document.querySelectorAll(".map .site")].map(seen)
"""
LABEL = """
const frame = document.querySelector(".map").parentElement;
frame.scrollLeft = 150;
return {
  scrolled: frame.scrollLeft,
  label: document.querySelector(".map tbody th").getBoundingClientRect().left - frame.getBoundingClientRect().left,
}
"""


@pytest.mark.parametrize(("scheme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_the_shades_of_the_ranks(open_page: Any, pruned: Any, path: Path, scheme: str, palette: Palette) -> None:
    opened = open_page(write_report(pruned.write(path), path.with_name("report.html")), scheme=scheme, width=420)
    cells = opened.run(CELLS)
    assert len(cells) == 210
    most = max(cell["rank"] for cell in cells)
    for cell in cells:
        assert cell["shade"] == pytest.approx(cell["rank"] / most, abs=2e-3)
        assert cell["colour"] == rgb(palette.full)
        assert cell["width"] >= 24 and cell["height"] >= 24, "room for two digits"
    assert opened.run(LABEL) == {"scrolled": 150, "label": 0}, "the kinds stay where they are"
    assert opened.run(OVERFLOW) == 0


def test_the_colours_of_the_kinds(open_page: Any, parted: Any, path: Path) -> None:
    report = write_report(parted.write(path), path.with_name("report.html"))
    for scheme, palette in (("light", LIGHT), ("dark", DARK)):
        opened = open_page(report, scheme=scheme)
        fills, marks = opened.run(KINDS)
        assert fills == marks == [rgb(hue) for hue in palette.hues[:7]]
    assert opened.run("return document.querySelectorAll('[data-figure=anatomy] path.point').length") == 4 * 210
    assert opened.complaints() == []


def test_the_colours_follow_the_system(open_page: Any, whole: Any, path: Path) -> None:
    report = write_report(whole.write(path), path.with_name("report.html"))
    for scheme, palette in (("light", LIGHT), ("dark", DARK)):
        opened = open_page(report, scheme=scheme)
        expected = {"page": rgb(palette.paper), "held": rgb(palette.held), "rate": rgb(palette.train)}
        assert opened.run(COLOURS) == expected
    # The page is open in the dark; now the system changes.
    opened.prefer("light")
    WebDriverWait(opened.browser, 10).until(lambda _: opened.run(COLOURS)["held"] == rgb(LIGHT.held))
    assert opened.complaints() == []


def test_paper_is_white_and_shows_what_is_folded(open_page: Any, whole: Any, path: Path) -> None:
    report = write_report(whole.write(path), path.with_name("report.html"))
    opened = open_page(report, scheme="dark")
    opened.run("window.dispatchEvent(new Event('beforeprint'))")
    assert opened.run(COLOURS)["held"] == rgb(LIGHT.held)
    assert opened.run("return document.querySelectorAll('details:not([open])').length") == 0
    opened.run("window.dispatchEvent(new Event('afterprint'))")
    WebDriverWait(opened.browser, 10).until(lambda _: opened.run(COLOURS)["held"] == rgb(DARK.held))
    assert opened.run("return document.querySelectorAll('details[open]').length") == 0
    WebDriverWait(opened.browser, 10).until(
        lambda _: all(abs(f["width"] - f["room"]) < 1.5 for f in opened.run(FIGURES))
    )
    assert opened.complaints() == []


def test_no_button_sends_the_data_anywhere(open_page: Any, whole: Any, path: Path) -> None:
    report = write_report(whole.write(path), path.with_name("report.html"))
    opened = open_page(report)
    opened.run(
        "for (const f of document.querySelectorAll('[data-figure]')) Plotly.react(f, f.data, f.layout, "
        "{ ...f._context, displayModeBar: true })"
    )
    buttons = opened.run("return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert set(buttons) == {"Zoom in", "Zoom out", "Reset axes", "Download plot as a PNG"}
    assert opened.run("return document.querySelectorAll('a[href]:not([href^=\"#\"])').length") == 0
