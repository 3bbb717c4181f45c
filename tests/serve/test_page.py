"""The page in a browser: both models answer beside each other, and what a model writes stays text."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafit.report.palette import DARK, LIGHT, Palette
from lorafit.serve.requests import Asked, Finish, Piece
from tests.serve.http_fixtures import BASE, Said, Script, Server, Start, starter, until

pytest.importorskip("selenium", reason="the browser tests need selenium")
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

pytestmark = pytest.mark.browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
OVERFLOW = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
ANSWERS = """
return [...document.querySelectorAll(".sample")].map((card) => ({
  question: card.querySelector(".prompt .text").textContent,
  answers: [...card.querySelectorAll(".output")].map((output) => ({
    model: output.querySelector("h3").textContent,
    text: output.querySelector(".text").textContent,
    note: output.querySelector(".fine").textContent,
    busy: output.hasAttribute("aria-busy"),
    elements: output.querySelectorAll(".text *").length,
    left: Math.round(output.getBoundingClientRect().left),
  })),
}))
"""
HOSTILE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script> & <b>bold</b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed; on Debian: apt-get install chromium chromium-driver")
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
    """The page of a server in the browser."""

    def __init__(self, browser: Any, server: Server, *, width: int = 1100, scheme: str = "light") -> None:
        self.browser = browser
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(server.url)

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def at(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def ready(self) -> Opened:
        until(lambda: self.at("left").get_attribute("value"))
        return self

    def ask(self, text: str) -> None:
        self.at("question").send_keys(text, Keys.ENTER)

    def turns(self) -> Any:
        return self.run(ANSWERS)

    def answered(self, count: int = 1) -> Any:
        """All turns, once so many are complete."""

        def complete() -> bool:
            turns = self.turns()
            return len(turns) == count and not any(one["busy"] for turn in turns for one in turn["answers"])

        until(lambda: complete() and not self.at("stop").is_displayed())
        return self.turns()

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def requests(self) -> list[str]:
        messages = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def start(tiny: tuple[Any, Any], adapters: Path) -> Iterator[Start]:
    with starter(tiny[1], adapters) as start:
        yield start


@pytest.fixture
def open_page(browser: Any) -> Callable[..., Opened]:
    def open_page(server: Server, **settings: Any) -> Opened:
        return Opened(browser, server, **settings)

    return open_page


def test_both_answer_beside_each_other(start: Start, open_page: Any) -> None:
    server = start()
    page = open_page(server).ready()
    assert page.at("left").get_attribute("value") == BASE and page.at("right").get_attribute("value") == "dora"
    page.ask("Hello")
    [turn] = page.answered()
    assert turn["question"] == "Hello"
    left, right = turn["answers"]
    assert (left["model"], left["text"]) == (BASE, f"I am {BASE}.")
    assert (right["model"], right["text"]) == ("dora", "I am dora.")
    assert left["left"] < right["left"] and left["note"].startswith("4 tokens")
    assert page.at("question").get_attribute("value") == ""
    # Nothing is asked of anybody else, and nothing is complained of.
    assert {request.split("/", 3)[2] for request in page.requests() if request.startswith("http")} == {
        server.url.removeprefix("http://")
    }
    assert page.complaints() == []


def test_each_remembers_its_own_conversation(start: Start, open_page: Any) -> None:
    server = start()
    page = open_page(server).ready()
    Select(page.at("right")).select_by_value("lora")
    page.run("document.getElementById('settings').open = true")
    page.at("system").send_keys("Be short.")
    page.at("temperature").clear()
    page.at("temperature").send_keys("0.5")
    page.at("length").clear()
    page.at("length").send_keys("33")
    page.ask("one")
    page.answered(1)
    page.ask("two")
    page.answered(2)
    text = server.voices.of(None).tokenizer.decode
    second = {asked.adapter: asked for asked in server.engine.asked[2:]}
    for adapter, name in ((None, BASE), ("lora", "lora")):
        assert text(second[adapter].ids) == (
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
            f"<|im_start|>assistant\nI am {name}.<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
        )
        assert (second[adapter].sampling.temperature, second[adapter].sampling.max_tokens) == (0.5, 33)


def test_what_a_model_writes_stays_text(start: Start, open_page: Any) -> None:
    page = open_page(start(Script(lambda asked: HOSTILE))).ready()
    page.ask("<b>me</b>")
    [turn] = page.answered()
    assert turn["question"] == "<b>me</b>"
    for answer in turn["answers"]:
        assert answer["text"] == HOSTILE and answer["elements"] == 0
    assert page.run("return window.pwned") is None and page.complaints() == []


def test_answers_come_as_they_are_written_and_can_be_stopped(start: Start, open_page: Any) -> None:
    over = threading.Event()

    def says(asked: Asked) -> Said:
        yield "begun"
        while not over.wait(0.02):
            yield "."

    server = start(Script(says))
    page = open_page(server).ready()
    page.ask("Hello")
    until(lambda: all(one["text"].startswith("begun...") for one in page.turns()[0]["answers"]))
    assert page.turns()[0]["answers"][0]["busy"] and page.at("stop").is_displayed()
    assert not page.at("send").is_enabled()
    page.at("stop").click()
    [turn] = page.answered()
    assert {one["note"] for one in turn["answers"]} == {"stopped"}
    until(lambda: all(ticket.cancelled.is_set() for ticket in server.engine.tickets))
    over.set()
    assert page.at("send").is_enabled()


def test_the_keyboard(start: Start, open_page: Any) -> None:
    page = open_page(start()).ready()
    page.at("question").send_keys("one", Keys.SHIFT, Keys.ENTER)
    page.at("question").send_keys(Keys.NULL)
    page.at("question").send_keys("two", Keys.ENTER)
    [turn] = page.answered()
    assert turn["question"] == "one\ntwo"
    page.at("question").send_keys(Keys.ENTER)
    assert len(page.turns()) == 1, "nothing is nothing to ask"


def test_a_reload_keeps_the_conversation_and_reset_ends_it(start: Start, open_page: Any) -> None:
    page = open_page(start()).ready()
    Select(page.at("right")).select_by_value("vera")
    page.ask("Hello")
    before = page.answered()
    page.browser.refresh()
    page.ready()
    assert page.answered() == before
    assert page.at("right").get_attribute("value") == "vera"
    page.at("reset").click()
    assert page.turns() == [] and page.at("empty").is_displayed()
    page.browser.refresh()
    page.ready()
    assert page.turns() == []


def test_errors_are_said_where_they_belong(start: Start, open_page: Any) -> None:
    server = start(Script(lambda asked: [Piece("", 0, Finish.FAILED)] if asked.adapter else ["fine"]))
    page = open_page(server).ready()
    page.ask("Hello")
    [turn] = page.answered()
    left, right = turn["answers"]
    assert left["text"] == "fine" and "failed" in right["note"]
    page.ask("again")
    page.answered(2)
    asked = [one for one in server.engine.asked if one.adapter][-1]
    text = server.voices.of(None).tokenizer.decode(asked.ids)
    assert "Hello" not in text, "what failed is no part of the conversation"


def test_the_key_is_asked_for(start: Start, open_page: Any) -> None:
    server = start(key="right")
    page = open_page(server)
    until(lambda: page.at("keys").is_displayed())
    assert "API key" in page.at("trouble").text
    page.at("key").send_keys("right", Keys.ENTER)
    page.ready()
    assert not page.at("trouble").is_displayed()
    page.ask("Hello")
    assert page.answered()[0]["answers"][0]["text"] == f"I am {BASE}."


def test_without_a_template_every_question_stands_alone(start: Start, open_page: Any) -> None:
    server = start()
    tokenizer = server.voices.of(None).tokenizer
    tokenizer.chat_template, before = None, tokenizer.chat_template
    try:
        page = open_page(server).ready()
        Select(page.at("right")).select_by_value("")
        page.ask("one")
        page.answered(1)
        page.ask("two")
        turns = page.answered(2)
        assert "no chat template" in turns[1]["answers"][0]["note"]
        assert tokenizer.decode(server.engine.asked[-1].ids) == "two\n"
        assert len(turns[1]["answers"]) == 1
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(start: Start, open_page: Any, width: int) -> None:
    page = open_page(start(Script(lambda asked: ["word " * 50, "x" * 300])), width=width).ready()
    page.ask("y" * 200)
    [turn] = page.answered()
    assert page.run(OVERFLOW) == 0
    lefts = {one["left"] for one in turn["answers"]}
    assert len(lefts) == (1 if width == 360 else 2), "below each other where it is narrow"
    page.run("document.getElementById('settings').open = true")
    assert page.run(OVERFLOW) == 0


@pytest.mark.parametrize(("scheme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_the_colours_are_those_of_the_reports(start: Start, open_page: Any, scheme: str, palette: Palette) -> None:
    page = open_page(start(), scheme=scheme).ready()
    colour = page.run("return getComputedStyle(document.body).backgroundColor")
    assert colour == f"rgb({', '.join(str(int(palette.paper[at : at + 2], 16)) for at in (1, 3, 5))})"


def test_everything_has_a_name(start: Start, open_page: Any) -> None:
    page = open_page(start()).ready()
    page.run("document.getElementById('settings').open = true; document.getElementById('keys').hidden = false")
    for element in page.browser.find_elements(By.CSS_SELECTOR, "button, input, select, textarea"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("id")
