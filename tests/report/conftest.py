"""Made-up runs, as the recorder would have written them."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Record = dict[str, Any]

SAMPLES = [
    {
        "prompt": "How do I reverse a list in Python without changing the original?",
        "before": "You can use the `reverse()` method. The method is used to reverse the list. The list is reversed "
        "by the method.\n\nThe list is a list of the list of the list",
        "after": "Slice it with a negative step, which makes a new list:\n\nitems = [1, 2, 3]\nbackwards = items[::-1]"
        "\n\n`items` keeps its order. `reversed(items)` gives an iterator instead.",
        "gold": "Use a slice with a negative step:\n\nbackwards = items[::-1]\n\nThis makes a new list and leaves "
        "`items` as it was.",
    },
    {
        "prompt": "What does the `zip` function return in Python 3?",
        "before": "The zip function is a function that returns a zip file. It can be used to zip files.",
        "after": "An iterator of tuples.",
        "gold": "An iterator of tuples.",
    },
    {
        "prompt": "Write a function that counts how often each word occurs in a text.",
        "before": "def count_words(text):\n    words = text\n    return words\n\n"
        "def count_words(text):\n    words = text",
        "after": "from collections import Counter\n\n\ndef count_words(text: str) -> Counter[str]:\n"
        "    return Counter(text.lower().split())",
        "gold": "from collections import Counter\n\n\ndef count_words(text):\n    return Counter(text.split())",
    },
]


class Story:
    """Collects records and writes them as a file."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.clock = datetime(2026, 3, 14, 9, 26, 53, tzinfo=timezone.utc)
        self.elapsed = 0.0

    def tell(self, event: str, wait: float = 0.0, /, **fields: Any) -> Story:
        """Add one record, `wait` seconds after the last one."""
        self.clock += timedelta(seconds=wait)
        self.elapsed = 0.0 if event == "run" else self.elapsed + wait
        time = self.clock.isoformat().replace("+00:00", "Z")
        self.records.append({"event": event, "time": time, "elapsed": round(self.elapsed, 3), **fields})
        return self

    def write(self, path: Path) -> Path:
        """Write all records to `path`."""
        lines = (json.dumps(record) + "\n" for record in self.records)
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def begin(self, resumed_from_step: int = 0, **resolved: Any) -> Story:
        """The records at the beginning of a process."""
        command = "lorafit train --data python-qa.jsonl --method lora --r 16 --max-steps 240"
        self.tell("run", run="b1946ac9", command=command, resumed_from_step=resumed_from_step)
        self.tell("config", config=CONFIG, resolved=RESOLVED | resolved)
        self.tell("environment", 0.1, **ENVIRONMENT)
        return self.tell("data", 0.9, **DATA)

    def train(self, steps: Iterable[int], total: int, *, noise: random.Random, accuracy: bool = False) -> Story:
        """Logged steps, and an evaluation every 40 of them."""
        for step in steps:
            if step == 0:
                self.evaluate(0, accuracy)
                continue
            loss = _loss(step) + noise.gauss(0, 0.11)
            peak = 1.61e9 + 2.4e8 * (1 - math.exp(-step / 25))
            self.tell(
                "step",
                0.62,
                step=step,
                epoch=round(step / 75, 4),
                loss=round(loss, 5),
                learning_rate=2e-4 * min(step / 12, 0.5 * (1 + math.cos(math.pi * step / total))),
                grad_norm=round(0.55 + 1.6 * math.exp(-step / 30) + abs(noise.gauss(0, 0.09)), 4),
                tokens=4096,
                supervised_tokens=2711,
                tokens_per_second=round(2650 + noise.gauss(0, 70) - 900 * (step % 40 == 1), 1),
                peak_rss_bytes=int(peak),
                seconds=0.62,
            )
            if step % 40 == 0:
                self.evaluate(step, accuracy)
        return self

    def evaluate(self, step: int, accuracy: bool = False) -> Story:
        """One evaluation."""
        loss = round(_loss(step) + 0.07 + 3e-6 * step**2, 5)
        measured = {"accuracy": round(0.52 + 0.39 * (1 - math.exp(-step / 50)), 4)} if accuracy else {}
        return self.tell(
            "evaluation",
            3.1,
            step=step,
            loss=loss,
            perplexity=math.exp(loss),
            supervised_tokens=18230,
            seconds=3.1,
            **measured,
        )

    def sample(self, phase: str) -> Story:
        """The outputs of one phase."""
        for index, one in enumerate(SAMPLES):
            self.tell(
                "sample", 0.8, phase=phase, index=index, prompt=one["prompt"], output=one[phase], gold=one["gold"]
            )
        return self

    def finish(self, status: str = "done", steps: int = 240, **fields: Any) -> Story:
        """The end of a process."""
        losses = [record["loss"] for record in self.records if record["event"] == "evaluation"]
        known = {
            "status": status,
            "steps": steps,
            "seconds": round(self.elapsed, 3),
            "train_seconds": round(0.62 * steps, 3),
            "peak_rss_bytes": 1_851_000_000,
            "eval_loss_before": losses[0] if losses else None,
            "eval_loss_after": losses[-1] if len(losses) > 1 else None,
            "adapter": "runs/python-qa/adapter",
            "message": "The held-out loss was lowest at step 160 and has risen since.",
        }
        return self.tell("end", 0.2, **(known | fields))


