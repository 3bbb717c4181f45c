"""The page in a browser, opened from disk: everything draws, nothing is requested, nothing is complained of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafit.report import write_report
from lorafit.report.palette import DARK, LIGHT, Palette

selenium = pytest.importorskip("selenium", reason="the browser tests need selenium")

from selenium.webdriver import Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium" if chromium is None else "chromedriver"
        pytest.skip(f"{missing} is not installed; on Debian: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


class Opened:
    """A report in the browser."""

    def __init__(self, browser: Chrome, report: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.browser = browser
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)  # what came before is not this page's
        browser.get(report.as_uri())
        WebDriverWait(browser, 20).until(lambda _: self.run(DRAWN))

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def requests(self) -> list[str]:
        messages = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[dict[str, Any]]:
        return self.browser.get_log("browser")


DRAWN = """
return [...document.querySelectorAll("[data-figure]")].every((frame) => frame.querySelector(".main-svg"))
"""
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
    browser: Chrome, request: pytest.FixtureRequest, path: Path, kind: str, figures: list[str], width: int
) -> None:
    report = write_report(request.getfixturevalue(kind).write(path), path.with_name("report.html"))
    opened = Opened(browser, report, width=width)
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
def test_the_shades_of_the_ranks(browser: Chrome, pruned: Any, path: Path, scheme: str, palette: Palette) -> None:
    opened = Opened(browser, write_report(pruned.write(path), path.with_name("report.html")), scheme=scheme, width=420)
    cells = opened.run(CELLS)
    assert len(cells) == 210
    most = max(cell["rank"] for cell in cells)
    for cell in cells:
        assert cell["shade"] == pytest.approx(cell["rank"] / most, abs=2e-3)
        assert cell["colour"] == rgb(palette.full)
        assert cell["width"] >= 24 and cell["height"] >= 24, "room for two digits"
    assert opened.run(LABEL) == {"scrolled": 150, "label": 0}, "the kinds stay where they are"
    assert opened.run(OVERFLOW) == 0


def test_the_colours_of_the_kinds(browser: Chrome, parted: Any, path: Path) -> None:
    report = write_report(parted.write(path), path.with_name("report.html"))
    for scheme, palette in (("light", LIGHT), ("dark", DARK)):
        opened = Opened(browser, report, scheme=scheme)
        fills, marks = opened.run(KINDS)
        assert fills == marks == [rgb(hue) for hue in palette.hues[:7]]
    assert opened.run("return document.querySelectorAll('[data-figure=anatomy] path.point').length") == 4 * 210
    assert opened.complaints() == []


def test_the_colours_follow_the_system(browser: Chrome, whole: Any, path: Path) -> None:
    report = write_report(whole.write(path), path.with_name("report.html"))
    for scheme, palette in (("light", LIGHT), ("dark", DARK)):
        opened = Opened(browser, report, scheme=scheme)
        expected = {"page": rgb(palette.paper), "held": rgb(palette.held), "rate": rgb(palette.train)}
        assert opened.run(COLOURS) == expected
    # The page is open in the dark; now the system changes.
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    WebDriverWait(browser, 10).until(lambda _: opened.run(COLOURS)["held"] == rgb(LIGHT.held))
    assert opened.complaints() == []


def test_paper_is_white_and_shows_what_is_folded(browser: Chrome, whole: Any, path: Path) -> None:
    report = write_report(whole.write(path), path.with_name("report.html"))
    opened = Opened(browser, report, scheme="dark")
    opened.run("window.dispatchEvent(new Event('beforeprint'))")
    assert opened.run(COLOURS)["held"] == rgb(LIGHT.held)
    assert opened.run("return document.querySelectorAll('details:not([open])').length") == 0
    opened.run("window.dispatchEvent(new Event('afterprint'))")
    WebDriverWait(browser, 10).until(lambda _: opened.run(COLOURS)["held"] == rgb(DARK.held))
    assert opened.run("return document.querySelectorAll('details[open]').length") == 0
    WebDriverWait(browser, 10).until(lambda _: all(abs(f["width"] - f["room"]) < 1.5 for f in opened.run(FIGURES)))
    assert opened.complaints() == []


def test_no_button_sends_the_data_anywhere(browser: Chrome, whole: Any, path: Path) -> None:
    report = write_report(whole.write(path), path.with_name("report.html"))
    opened = Opened(browser, report)
    opened.run(
        "for (const f of document.querySelectorAll('[data-figure]')) Plotly.react(f, f.data, f.layout, "
        "{ ...f._context, displayModeBar: true })"
    )
    buttons = opened.run("return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert set(buttons) == {"Download plot as a PNG", "Reset axes"}
    assert opened.run("return document.querySelectorAll('a[href]:not([href^=\"#\"])').length") == 0
