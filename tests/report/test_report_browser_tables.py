"""Every page in a browser: tables that sort, figures that zoom, colours, narrow screens and paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.report import write_report
from lorafit.report.document import Document, Section, table, write_document
from lorafit.report.figures import Plot, blank
from lorafit.report.palette import DARK, LIGHT

pytest.importorskip("selenium", reason="the browser tests need selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.browser

HEADER = ["site", "loss", "share", "kept", "many words"]
ROWS: list[list[Any]] = [
    ["layers.10.q", "9.5", "100 %", ("yes", 1), "b"],
    ["layers.2.q", "1,200", "5.2 %", ("no", 0), "a"],
    ["layers.1.q", "1e-3", "–", ("never", None), ""],
    ["layers.3.q", "\N{MINUS SIGN}10", "\N{MINUS SIGN}0.1 %", ("perhaps", 0.5), "a much longer cell " * 6],
]
ASCENDING = {
    "site": ["layers.1.q", "layers.2.q", "layers.3.q", "layers.10.q"],
    "loss": ["layers.3.q", "layers.1.q", "layers.10.q", "layers.2.q"],
    "share": ["layers.3.q", "layers.2.q", "layers.10.q", "layers.1.q"],
    "kept": ["layers.2.q", "layers.3.q", "layers.10.q", "layers.1.q"],
}
GAPS = ("share", "kept")

FIRST = "return [...document.querySelectorAll('[data-sortable] tbody td:first-child')].map((cell) => cell.textContent)"
SORTS = "return [...document.querySelectorAll('[data-sortable] th')].map((head) => head.getAttribute('aria-sort'))"
OVERFLOW = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
RANGES = "const { xaxis, yaxis } = document.querySelector('.plot')._fullLayout; return [...xaxis.range, ...yaxis.range]"
CONTRASTS = """
const channel = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parts(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const low = [];
const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.getClientRects().length) continue;
  if (element.closest(".modebar, style, script")) continue;
  const style = getComputedStyle(element);
  const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [a, b] = [luminance(parts(ink)), luminance(behind(element))].sort((x, y) => y - x);
  seen += 1;
  if ((a + 0.05) / (b + 0.05) < 4.5) low.push([walker.currentNode.textContent, ink, (a + 0.05) / (b + 0.05)]);
}
return [seen, low];
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    figure = blank(320)
    figure.add_scatter(x=[0, 1, 2, 3], y=[4, 1, 3, 2], name="one", meta="train", line={"color": LIGHT.train})
    figure.update_layout(xaxis={"range": [0, 3]}, yaxis={"range": [0, 5]})
    plot = Plot("line", "A line", "It falls and rises.", (), figure)
    facts = [("records", "600"), ("a long label of a tile", "runs/some/folder/with/a/path/that-never-ends/" * 2)]
    sections = [
        Section("Table", table(HEADER, ROWS, caption="What was found"), (), "Fine print."),
        Section("Figure", "", [plot]),
    ]
    return write_document(Document("A page", "In plain words.", facts, sections, "numbers.json"), tmp_path / "a.html")


def head_of(opened: Any, name: str) -> Any:
    return next(
        button for button in opened.browser.find_elements(By.CSS_SELECTOR, "[data-sortable] th button")
        if button.text == name
    )  # fmt: skip


@pytest.mark.parametrize("name", ASCENDING)
def test_a_click_sorts_by_what_cells_are_worth(open_page: Any, page: Path, name: str) -> None:
    opened = open_page(page)
    button, at = head_of(opened, name), HEADER.index(name)
    assert opened.run(SORTS) == [None] * 5
    button.click()
    assert opened.run(FIRST) == ASCENDING[name]
    assert opened.run(SORTS)[at] == "ascending"
    button.click()
    known = len(ROWS) - (name in GAPS)
    assert opened.run(FIRST) == ASCENDING[name][:known][::-1] + ASCENDING[name][known:], "gaps stay at the end"
    assert opened.run(SORTS)[at] == "descending"
    head_of(opened, "many words").click()
    assert opened.run(SORTS) == [None] * 4 + ["ascending"]
    assert opened.run(FIRST)[-1] == "layers.1.q"
    assert opened.complaints() == []


def test_the_keyboard_sorts_too(open_page: Any, page: Path) -> None:
    opened = open_page(page)
    body = opened.browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)  # the table's frame, which scrolls
    for key in (Keys.ENTER, Keys.SPACE):
        ActionChains(opened.browser).send_keys(Keys.TAB).send_keys(key).perform()
    assert opened.run(SORTS) == [None, "ascending", None, None, None]
    assert opened.run(FIRST) == ASCENDING["loss"]