def _loss(step: int) -> float:
    return 1.21 + 1.27 * math.exp(-step / 45)


CONFIG = {
    "model": "SmolLM2-135M-Instruct",
    "data": "python-qa.jsonl",
    "method": "lora",
    "r": 16,
    "alpha": None,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 12,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 240,
    "max_length": 512,
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "targets": "all-linear",
    "seed": 20260314,
    "output_dir": "runs/python-qa",
}
RESOLVED = {
    "model": "SmolLM2-135M-Instruct",
    "method": "LoRA",
    "r": 16,
    "alpha": 32,
    "scale": 2.0,
    "rslora": False,
    "dropout": 0.0,
    "learning_rate": 2e-4,
    "sites": 210,
    "trainable": 4_884_480,
    "total": 139_399_488,
    "share": 0.03503943,
    "train_steps": 240,
    "task": "causal language model",
}
ENVIRONMENT = {
    "lorafit": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "peft_layout": "0.21.2",
    "platform": "Linux-6.12-x86_64-with-glibc2.36",
    "device": "cpu",
    "dtype": "float32",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 25_276_063_744,
    "seed": 20260314,
}
DATA = {
    "source": "python-qa.jsonl",
    "format": "jsonl",
    "form": "alpaca",
    "train_records": 600,
    "eval_records": 64,
    "train_tokens": 152_318,
    "train_supervised_tokens": 100_911,
    "eval_supervised_tokens": 18_230,
    "longest": 1_892,
    "max_length": 512,
    "truncated": 14,
    "dropped": 0,
    "split": "10 % of the records, seed 20260314",
}


@pytest.fixture
def story() -> Callable[[], Story]:
    """Makes an empty story."""
    return Story


@pytest.fixture
def whole() -> Story:
    """A run from its beginning to its end."""
    noise = random.Random(5)
    told = Story().begin().sample("before").train(range(241), 240, noise=noise)
    told.tell("saved", 0.1, step=240, path="runs/python-qa/adapter")
    return told.sample("after").finish()


@pytest.fixture
def resumed() -> Story:
    """A run that was killed at step 133, resumed from 120 and interrupted at 180, with a loss that was not finite."""
    noise = random.Random(7)
    told = Story().begin().sample("before").train(range(134), 240, noise=noise, accuracy=True)
    told.begin(resumed_from_step=120).train(range(121, 181), 240, noise=noise, accuracy=True)
    for record in told.records:
        if record["event"] == "step" and record["step"] in (61, 62, 149):
            record.update(loss=None, nonfinite=["loss"])
    return told.finish("interrupted", 180, message="Interrupted. The same command goes on from step 180.")


