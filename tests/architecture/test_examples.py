"""The examples run, and reach the figures that they and the README promise."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load() -> Load:
    """Imports an example by its path: the folder is no package."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'load("{path.stem}")' in text, f"{path.name} is not run by any test"


def test_plain_loop(load: Load) -> None:
    figures = load("plain_loop").main()
    assert figures["bars, base"] > 0.97
    assert figures["blobs, base"] < 0.5  # the base has not learnt the second task
    assert figures["blobs, adapted"] > 0.97
    assert figures["bars, adapter off"] > 0.97
    assert figures["blobs, merged"] > 0.97


def test_any_model(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    figures = load("any_model").main(folder)
    assert figures["0 to 4, base"] > 0.9
    assert figures["5 to 9, base"] < 0.5  # other digits under the same five outputs
    assert figures["5 to 9, adapted"] > 0.8
    assert figures["0 to 4, adapter off"] == figures["0 to 4, base"]  # statistics of the norms included
    printed = capsys.readouterr().out
    assert "trained in full" in printed and "cannot" not in printed
    assert "held-out loss before training" in printed and (folder / "adapter" / "adapter_config.json").is_file()
    again = load("any_model").main(folder)  # the loop is over: nothing is trained, the adapter is the one it ended with
    assert again == figures and "finished already" in capsys.readouterr().out


def test_transformers_trainer(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = map(float, load("transformers_trainer").main())
    assert before == pytest.approx(math.log(64), abs=0.1)  # random weights: nothing is known of 64 tokens
    assert after < before - 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"of the adapter loaded again {after:.3f}")


def test_minimal_in_short(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    figures = load("minimal").main(epochs=1)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["numbers trained"] == 2001
    assert figures["loss with LoRA, r = 1"] < figures["base loss on the shifted data"]
    assert figures["loss of the merged plain layer"] == pytest.approx(figures["loss with LoRA, r = 1"], rel=1e-5)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["here", "reference"]
    assert all(name in printed for name in figures)


@pytest.mark.slow
def test_minimal(load: Load) -> None:
    figures = load("minimal").main()
    assert figures["base loss"] <= 1e-3
    assert 900 <= figures["base loss on the shifted data"] <= 1100
    assert figures["numbers trained"] == 2001
    assert figures["loss with LoRA, r = 1"] <= 5e-3
    assert figures["largest |Δ - 1|"] <= 0.01
    assert figures["loss of the merged plain layer"] == pytest.approx(figures["loss with LoRA, r = 1"], rel=1e-6)
