"""A tiny pipeline on the disk, pictures, and a way to run with them; skipped where diffusers is not installed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family → the directory of a pipeline, written once."""
    pytest.importorskip("diffusers", reason="pipelines need diffusers")
    from tests.diffusion.tiny import made

    place = tmp_path_factory.mktemp("pipelines")

    def written(name: str) -> Path:
        if not (place / name).exists():
            made(name).save_pretrained(place / name, safe_serialization=True)
        return place / name

    return written


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """Three pictures of a disc."""
    from tests.diffusion.tiny import discs

    return discs(tmp_path / "subject")


@pytest.fixture
def settings(pipelines: Callable[[str], Path], subject: Path, tmp_path: Path) -> Callable[..., Any]:
    """Settings of a run of four steps, with whatever differs."""
    from lorafit.diffusion.settings import resolve

    def settings(family: str = "sd", **different: Any) -> Any:
        usual: dict[str, Any] = {
            "pipeline": str(pipelines(family)),
            "instance_images": str(subject),
            "instance_prompt": "a sks disc",
            "output_dir": str(tmp_path / "run"),
            "resolution": 16,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "r": 2,
            "sample_every": 0,
            "sample_count": 1,
            "sample_steps": 2,
            "evaluate_every": 2,
            "evaluation_draws": 2,
            "save_every": 2,
            "seed": 3,
        }
        merged = {**usual, **different}
        return resolve([("the test", {key: value for key, value in merged.items() if value is not None})])

    return settings


@pytest.fixture
def train() -> Callable[..., Any]:
    """Runs with settings; what it says is appended to `said`, and `stop` is called with every line of the bar."""
    from rich.console import Console

    from lorafit.diffusion import run

    def train(settings: Any, said: list[str] | None = None, stop: Callable[[str], None] | None = None) -> Any:
        class Lines(Console):
            def print(self, *objects: Any, **options: Any) -> None:
                if stop is not None:
                    stop(" ".join(map(str, objects)))

        console = Lines(file=io.StringIO(), force_terminal=False)
        lines = [] if said is None else said
        return run.train(settings, command="the test", notify=lines.append, console=console)

    return train
