"""The page of a DreamBooth run: pictures before, during and after, losses of subject and class, and what is missing."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import ConfigError, DataError
from lorafit.report import read_records
from lorafit.report.dreambooth_page import Shown, lead, loss, write_dreambooth
from lorafit.report.pictures import WIDE, Picture, read_png, shown
from lorafit.report.summary import summarize

PROMPTS = ["a photo of sks <cat>", "a photo of a cat"]
CONFIG = {
    "pipeline": "tiny-emoji",
    "instance_images": "pictures/cat",
    "instance_prompt": PROMPTS[0],
    "class_prompt": PROMPTS[1],
    "eval_images": None,
    "method": "lora",
}


def png(path: Path, width: int = 8, height: int = 6, colour: tuple[int, int, int] = (200, 30, 60)) -> Path:
    """A PNG file of one colour, written by hand."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(colour) * width) * height
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + part(b"IDAT", zlib.compress(rows))
        + part(b"IEND", b"")
    )
    return path


@pytest.fixture
def drawn(story: Any, path: Path) -> Any:
    """A whole run with a sheet every 20 steps; its records and its pictures are written."""
    told = story().tell("run", run="1", command="lorafit dreambooth --pipeline tiny-emoji", resumed_from_step=0)
    resolved = {"model": "tiny-emoji", "method": "lora", "trainable": 1000, "total": 200_000, "train_steps": 60}
    told.tell("config", config=CONFIG, resolved=resolved)
    told.tell("data", instance_pictures=5, class_pictures=1, resolution=64)
    for step in range(61):
        if step:
            told.tell(
                "step",
                0.5,
                step=step,
                loss=0.3,
                instance_loss=0.2 - step / 1000,
                prior_loss=0.1,
                learning_rate=1e-4,
                grad_norm=0.3,
                peak_rss_bytes=2**30,
                seconds=0.5,
            )
        if step % 20 == 0:
            told.tell("evaluation", step=step, loss=0.2 - step / 1000, prior_loss=0.1 + step / 10_000, seconds=1.0)
            name = f"samples/step-{step:06}.png"
            png(path.parent / name, 40, 30, (step, 100, 100))
            told.tell("sheet", step=step, path=name, prompts=PROMPTS, seeds=[0, 1, 2], columns=3)
    told.tell("verdict", kind="converged", sentence="converged: the held-out loss went down", hints=["stop"], kept=60)
    told.tell("end", status="done", steps=60, eval_loss_before=0.2, eval_loss_after=0.14, adapter="run/adapter")
    told.write(path)
    return told


def pictures(page: str) -> list[tuple[str, bytes]]:
    """What each picture says of itself, and its bytes, in the order of the page."""
    found = re.findall(r'<img[^>]*src="data:image/png;base64,([^"]+)"[^>]*alt="([^"]*)"', page)
    return [(unescape(alt), base64.b64decode(data)) for data, alt in found]


def words(page: str) -> str:
    body = page[page.index("<main>") : page.index("</main>")]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_sheets_stand_in_the_order_of_the_training(drawn: Any, path: Path) -> None:
    page = write_dreambooth(path, path.with_name("report.html")).read_text(encoding="utf-8")
    found = pictures(page)
    # First and last side by side, and then those in between: each once.
    assert [re.search(r"step (\d+)", alt)[1] for alt, _ in found] == ["0", "60", "20", "40"]
    assert all(alt.endswith("3 in a row: a photo of sks <cat>; a photo of a cat") for alt, _ in found)
    assert found[0][1] == (path.parent / "samples/step-000000.png").read_bytes()
    assert "before training, step 0" in page and "after training, step 60" in page
    assert "sks &lt;cat&gt;" in page and "sks <cat>" not in page, "texts are texts"


def test_the_lead_says_what_was_learnt_and_what_was_kept(drawn: Any, path: Path) -> None:
    run = read_records(path)
    assert lead(run, summarize(run)) == (
        "tiny-emoji was trained on 5 pictures of a subject, beside 1 picture of its class, for 60 steps by lora, which "
        "adjusts 0.50 % as many numbers as the adapted parts have. On its pictures, under noise that training never "
        "draws, the loss fell from 0.2000 to 0.1400, by 30.0 %. On pictures of the class it rose from 0.1000 to "
        "0.1060, by 6.00 %. Verdict: converged: the held-out loss went down."
    )
    said = words(write_dreambooth(path, path.with_name("report.html")).read_text(encoding="utf-8"))
    assert "loss on the class 0.1000 → 0.1060" in said and "The adapter of step 60 was kept" in said
    assert run.remarks == (), "every event and every key is read"


def test_the_curves_are_of_subject_and_class(drawn: Any, path: Path) -> None:
    page = write_dreambooth(path, path.with_name("report.html")).read_text(encoding="utf-8")
    assert re.findall(r'data-figure="([^"]+)"', page) == ["loss", "prior", "learning-rate", "gradient", "memory"]
    said = words(page)
    assert "Loss on the subject" in said and "Loss on the class" in said
    assert "Training loss from 0.199 to 0.140." in page, "the loss on the subject, not the sum of both"


