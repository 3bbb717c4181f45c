"""What a run shows of its pictures and prompts, and what it refuses of them before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

from tests.diffusion import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns a lot
Run = Callable[..., Any]
LONG = "a disc that is longer than the text encoder reads"


def test_sample_prompts_that_are_cut_are_told(train: Run, settings: Run, tmp_path: Path) -> None:
    said: list[str] = []
    train(settings(sample_prompts=[LONG, "a disc"], max_steps=1), said)
    assert [line for line in said if "cut" in line] == [f"longer than the text encoder reads, and cut: {LONG!r}"]
    said.clear()
    none = str(tmp_path / "none")
    train(settings(sample_prompts=[LONG], sample_count=0, max_steps=1, output_dir=none), said)
    assert not any("cut" in line for line in said), "what is not drawn is not cut"


def test_pictures_that_are_held_out_are_not_trained_on(
    train: Run, settings: Run, subject: Path, tmp_path: Path
) -> None:
    with pytest.raises(lf.DataError, match=r"0\.png is 0\.png, 1\.png is 1\.png, 2\.png is 2\.png of "):
        train(settings(eval_images=str(subject)))
    held = tiny.discs(tmp_path / "held", 2, (30, 160, 40))
    Image.open(subject / "1.png").save(held / "other.webp", lossless=True)  # another file, the same pixels
    given = {"eval_images": str(held), "class_prompt": "a disc", "num_class_images": 2}
    with pytest.raises(lf.DataError, match=r"other\.webp is 1\.png of "):
        train(settings(**given))
    assert not list(tmp_path.rglob("drawn-*")), "told before anything is drawn"
    (held / "other.webp").unlink()
    assert train(settings(**given)).status == "done"


def test_what_a_transformer_has_no_places_for_is_refused_before_anything_is_drawn(
    train: Run, settings: Run, tmp_path: Path
) -> None:
    with pytest.raises(lf.ConfigError, match=r"at most 32[\s\S]*--resolution 32"):
        train(settings("sd3", resolution=40, class_prompt="a disc", num_class_images=2))
    assert not list(tmp_path.rglob("drawn-*"))
    assert train(settings("sd3", resolution=32, max_steps=1)).status == "done"