def test_the_tables_of_a_run_sort(open_page: Any, whole: Any, path: Path) -> None:
    opened = open_page(write_report(whole.write(path), path.with_name("report.html")))
    opened.run("document.querySelector('details').open = true")
    head_of(opened, "loss").click()
    losses = opened.run(
        "return [...document.querySelectorAll('[data-sortable] tbody td:nth-child(2)')].map((one) => +one.textContent)"
    )
    assert losses == sorted(losses) and len(losses) > 4


def test_a_drag_zooms_and_a_double_click_goes_back(open_page: Any, page: Path) -> None:
    opened = open_page(page)
    before = opened.run(RANGES)
    plot = opened.browser.find_element(By.CSS_SELECTOR, ".plot .nsewdrag")
    opened.run("document.querySelector('.plot').scrollIntoView({ block: 'center' })")
    drag = ActionChains(opened.browser).move_to_element_with_offset(plot, -100, -50).click_and_hold()
    drag.move_by_offset(120, 90).move_by_offset(60, 20).release().perform()
    WebDriverWait(opened.browser, 10).until(lambda _: opened.run(RANGES) != before)
    low, high, bottom, top = opened.run(RANGES)
    assert 0 < low < high < 3 and 0 < bottom < top < 5
    opened.browser.execute_async_script("setTimeout(arguments[0], 400)")  # or else it would be a triple click
    ActionChains(opened.browser).move_to_element(plot).double_click().perform()
    WebDriverWait(opened.browser, 10).until(lambda _: opened.run(RANGES) == before)
    assert opened.complaints() == []


def test_buttons_of_a_figure_show_where_the_keyboard_is(open_page: Any, page: Path) -> None:
    opened = open_page(page)
    shown = "return Number(getComputedStyle(document.querySelector('.modebar-group')).opacity)"
    ActionChains(opened.browser).move_to_element(opened.browser.find_element(By.TAG_NAME, "h1")).perform()
    WebDriverWait(opened.browser, 5).until(lambda _: opened.run(shown) == 0)
    opened.run("document.querySelector('.modebar-btn').focus()")
    WebDriverWait(opened.browser, 5).until(lambda _: opened.run(shown) == 1)
    before = opened.run(RANGES)
    ActionChains(opened.browser).send_keys(Keys.ENTER).perform()
    WebDriverWait(opened.browser, 5).until(lambda _: opened.run(RANGES)[1] - opened.run(RANGES)[0] < before[1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page: Any, page: Path, pruned: Any, path: Path, scheme: str) -> None:
    for one in (page, write_report(pruned.write(path), path.with_name("report.html"))):
        seen, low = open_page(one, scheme=scheme).run(CONTRASTS)
        assert seen > 20 and low == []


def test_a_page_that_is_open_follows_the_system(open_page: Any, page: Path) -> None:
    opened = open_page(page)
    colours = (
        "const style = getComputedStyle; return [style(document.body).backgroundColor, style(document.body).color, "
        "style(document.querySelector('.scatterlayer path.js-line')).stroke]"
    )
    expected = {
        scheme: [
            f"rgb({', '.join(str(int(c[at : at + 2], 16)) for at in (1, 3, 5))})"
            for c in (one.paper, one.ink, one.train)
        ]
        for scheme, one in (("light", LIGHT), ("dark", DARK))
    }
    for scheme in ("light", "dark", "light"):
        opened.prefer(scheme)
        WebDriverWait(opened.browser, 10).until(lambda _, one=scheme: opened.run(colours) == expected[one])


@pytest.mark.parametrize("kind", ["page", "whole", "parted", "pruned", "hostile"])
def test_a_narrow_phone_has_no_sideways_scroll(
    open_page: Any, request: pytest.FixtureRequest, path: Path, kind: str
) -> None:
    given = request.getfixturevalue(kind)
    made = given if isinstance(given, Path) else write_report(given.write(path), path.with_name("report.html"))
    opened = open_page(made, width=360)
    opened.run("for (const part of document.querySelectorAll('details')) part.open = true")
    assert opened.run(OVERFLOW) == 0
    wide = opened.run("return [...document.querySelectorAll('.wide')].map((e) => [e.clientWidth, e.tabIndex])")
    assert all(width <= 360 and focus == 0 for width, focus in wide), "wide tables scroll in frames, by keyboard too"
    assert [address for address in opened.requests() if not address.startswith(("file:", "data:", "blob:"))] == []
    assert opened.complaints() == []


def test_paper(open_page: Any, page: Path) -> None:
    opened = open_page(page, scheme="dark")
    opened.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    arrow = "return getComputedStyle(document.querySelector('[data-sortable] button'), '::after').display"
    assert opened.run(arrow) == "none"
    assert opened.run("return getComputedStyle(document.body).color") == "rgb(27, 28, 31)"
    opened.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