def test_without_a_prior_nothing_is_said_of_it(story: Any, path: Path) -> None:
    told = story().tell("run").tell("config", config={**CONFIG, "class_prompt": None}, resolved={})
    told.tell("step", step=1, loss=0.4, instance_loss=0.4, prior_loss=None).tell("evaluation", step=1, loss=0.4)
    page = write_dreambooth(told.write(path), path.with_name("report.html")).read_text(encoding="utf-8")
    assert re.findall(r'data-figure="([^"]+)"', page) == ["loss"]
    assert "of the class" not in words(page) and "The run drew no samples." in page


def test_pictures_of_subject_and_class_are_shown_small(drawn: Any, path: Path, tmp_path: Path) -> None:
    subject = [png(tmp_path / "cat" / f"{place}.png") for place in range(30)]
    prior = [png(tmp_path / "class" / f"{place}.png") for place in range(3)]
    read: list[Path] = []

    def thumbnail(each: Path) -> Picture:
        read.append(each)
        return read_png(each)

    made = write_dreambooth(path, path.with_name("report.html"), Shown(subject, prior, thumbnail=thumbnail))
    assert read == [*subject[:24], *prior]
    assert "and 6 more" in made.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content", [None, b"", b"\x89PNG\r\n\x1a\n0000IDAT", b"GIF89a" + bytes(30)], ids=["gone", "empty", "half", "gif"]
)
def test_a_picture_that_is_gone_or_damaged_is_said(drawn: Any, path: Path, content: bytes | None) -> None:
    broken = path.parent / "samples/step-000020.png"
    if content is None:
        broken.unlink()
    else:
        broken.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_png(broken)
    assert caught.value.fix is not None
    page = write_dreambooth(path, path.with_name("report.html")).read_text(encoding="utf-8")
    assert len(pictures(page)) == 3
    assert str(broken) in words(page) and "a picture of the report" in words(page)


def test_what_a_resume_did_not_reach_again_falls_away(story: Any, path: Path) -> None:
    told = story().tell("run", resumed_from_step=0)
    for step in (0, 10, 20, 30):
        told.tell("step", step=max(step, 1), loss=0.2)
        told.tell("sheet", step=step, path=f"samples/step-{step:06}.png", prompts=[], seeds=[0], columns=1)
    told.tell("run", resumed_from_step=15).tell("step", step=16, loss=0.2)
    told.tell("sheet", step=20, path="again.png", prompts=[], seeds=[0], columns=1)
    sheets = read_records(told.write(path)).sheets
    assert [(one.step, one.path) for one in sheets] == [
        (0, "samples/step-000000.png"),
        (10, "samples/step-000010.png"),
        (20, "again.png"),
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"step": 1}, "'path'"),
        ({"step": 1, "path": "a.png", "seeds": ["0"]}, "'seeds'"),
        ({"step": 1, "path": "a.png", "seeds": [-1]}, "'seeds'"),
        ({"step": 1, "path": "a.png", "prompts": [1]}, "'prompts'"),
    ],
    ids=str,
)
def test_damaged_records_of_sheets_are_refused(story: Any, path: Path, fields: dict[str, Any], said: str) -> None:
    told = story().tell("run").tell("sheet", **fields).write(path)
    with pytest.raises(DataError) as caught:
        read_records(told)
    assert said in str(caught.value) and f"{path}:2" in str(caught.value)


def test_the_records_are_not_written_over(drawn: Any, path: Path) -> None:
    with pytest.raises(ConfigError):
        write_dreambooth(path, path)


def test_small_pictures_are_enlarged_by_whole_numbers() -> None:
    for width, times in ((8, WIDE // 8), (200, 2), (241, 1), (2000, 1)):
        html = shown(Picture(b"x", "image/png", width, 10), "caption", "what is seen")
        assert f'width="{width * times}" height="{10 * times}"' in html
        assert ("enlarged" in html) == (times > 1)


def test_losses_of_noise_have_four_places() -> None:
    assert [loss(value) for value in (0.12344, 0.0, None)] == ["0.1234", "0.0000", "–"]


LOADED = "return [...document.images].map((image) => [image.complete, image.naturalWidth, image.alt.length > 0])"
OVERFLOW = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
SIDE = """
const [one, other] = [...document.querySelectorAll(".pictures .picture")].map((each) => each.getBoundingClientRect());
return one.top === other.top
"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_it_opens_in_a_browser(open_page: Any, drawn: Any, path: Path, tmp_path: Path, width: int, scheme: str) -> None:
    subject = [png(tmp_path / "cat" / f"{place}.png") for place in range(5)]
    opened = open_page(
        write_dreambooth(path, path.with_name("report.html"), Shown(subject)), width=width, scheme=scheme
    )
    assert opened.run(LOADED) == [[True, 40, True]] * 4 + [[True, 8, True]] * 5
    assert opened.run(SIDE) is (width == 1280)
    assert opened.run(OVERFLOW) == 0, "nothing sticks out sideways: the row of sheets scrolls in its frame"
    opened.browser.execute_async_script("setTimeout(arguments[0], 300)")
    requests = opened.requests()
    assert [address for address in requests if not address.startswith(("file:", "data:", "blob:"))] == []
    assert opened.complaints() == []
