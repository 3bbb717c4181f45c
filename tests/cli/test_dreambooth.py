"""`lorafit dreambooth` on a tiny pipeline: what it says and leaves, its report, going on, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit.report import read_records

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers; the command shows this library's own
Run = Callable[..., Any]
Learnt = tuple[Path, Any]


def test_it_says_what_it_came_to(learnt: Learnt) -> None:
    _, result = learnt
    lines = result.out.splitlines()
    assert re.fullmatch(
        r"loss on the subject [\d.]+ → [\d.]+ \(.*\); on the class [\d.]+ → [\d.]+ \(.*\)", lines[-1]
    ), lines[-1]
    assert lines[-2] == f"report:  {Path('learnt') / 'report.html'}"
    assert "try it:  lorafit draw --adapter learnt --scale 0,0.5,1" in lines
    assert any(line.startswith("6 steps in ") for line in lines)
    assert "Traceback" not in result.err


def test_it_leaves_adapter_samples_records_and_report(learnt: Learnt) -> None:
    folder, _ = learnt
    assert (folder / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [
        "step-000000.png",
        "step-000003.png",
        "step-000006.png",
    ]
    run = read_records(folder / "records.jsonl")
    assert [sheet.step for sheet in run.sheets] == [0, 3, 6]
    assert run.sheets[0].prompts == ("a sks disc", "a disc") and run.sheets[0].seeds == (0, 1)
    assert run.remarks == (), "the report reads every event and every key that a run records"
    assert [one.step for one in run.evaluations] == [0, 3, 6]
    assert all(one.prior_loss is not None for one in run.evaluations)
    assert len(run.steps) == 6 and all(step.instance_loss is not None for step in run.steps)


def test_the_report_shows_sheets_and_pictures(learnt: Learnt) -> None:
    page = (learnt[0] / "report.html").read_text(encoding="utf-8")
    said = re.findall(r'<img[^>]*alt="([^"]*)"', page)
    assert len(said) == 3 + 3 + 3, "sheets, the subject, the class"
    assert "“a sks disc”" in page and "before training, step 0" in page and "after training, step 6" in page
    assert "on 3 pictures of a subject, beside 3 pictures of its class and of 1 other prompt, for 6" in page


def test_the_same_command_answers_at_once(learning: list[str], learnt: Learnt, lorafit: Run) -> None:
    folder, _ = learnt
    before = (folder / "records.jsonl").read_bytes()
    again = lorafit(*learning, "--output-dir", folder, "--json")
    assert again.status == 0, again.err
    assert (folder / "records.jsonl").read_bytes() == before
    told = again.json
    assert told["status"] == "already done" and told["steps"] == 6
    assert Path(told["report"]) == folder / "report.html" and len(told["sheets"]) == 3
    assert told["eval_loss_after"] is not None


def test_without_plotly_the_numbers_are_told_all_the_same(
    learning: list[str], learnt: Learnt, lorafit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plotly", "plotly.offline", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    result = lorafit(*learning, "--output-dir", learnt[0])
    assert result.status == 0, result.err
    assert "no report: " in result.out and "report:  not written" in result.out
    assert result.out.splitlines()[-1].startswith("loss on the subject ")


def test_another_command_does_not_take_the_folder(learning: list[str], learnt: Learnt, lorafit: Run) -> None:
    other = lorafit(*learning, "--output-dir", learnt[0], "--seed", "7")
    assert other.status == 1 and "seed was 42 and is 7" in other.err


def test_settings_come_from_file_and_flags_and_neighbours(
    pipeline: Path, discs: Path, lorafit: Run, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"pretrained_model_name_or_path: {pipeline}\ninstance_data_dir: {discs}\ninstance_prompt: a sks disc\n"
        "max_train_steps: 9\nsample_count: 0\nevaluate_every: 0\ntargets: convolutions\n",
        encoding="utf-8",
    )
    flags = "--max-steps 1 --resolution 16 --method lora-plus --ratio 8 --snr_gamma 5 --no-flip --save-every 0"
    result = lorafit("dreambooth", "--config", "run.yaml", *flags.split(), "--r", "4", "--output-dir", "run")
    assert result.status == 0, result.err
    for spelt in ("pretrained_model_name_or_path", "instance_data_dir", "max_train_steps", "snr_gamma"):
        assert f"{spelt} is called " in result.out
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["max_steps"], settings["method"], settings["min_snr"]) == (1, "lora-plus", 5.0)
    assert settings["method_options"] == {"ratio": 8.0, "r": 4} and settings["flip"] is False
    assert settings["targets"] in ("convolutions", ["convolutions"])
    assert "on the class" not in result.out.splitlines()[-1]
    assert read_records(tmp_path / "run" / "records.jsonl").sheets == ()


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--max_stepz", "8"], 2, ["max_stepz", "max_steps"]),
        (["--crop", "middle"], 2, ["crop", "centre"]),
        (["--r", "0"], 2, ["r"]),
        (["--method", "lorra"], 2, ["lora"]),
        (["--text-encoder-learning-rate", "1e-3"], 2, ["--train-text-encoder"]),
        (["--instance-images", "nowhere"], 1, ["nowhere", "folder"]),
        (["--pipeline", "."], 1, ["model_index.json"]),
        (["--targets", "to_qq"], 1, ["to_q"]),
        (["--resolution", "12"], 1, ["resolution"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said(
    learning: list[str], lorafit: Run, tmp_path: Path, options: list[str], status: int, words: list[str]
) -> None:
    result = lorafit(*learning, "--output-dir", "run", *options)
    assert result.status == status, result.err
    assert all(word in result.err for word in words) and "fix:" in result.err, result.err
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("option", [("--r", "64"), ("--targets", "to_qq"), ("--rank-pattern", "nowhere=2")])
def test_what_cannot_be_is_said_before_the_class_is_drawn(
    learning: list[str], lorafit: Run, tmp_path: Path, option: tuple[str, str]
) -> None:
    result = lorafit(*learning, "--output-dir", "run", *option)
    assert result.status == 1 and "fix:" in result.err, result.err
    assert "draws" not in result.out and not list(tmp_path.rglob("drawn-*"))


@pytest.mark.parametrize("missing", ["--pipeline", "--instance-images", "--instance-prompt"])
def test_what_has_to_be_there_is_named(learning: list[str], lorafit: Run, missing: str) -> None:
    place = learning.index(missing)
    result = lorafit(*learning[:place], *learning[place + 2 :])
    assert result.status == 2 and missing in result.err


def test_pictures_of_a_class_need_a_prompt(learning: list[str], lorafit: Run) -> None:
    place = learning.index("--class-prompt")
    result = lorafit(*learning[:place], *learning[place + 2 :], "--class-images", "class")
    assert result.status == 2 and "--class-prompt" in result.err


def test_without_diffusers_the_install_line_is_told(
    learning: list[str], lorafit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = lorafit(*learning, "--output-dir", "run")
    assert result.status == 1 and "lorafit[diffusion]" in result.err


def test_help_names_what_it_takes(lorafit: Run) -> None:
    result = lorafit("dreambooth", "--help")
    assert result.status == 0
    for option in (
        *("--pipeline", "--instance-images", "--instance-prompt", "--class-prompt", "--class-images", "--targets"),
        *("--prior-loss-weight", "--keep-prompt", "--train-text-encoder", "--sample-prompt", "--min-snr"),
        "--gradient-checkpointing",
    ):
        assert option in result.out, option


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(learning: list[str], lorafit: Run, tmp_path: Path) -> None:
    from tests.cli.test_stop import start, wait_for

    arguments = [*learning, "--output-dir", "run", "--max-steps", "200", "--sample-every", "0", "--save-every", "50"]
    process = start(tmp_path, arguments)
    records = tmp_path / "run" / "records.jsonl"
    try:
        wait_for(lambda: records.exists() and records.read_text().count('"event": "step"') >= 10, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        raise AssertionError("Ctrl-C does not end it") from None
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "goes on from there" in out.splitlines()[-1]
    saved = [int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")]
    assert saved and not (tmp_path / "run" / "adapter").exists()
    resumed = lorafit(*arguments, "--json")
    assert resumed.status == 0, resumed.err
    assert resumed.json["steps"] == 200 and read_records(records).resumes == (max(saved),)
