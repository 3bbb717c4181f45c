"""`--quantise` on the command line: train, eval, chat and merge of an adapter over a base in fewer bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def over_int8(place: Path, command: list[str]) -> tuple[Path, Any]:
    """A finished run over int8 rows, and what its command wrote."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from lorafit.cli.main import main

    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([*command, "--quantise", "int8", "--output-dir", str(place / "over-int8")])
    assert status == 0, err.getvalue()
    return place / "over-int8", out.getvalue()


def test_train_says_what_it_holds(over_int8: tuple[Path, str]) -> None:
    said = over_int8[1].splitlines()
    line = next(line for line in said if line.startswith("base quantised to int8: "))
    assert " MB instead of " in line
    assert said[-1].startswith("held-out loss 5.") and "better by" in said[-1]


def test_eval_takes_the_runs_base_and_repeats_its_figures(
    lorafit: Callable[..., Any], over_int8: tuple[Path, str]
) -> None:
    folder = over_int8[0]
    told = json.loads((folder / "result.json").read_text())
    result = lorafit("eval", folder / "adapter", "--json")
    assert result.status == 0 and "over a base in int8, as in the run over-int8" in result.err
    assert "base quantised to int8: " in result.err
    scores = result.json["scores"]
    assert scores["base"]["loss"] == pytest.approx(told["eval_loss_before"], abs=1e-6)
    assert scores["adapter"]["loss"] == pytest.approx(told["eval_loss_after"], abs=1e-6)


def test_eval_over_the_plain_base(lorafit: Callable[..., Any], over_int8: tuple[Path, str], tmp_path: Path) -> None:
    folder = over_int8[0]
    told = json.loads((folder / "result.json").read_text())
    plain = lorafit("eval", folder / "adapter", "--quantise", "none", "--json")
    assert plain.status == 0 and "quantised" not in plain.err
    loss = plain.json["scores"]["adapter"]["loss"]
    assert loss != pytest.approx(told["eval_loss_after"], abs=1e-7)
    assert loss == pytest.approx(told["eval_loss_after"], abs=0.1)
    # An adapter that lies elsewhere knows nothing of its run: the plain base, unless the command says otherwise.
    shutil.copytree(folder / "adapter", tmp_path / "moved")
    base = ("--data", folder.parent / "sums.jsonl", "--eval-limit", 8, "--json")
    moved, packed = (lorafit("eval", tmp_path / "moved", *base, *more) for more in ((), ("--quantise", "int8")))
    assert moved.status == packed.status == 0, packed.err
    assert "base quantised" not in moved.err and "base quantised to int8" in packed.err


def test_chat(lorafit: Callable[..., Any], over_int8: tuple[Path, str]) -> None:
    options = ("--prompt", "what is 3 plus one?", "--max-new-tokens", 3)
    result = lorafit("chat", over_int8[0] / "adapter", *options)
    assert result.status == 0, result.err
    assert "base quantised to int8" in result.out and "adapter: " in result.out


def test_merge_is_into_the_plain_base_and_says_so(
    lorafit: Callable[..., Any], over_int8: tuple[Path, str], tmp_path: Path
) -> None:
    result = lorafit("merge", over_int8[0] / "adapter", "--output-dir", "merged")
    assert result.status == 0, result.err
    assert "trained over a base in int8" in result.out and "plain" in result.out
    assert lorafit("merge", over_int8[0] / "adapter", "--output-dir", "x", "--quantise", "int8").status == 2


def test_a_classifier(lorafit: Callable[..., Any], bert: Path, films: Path) -> None:
    options = "--eval-split 24 --max-steps 60 --r 4 --learning-rate 1e-2 --eval-strategy no --save-strategy no"
    trained = ("train", "--model", bert, "--data", films, "--output-dir", "out", "--quantise", "int8", "--json")
    result = lorafit(*trained, *options.split())
    assert result.status == 0, result.err
    assert "base quantised to int8: " in result.err and "new in this model" in result.err
    assert result.json["accuracy_after"] > 0.9
    again = lorafit("eval", "out/adapter", "--json")
    assert again.json["scores"]["adapter"]["loss"] == pytest.approx(result.json["eval_loss_after"], abs=1e-5)
    plans = [lorafit("plan", *trained[1:5], "--quantise", name, "--dry", "--json").json for name in ("none", "int8")]
    base = [plan["formula"]["parts"]["base weights"] for plan in plans]
    assert base[1] < base[0]


def test_a_config_file(lorafit: Callable[..., Any], command: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("quantize: int8\n")
    result = lorafit(*command, "--max-steps", 1, "--samples", 0, "--config", "run.yaml", "--output-dir", "out")
    assert result.status == 0, result.err
    assert "quantize is called quantise here" in result.out and "base quantised to int8" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--quantise", "int4"], ["'int4'", "nf4"]),
        (["train", "--load_in_8bit"], ["write quantise: int8"]),
        (["train", "--quantise", "nf4", "--compile"], ["cannot be compiled", "leave compile out"]),
        (["eval", "x", "--quantise", "int4"], ["no such way", "int8"]),
        (["chat", "x", "--quantise", "int4"], ["no such way", "int8"]),
    ],
    ids=lambda value: " ".join(value) if "--" in " ".join(value) else None,
)
def test_wrong_usage(lorafit: Callable[..., Any], arguments: list[str], words: list[str]) -> None:
    result = lorafit(*arguments)
    assert result.status == 2 and all(word in result.err for word in words), result.err


def test_the_package_that_is_not_there(
    lorafit: Callable[..., Any], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = lorafit(*command, "--quantise", "nf4", "--output-dir", "out")
    assert result.status == 1 and "pip install 'lorafit[quant]'" in result.err and "Traceback" not in result.err


def test_damaged_settings_of_the_run(lorafit: Callable[..., Any], over_int8: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(over_int8[0] / "adapter", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "settings.json").write_text("[")
    result = lorafit("chat", "run/adapter", "--prompt", "what is 3 plus one?", "--max-new-tokens", 1)
    assert result.status == 1 and "settings.json" in result.err and "--quantise none" in result.err