ATTACK = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'><!--<script>"


@pytest.fixture
def hostile() -> Story:
    """A run whose every text tries to break out of the page, or cannot be shown as it is."""
    told = Story().begin(model=f"evil {ATTACK}", method=ATTACK, task="\"'><b>$style ${script} {braces}")
    told.records[1]["config"] = {ATTACK: [ATTACK, {"key": ATTACK}]}
    told.records[2]["platform"] = "javascript:alert(1)"
    told.records[3].update(source=ATTACK, truncated=1, dropped=3)
    told.train(range(6), 240, noise=random.Random(3))
    texts = [
        ATTACK,
        "\u202eright to left\u202c שלום \x00\x1b[31mred\x7f",
        "w" * 3000,
        "  \n\t ",
        "half \ud83d of a pair",
    ]
    for index, text in enumerate(texts):
        told.tell("sample", phase="before", index=index, prompt=text, output=text, gold=None)
        told.tell("sample", phase="after", index=index, prompt=text, output=text, gold=text)
    return told.finish("failed", 5, message=ATTACK, adapter=ATTACK)


KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip
PATHS = [f"model.layers.{layer}.{kind}" for layer in range(30) for kind in KINDS]


@pytest.fixture
def pruned() -> Story:
    """A run of AdaLoRA."""
    noise = random.Random(11)
    told = Story().begin(method="AdaLoRA")
    for step in range(0, 241, 40):
        told.train(range(max(step - 39, 0), step + 1), 240, noise=noise)
        ranks = {path: 0 if step == 0 else max(0, round(noise.gauss(6 - step / 120, 2))) for path in PATHS}
        told.tell("schedule", step=step, budget=1260 - 7 * step // 4, interval=10, ranks=ranks)
    return told.finish()


@pytest.fixture
def parted() -> Story:
    """A run of DoRA."""
    noise = random.Random(13)
    told = Story().begin(method="DoRA")
    for step in range(0, 241, 40):
        told.train(range(max(step - 39, 0), step + 1), 240, noise=noise)
        lengths = {path: 1e-8 + step * 3e-4 * abs(noise.gauss(1, 0.3)) for path in PATHS}
        angles = {path: step * 2e-5 * abs(noise.gauss(1, 0.4)) for path in PATHS}
        told.tell("anatomy", step=step, magnitude=lengths, direction=angles)
    return told.finish()


@pytest.fixture
def bare() -> Story:
    """A run that was killed before it trained."""
    return Story().tell("run", run="0", command="lorafit train", resumed_from_step=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the records of a test go."""
    return tmp_path / "records.jsonl"


# A browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A mouse, which a browser without a screen does not have.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)


DRAWN = """
return [...document.querySelectorAll("[data-figure]")].every((frame) => frame.querySelector(".main-svg"))
"""


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a screen; tests that need it are skipped where it is not installed."""
    pytest.importorskip("selenium", reason="the browser tests need selenium")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

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
    """A page in the browser."""

    def __init__(self, browser: Any, report: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.browser = browser
        self.prefer(scheme)
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)  # what came before is not this page's
        browser.get(report.as_uri())
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(browser, 20).until(lambda _: self.run(DRAWN))

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def prefer(self, scheme: str) -> None:
        """The system turns light or dark."""
        self.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )

    def requests(self) -> list[str]:
        messages = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[dict[str, Any]]:
        return self.browser.get_log("browser")


@pytest.fixture
def open_page(browser: Any) -> Callable[..., Opened]:
    """Opens an HTML file from disk once all of its figures are drawn; `width=` in pixels, `scheme=` light or dark."""
    return partial(Opened, browser)
