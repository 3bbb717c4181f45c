"""A comparison ends with the same table, however often it is killed on the way, and its choices see no test record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest

from lorafit.cli.compare_screen import final_table
from lorafit.cli.main import main
from lorafit.errors import ConfigError
from lorafit.experiments.candidates import candidates
from lorafit.experiments.comparison import Comparison
from lorafit.experiments.parts import Parts
from lorafit.experiments.ranking import rank
from lorafit.experiments.ray_runner import Ray
from lorafit.experiments.runner import Runner
from lorafit.experiments.spending import Plan
from lorafit.experiments.trial import Kind, Measured, Result, Trial

SIZES = "--max-steps 6 --per-device-train-batch-size 4 --eval-split 8 --rates 3 --lora_r 4"


def words(llama: Path, sums: Path, folder: Path, extra: str) -> list[str]:
    names = ["--model", str(llama), "--data", str(sums), "--output-dir", str(folder)]
    return ["compare", *names, *SIZES.split(), *extra.split()]


def outcome(folder: Path) -> Any:
    """What of a comparison must not depend on kills: all but times and memory."""
    found = json.loads((folder / "comparison.json").read_text())
    clocks = {"seconds", "total_seconds", "peak_rss_bytes", "peak_device_bytes"}
    for one in found["candidates"]:
        one["search"] = [{key: value for key, value in each.items() if key not in clocks} for each in one["search"]]
        one["seeds"] = [{key: value for key, value in each.items() if key not in clocks} for each in one["seeds"]]
    places = [(one["name"], one["place"], one["tied"], one["score"], one["low"]) for one in found["ranking"]["places"]]
    return found["candidates"], places, found["budget"]


@pytest.fixture(scope="session")
def compared(llama, sums, place) -> Path:
    """A comparison of one method, undisturbed."""
    assert main(words(llama, sums, place / "compared", "--methods lora")) == 0
    return place / "compared"


def test_each_candidate_has_its_rate_and_three_seeds_on_all_test_records(compared):
    found = json.loads((compared / "comparison.json").read_text())
    lora, base = found["candidates"]
    assert (lora["name"], base["name"], base["kind"]) == ("lora", "base", "base")
    assert len(lora["search"]) == 3 and lora["rate"] == min(lora["search"], key=lambda one: one["validation"])["rate"]
    assert [one["seed"] for one in lora["seeds"]] == [43, 44, 45] and [one["steps"] for one in lora["seeds"]] == [6] * 3
    assert {len(one["losses"]) for one in lora["seeds"] + base["seeds"]} == {8} == {found["data"]["test_records"]}
    assert lora["seeds"][0]["losses"] != lora["seeds"][1]["losses"]
    assert found["data"]["train_tokens"] > 0 and found["environment"]["torch"]
    assert found["ranking"]["places"][0]["name"] == "lora"
    assert (compared / "comparison.html").is_file()


def test_no_question_is_in_two_parts_and_no_choice_sees_the_test_part(compared):
    parts = [
        {json.loads(line)["question"] for line in (compared / "data" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "validation", "test")
    ]
    assert [len(part) for part in parts] == [64, 8, 8] and len(set.union(*parts)) == 80
    for result in (compared / "trials").rglob("trial.json"):
        searched = result.parent.name == "seed-42" and result.parent.parent.name != "base"
        assert (json.loads(result.read_text())["measured"] is None) == searched


def test_the_same_command_again_runs_nothing(compared, llama, sums, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("trial.json")}
    assert main(words(llama, sums, compared, "--methods lora")) == 0
    assert before == {path: path.stat().st_mtime_ns for path in compared.rglob("trial.json")} and len(before) == 7
    assert "7 of 7" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused(compared, llama, sums, capsys):
    assert main([*words(llama, sums, compared, "--methods lora"), "--alpha", "3"]) == 1
    assert "another comparison" in capsys.readouterr().err


def test_a_candidate_that_diverges_is_shown_as_such(llama, sums, tmp_path, capsys):
    extra = "--methods lora --set lora.learning_rate=1e12 --warmup-steps 0"
    assert main(words(llama, sums, tmp_path / "wild", extra)) == 0
    wild = json.loads((tmp_path / "wild" / "comparison.json").read_text())["candidates"][0]
    assert "not finite" in wild["failed"] and wild["search"] == []
    assert "not finite" in capsys.readouterr().out


def kill(command: list[str], folder: Path, times: int, *, group: bool) -> None:
    """Starts a command and kills it so often, each time when there is one more trial begun than before."""
    for number in range(times):
        seen = len(list(folder.rglob("records.jsonl")))
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + 120
        while len(list(folder.rglob("records.jsonl"))) <= seen and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.3 * number)
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kills_change_nothing(compared, llama, sums, tmp_path, times):
    command = [sys.executable, "-m", "lorafit", *words(llama, sums, tmp_path / "killed", "--methods lora")]
    kill(command, tmp_path / "killed", times, group=False)
    assert not (tmp_path / "killed" / "comparison.html").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert outcome(tmp_path / "killed") == outcome(compared)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.parametrize("group", [False, True])
def test_five_kills_change_nothing(llama, sums, place, tmp_path, group):
    extra = "--methods lora,lora-drop,delta-lora --reference base,full --rates 4 --save-steps 1"
    whole = place / "whole"
    if not (whole / "comparison.html").exists():
        assert main(words(llama, sums, whole, extra)) == 0
    command = [sys.executable, "-m", "lorafit", *words(llama, sums, tmp_path / "killed", extra)]
    kill(command, tmp_path / "killed", 5, group=group)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("trial.json")}
    assert finished
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert outcome(tmp_path / "killed") == outcome(whole)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_saves_and_says_so(llama, sums, tmp_path):
    extra = "--methods lora --max-steps 4000 --save-steps 4000"
    command = [sys.executable, "-m", "lorafit", *words(llama, sums, tmp_path / "run", extra)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # it is ignored in the background
    )
    try:
        end = time.monotonic() + 60
        while not any('"event": "step"' in path.read_text() for path in (tmp_path / "run").rglob("records.jsonl")):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130 and b"saving" in said and b"Traceback" not in said
    assert list((tmp_path / "run" / "trials").rglob("checkpoint-*/complete.json"))


def test_settings_are_shared_as_far_as_a_method_has_them(llama, sums):
    layers = [("the test", {"r": 4, "alpha": 8, "vera": {"r": 7}, "lora-plus": {"ratio": 2.0}, "max_steps": 3})]
    said: list[str] = []
    made = candidates(layers, ["lora", "vera", "lora_plus", "intrinsic"], ["base"], said.append)
    options = {one.name: one.settings.method_options for one in made}
    assert options["lora"] == {"r": 4, "alpha": 8} and options["vera"] == {"r": 7}
    assert options["lora-plus"] == {"r": 4, "alpha": 8, "ratio": 2.0} and options["base"] == {}
    assert "vera has no alpha: it runs without" in said and any("intrinsic has no" in line for line in said)
    assert {one.settings.training["max_steps"] for one in made} == {3}
    assert [one.kind for one in made] == [Kind.ADAPTER] * 4 + [Kind.BASE]


@pytest.mark.parametrize(
    ("layer", "methods", "message"),
    [
        ({"dora": {"r": 4}}, ["lora"], "not compared"),
        ({"method": "lora"}, ["lora"], "decides method by itself"),
        ({"early_stopping": True}, ["lora"], "same number of steps"),
        ({"eval_strategy": "no"}, ["lora"], "validation"),
        ({"quantise": "int8"}, ["lora"], "quantised base"),
        ({"lora": {"seed": 7}}, ["lora"], "the same for all"),
        ({"lora": {"batch_size": 2}}, ["lora"], "the same for all"),
        ({"rr": 4}, ["lora"], "unknown setting"),
        ({}, ["lorra"], "unknown method"),
    ],
)
def test_what_cannot_be_compared_is_refused(layer, methods, message):
    with pytest.raises(ConfigError, match=message):
        candidates([("the test", layer)], methods, ["base", "full"], print)


def test_settings_without_a_part_in_it_are_named():
    said: list[str] = []
    candidates([("the test", {"samples": 3, "general": "none"})], ["lora"], ["base"], said.append)
    assert "general, samples: no part of a comparison, left out" in said


def test_a_folder_of_something_else_is_left_as_it_is(llama, sums, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text('{"method": "lora"}')  # as `lorafit train` leaves it
    assert main(words(llama, sums, folder, "--methods lora")) == 1
    (tmp_path / "file").write_text("")
    assert main(words(llama, sums, tmp_path / "file", "--methods lora")) == 1
    assert capsys.readouterr().err.count("holds something else") == 2
    assert [path.name for path in folder.iterdir()] == ["settings.json"]
    assert (folder / "settings.json").read_text() == '{"method": "lora"}'


def test_what_searches_is_missed_before_anything_is_read(llama, sums, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(words(llama, tmp_path / "none.jsonl", tmp_path / "run", "--methods lora")) == 1
    told = capsys.readouterr().err
    assert "needs the package optuna" in told and "lorafit[compare]" in told and "none.jsonl" not in told
    assert not (tmp_path / "run").exists()


def test_too_few_rates_or_seeds_are_wrong_usage(llama, sums, tmp_path):
    for extra in ("--rates 0 --budget 1h", "--seeds 2"):
        assert main(words(llama, sums, tmp_path / "run", extra)) == 2
    assert not (tmp_path / "run").exists()


@final
class Scripted(Runner):
    """Runs nothing: rates above the worst are killed, of others the highest is the best."""

    def __init__(self, folder: Path, worst: float = 5e-3) -> None:
        self.folder, self.worst = folder, worst

    def run(self, trials):
        for trial in trials:
            rate = trial.settings.training.get("learning_rate", 0.0)
            failed = "its process was killed 2 times (signal 9)" if rate > self.worst else None
            kept = None if failed or trial.measured is None else Measured((1.0 + rate,) * 9, (1,) * 9, None)
            folder = trial.folder(self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "records.jsonl").write_text('{"event": "data", "train_tokens": 77}\n{"event": "st\n')
            yield Result(
                trial.name, 6, 10, 5, 1.0, 2.0, None, 9, None if failed else 1 / rate if rate else 9.0, (), kept, failed
            )


def scripted(llama: Path, folder: Path, worst: float) -> Comparison:
    made = candidates([("the test", {"model": str(llama)})], ["lora"], ["base"], print)
    parts = Parts("train", "validation", "test", "sums", "text", 64, 8, 9, False, ())
    plan = Plan(None, 6, 24, 3, (43, 44, 45), ())
    runner = Scripted(folder, worst)
    comparison = Comparison(folder, made, parts, plan, {"lora": 2e-3}, runner, "", lambda *_: None)
    comparison.run()
    return comparison


def test_a_rate_whose_run_was_killed_is_left_out_and_named(llama, tmp_path):
    comparison = scripted(llama, tmp_path / "one", 5e-3)
    lora = comparison.standings[0]
    assert lora.failed is None and lora.rate == 2e-3 and len(lora.seeds) == 3
    assert comparison.notes() == ["lora failed at 0.00632 (its process was killed 2 times (signal 9))"]
    assert comparison.as_json()["data"]["train_tokens"] == 77  # although a kill cut off a line
    again = scripted(llama, tmp_path / "one", 1.0).standings[0]  # as if its folder were removed and there were room
    assert again.rate == 6.32e-3 and not again.failed


def test_what_a_run_costs_is_told_of_the_seeds_that_came_to_an_end(llama, tmp_path):
    comparison = scripted(llama, tmp_path / "one", 1.0)
    lora = comparison.standings[0]
    seed, result = lora.seeds[-1]
    lora.seeds[-1] = (seed, replace(result, measured=None, failed="diverged", total_seconds=99.0, trainable=0))
    _, rows, _ = final_table(comparison, rank([one.as_json() for one in comparison.standings]))
    [row] = [row for row in rows if row[1] == "lora"]
    assert row[-5:] == ["6", "2.0", "1.0", "", "5"]
    assert [row[0] for row in rows] == ["1", "2"]  # the base is better here, and nobody shares its place


def test_a_candidate_that_is_killed_at_each_rate_says_so(llama, tmp_path):
    lora = scripted(llama, tmp_path / "all", 0.0).standings[0]
    assert not lora.seeds and lora.failed is not None
    assert lora.failed.startswith("it failed at each of its rates: 0.000632 (its process was killed")


def test_records_that_no_model_read_are_told_of(llama, sums, tmp_path, capsys):
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    for row in rows[::10]:
        row["question"] += " " + 50 * "please " + str(row["answer"])
    for row in rows[1::10]:
        row["answer"] = 50 * "well, " + str(row["answer"])
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extra = "--methods lora --rates 1 --learning-rate 1e-2 --max-steps 1 --max-length 100"
    assert main(words(llama, path, tmp_path / "run", extra)) == 0
    said = capsys.readouterr().out
    unread = json.loads((tmp_path / "run" / "comparison.json").read_text())["data"]["unread"]
    assert len(unread) >= 2 and all(line in said for line in unread)
    assert any("are longer than max_length 100, and were cut" in line for line in unread)
    assert any("were left out: no answer is within max_length 100" in line for line in unread)


@pytest.mark.slow
def test_a_cluster_comes_to_the_same(settings, sums, tmp_path):
    ray = pytest.importorskip("ray")
    from lorafit.experiments.trial import run_trial

    trials = [Trial(f"lora/seed-{seed}", settings(seed=seed), measured=str(sums)) for seed in (0, 1)]
    try:
        runner = Ray(tmp_path / "there", None, print)
        there = {one.name: one for one in runner.run(trials)}
    finally:
        ray.shutdown()
    assert there["lora/seed-1"].measured == run_trial(trials[1], tmp_path / "here", print).measured
