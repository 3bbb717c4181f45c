"""A trial is run once, in a process of its own, and goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from lorafit.errors import CheckpointError, ConfigError
from lorafit.experiments.runner import Local
from lorafit.experiments.trial import RESULT, Kind, Result, Trial, finished, run_trial


def quiet(line: str) -> None:
    """Nobody listens."""


def test_a_trial_is_measured_record_by_record_and_never_run_again(settings, sums, tmp_path):
    trial = Trial("lora/seed-0", settings(seed=0), measured=str(sums))
    result = run_trial(trial, tmp_path, quiet)
    assert result.failed is None and result.steps == 6 and result.trainable > 0 and result.adapter_bytes > 0
    assert len(result.measured.losses) == len(result.measured.counts) == 80 and result.measured.correct is None
    assert result.measured.mean < 5.5 and result.curve[-1] == (6, result.validation)
    assert result.tokens > 0 and 0 < result.seconds < result.total_seconds
    assert finished(trial, tmp_path) == result
    assert run_trial(trial, tmp_path / ".", lambda line: pytest.fail(line)) == result


def test_the_base_is_measured_and_nothing_is_trained(settings, sums, tmp_path):
    trial = Trial("base", settings(), measured=str(sums), kind=Kind.BASE)
    result = run_trial(trial, tmp_path, quiet)
    assert (result.steps, result.trainable, result.seconds, result.adapter_bytes) == (0, 0, 0.0, None)
    assert result.measured.mean == pytest.approx(math.log(258), rel=0.05)  # a random model over 258 tokens


def test_a_run_that_diverges_is_a_result(settings, sums, tmp_path):
    trial = Trial("lora/wild", settings(learning_rate=1e12, warmup_steps=0), measured=str(sums))
    result = run_trial(trial, tmp_path, quiet)
    assert "not finite" in result.failed and result.measured is None
    assert finished(trial, tmp_path) == result


def test_a_process_of_its_own_comes_to_the_same(settings, sums, tmp_path):
    trials = [Trial(f"lora/seed-{seed}", settings(seed=seed), measured=str(sums), forget=True) for seed in (0, 1)]
    told = []
    runner = Local(tmp_path / "there", told.append)
    there = list(runner.run(trials))
    assert [one.name for one in there] == ["lora/seed-0", "lora/seed-1"] == [line.split()[-1] for line in told]
    here = run_trial(trials[0], tmp_path / "here", quiet)
    assert here.measured == there[0].measured and here.curve == there[0].curve
    assert not list(trials[0].folder(tmp_path / "there").glob("checkpoint-*"))
    told.clear()
    assert list(runner.run(trials)) == there and told == []


def test_an_error_of_a_trial_is_the_runners(settings, tmp_path):
    with pytest.raises(ConfigError, match="no such model directory"):
        list(Local(tmp_path, quiet).run([Trial("one", settings(model="./nowhere"))]))


def test_a_damaged_result_is_named(settings, tmp_path):
    trial = Trial("one", settings())
    trial.folder(tmp_path).mkdir(parents=True)
    (trial.folder(tmp_path) / RESULT).write_text(json.dumps({"name": "one"}))
    with pytest.raises(CheckpointError, match="damaged"):
        finished(trial, tmp_path)


PARENT = """
import json, sys
from pathlib import Path
from lorafit.experiments.runner import Local
from lorafit.experiments.trial import Trial
from lorafit.training.config import Settings

if __name__ == "__main__":
    folder, settings, measured = sys.argv[1:]
    trial = Trial("one", Settings(**json.loads(settings)), measured)
    for result in Local(Path(folder), print).run([trial]):
        print(json.dumps(result.curve))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_trial_ends_with_its_killed_parent_and_goes_on_with_the_next(settings, sums, tmp_path):
    wanted = settings(max_steps=60, save_steps=5)
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(tmp_path / "killed"), json.dumps(wanted.model_dump()), str(sums)]
    folder = tmp_path / "killed" / "trials" / "one"
    for checkpoint in (10, 30):
        parent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait(lambda step=checkpoint: (folder / f"checkpoint-{step}" / "complete.json").is_file())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        at_death = (folder / "records.jsonl").stat().st_size
        time.sleep(1)
        later = (folder / "records.jsonl").stat().st_size
        time.sleep(1)
        assert (folder / "records.jsonl").stat().st_size == later, at_death
        assert not (folder / RESULT).exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [one["resumed_from_step"] > 0 for one in records if one["event"] == "run"] == [False, True, True]
    disturbed = Result.of(json.loads((folder / RESULT).read_text()))
    undisturbed = run_trial(Trial("one", wanted, str(sums)), tmp_path / "quiet", quiet)
    assert disturbed.measured == undisturbed.measured and disturbed.curve == undisturbed.curve
    assert (disturbed.steps, disturbed.tokens) == (undisturbed.steps, undisturbed.tokens)


def wait(until, seconds=60):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)
