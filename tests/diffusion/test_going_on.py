"""Runs that were stopped, cut off or killed go on to the bit, and what cannot be gone on from is named."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

from lorafit.exporting.diffusers import WEIGHTS
from tests.diffusion.tiny import adapter_of, events, same

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns a lot
Run = Callable[..., Any]


class StoppedError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3, "train_text_encoder": True},
        {"method": "adalora", "r": None, "init_r": 4, "target_r": 2, "interval": 1, "max_steps": 10},
        {"method": "lora-drop", "sample": 0.5, "threshold": 0.5},
        {"method": "delta-lora", "start": 1},
    ],
    ids=lambda options: str(options.get("method", "lora")),
)
def test_a_run_that_was_cut_off_goes_on_to_the_bit(
    train: Run, settings: Run, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    usual = {"class_prompt": "a disc", "num_class_images": 2, "lr_scheduler_type": "linear", **options}
    whole = train(settings(family, **usual, output_dir=str(tmp_path / "whole")))
    cut = settings(family, **usual, output_dir=str(tmp_path / "cut"))

    def stop(line: str) -> None:
        if line.startswith("step 3 of"):
            raise StoppedError

    with pytest.raises(StoppedError):
        train(cut, stop=stop)
    assert events(tmp_path / "cut", "end")[-1]["status"] == "failed"
    said: list[str] = []
    resumed = train(cut, said)
    assert "goes on from step 2" in said and resumed.resumed_from == 2
    assert same(adapter_of(whole), adapter_of(resumed))
    assert [one["loss"] for one in events(tmp_path / "whole", "evaluation")] == [
        one["loss"] for one in events(tmp_path / "cut", "evaluation")
    ]
    assert resumed.verdict == whole.verdict


def test_ctrl_c_saves_and_the_same_command_goes_on(train: Run, settings: Run, tmp_path: Path) -> None:
    whole = train(settings(output_dir=str(tmp_path / "whole")))
    cut = settings(output_dir=str(tmp_path / "cut"))

    def stop(line: str) -> None:
        if line.startswith("step 1 of"):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    stopped = train(cut, stop=stop)
    assert stopped.status == "interrupted" and stopped.steps == 1
    assert stopped.adapter == tmp_path / "cut" / "checkpoint-1" and (stopped.adapter / "complete.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before
    assert same(adapter_of(train(cut)), adapter_of(whole))


def test_a_checkpoint_that_was_cut_off_is_removed_and_named(train: Run, settings: Run, tmp_path: Path) -> None:
    given = settings()
    whole = adapter_of(train(given))
    folder = tmp_path / "run"
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "adapter")
    (folder / "checkpoint-4" / "complete.json").unlink()
    said: list[str] = []
    assert same(adapter_of(train(given, said)), whole)
    assert any("checkpoint-4 was cut off" in line for line in said) and "goes on from step 2" in said


@pytest.mark.parametrize("name", ["optimizer.pt", "progress.json", "unet/lorafit_state.safetensors"])
@pytest.mark.parametrize("way", ["absent", "damaged"])
def test_a_damaged_checkpoint_is_named(train: Run, settings: Run, tmp_path: Path, name: str, way: str) -> None:
    given = settings()
    train(given)
    folder = tmp_path / "run"
    (folder / "result.json").unlink()
    file = folder / "checkpoint-4" / name
    if way == "absent":
        file.unlink()
    else:
        file.write_bytes(b"\x80\x02no")
    with pytest.raises(lf.CheckpointError, match="checkpoint-4"):
        train(given)


def test_a_run_with_other_settings_or_pictures_is_refused(
    train: Run, settings: Run, subject: Path, tmp_path: Path
) -> None:
    train(settings())
    with pytest.raises(lf.ConfigError, match="max_steps was 4 and is 5"):
        train(settings(max_steps=5))
    (tmp_path / "run" / "result.json").unlink()
    assert train(settings(sample_count=2)).status == "done", "samples are free"
    (tmp_path / "run" / "result.json").unlink()
    Image.new("RGB", (20, 20), "blue").save(subject / "1.png")
    with pytest.raises(lf.ConfigError, match="pictures or captions"):
        train(settings())


KILLED = """
import sys
from rich.console import Console
from lorafit.diffusion import run
from lorafit.diffusion.settings import Settings

run.train(Settings.model_validate_json(sys.argv[1]), command="the test", notify=print, console=Console())
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_bit(train: Run, settings: Run, tmp_path: Path) -> None:
    options = {"max_steps": 40, "save_every": 1, "class_prompt": "a disc", "num_class_images": 3, "sample_every": 10}
    whole = train(settings(**options, output_dir=str(tmp_path / "whole")))
    cut = settings(**options, output_dir=str(tmp_path / "cut"))
    done = tmp_path / "cut" / "result.json"
    for attempt in range(40):
        if done.exists():
            break
        process = subprocess.Popen([sys.executable, "-c", KILLED, cut.model_dump_json()], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 600
        saved = {path.name for path in (tmp_path / "cut").glob("checkpoint-*")}
        while process.poll() is None and time.monotonic() < end:
            newer = {path.name for path in (tmp_path / "cut").glob("checkpoint-*")}
            if attempt < 4 and newer - saved:
                time.sleep(0.05 * attempt)
                break
            time.sleep(0.02)
        process.kill() if attempt < 4 else process.wait()
        process.wait()
    assert done.exists()
    assert same(adapter_of(whole), load_file(tmp_path / "cut" / "adapter" / WEIGHTS))
