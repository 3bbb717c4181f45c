"""Whose an experiment's folder is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.errors import CheckpointError, ConfigError, StateError
from lorafit.experiments.claim import alone, claim


def test_a_folder_is_anothers_as_long_as_nothing_is_trained_there(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    claim(folder, "asked.json", {"settings": {"data": "labeled.jsonl", "training": {"max_steps": 5}}})
    (folder / "data").mkdir()
    (folder / "data" / "parts.json").write_text("{}")
    mine = {"settings": {"data": "labelled.jsonl", "training": {"max_steps": 5}}}
    claim(folder, "asked.json", mine)
    assert json.loads((folder / "asked.json").read_text()) == mine
    assert not (folder / "data" / "parts.json").exists(), "other data are split anew"
    trial = folder / "trials" / "supervised" / "seed-0"
    trial.mkdir(parents=True)
    (trial / "settings.json").write_text("{}")
    claim(folder, "asked.json", mine)
    with pytest.raises(ConfigError, match="another experiment") as error:
        claim(folder, "asked.json", {"settings": {"data": "labelled.jsonl", "training": {"max_steps": 6}}})
    assert error.value.found == "max_steps was 5"


def test_what_is_no_experiment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        claim(tmp_path, "asked.json", {})
    with pytest.raises(ConfigError, match="holds something else"):
        claim(tmp_path / "thesis.txt", "asked.json", {})
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "asked.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"asked\.json is damaged"):
        claim(tmp_path, "asked.json", {})


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(StateError, match="another command is at work"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
