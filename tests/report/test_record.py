"""The recorder: what it writes, what it refuses, and what a kill leaves behind."""

from __future__ import annotations

import enum
import json
import math
import os
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import lorafit
from lorafit.errors import TrainingError
from lorafit.report import read_records
from lorafit.training import record
from lorafit.training.record import Recorder, environment


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_each_call_appends_one_line(path: Path) -> None:
    recorder = Recorder(path)
    recorder.write("run", run="1", command="lorafit train", resumed_from_step=0)
    assert len(read(path)) == 1, "a record is on the disk when write returns"
    recorder.write("step", step=1, loss=2.5)
    first, second = read(path)
    assert first["event"] == "run"
    assert second.items() >= {"event": "step", "step": 1, "loss": 2.5}.items()
    assert 0 <= first["elapsed"] <= second["elapsed"]
    assert path.read_bytes().endswith(b"}\n")


def test_the_time_is_utc(path: Path) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    Recorder(path).write("run")
    told = read(path)[0]["time"]
    assert told.endswith("Z")
    assert before <= datetime.fromisoformat(told.replace("Z", "+00:00")) <= datetime.now(timezone.utc)


def test_a_second_recorder_goes_on_and_counts_anew(path: Path) -> None:
    Recorder(path).write("run", run="1")
    Recorder(path).write("run", run="2")
    assert [one["run"] for one in read(path)] == ["1", "2"]


def test_the_folder_is_created(tmp_path: Path) -> None:
    Recorder(tmp_path / "a" / "b" / "records.jsonl").write("run")
    assert (tmp_path / "a" / "b" / "records.jsonl").is_file()


def test_numbers_that_are_not_finite_become_null_and_are_listed(path: Path) -> None:
    Recorder(path).write("step", loss=math.nan, grad_norm=math.inf, seconds=1.5, parts={"a": [1.0, -math.inf]})
    told = read(path)[0]
    assert told["loss"] is told["grad_norm"] is None
    assert told["parts"] == {"a": [1.0, None]}
    assert told["nonfinite"] == ["loss", "grad_norm", "parts.a.1"]
    assert "nonfinite" not in _written(path, seconds=1.5)


def _written(path: Path, /, **fields: Any) -> dict[str, Any]:
    Recorder(path).write("step", **fields)
    return read(path)[-1]


class Choice(str, enum.Enum):
    COSINE = "cosine"


def test_values_are_json(path: Path) -> None:
    told = _written(
        path,
        text="Größe \u2028 日本",
        path=PurePosixPath("out/adapter"),
        several=("q_proj", "v_proj"),
        nothing=None,
        flag=True,
        choice=Choice.COSINE,
        nested={"a": {"b": (1, 2.5)}},
    )
    assert told["text"] == "Größe \u2028 日本"
    assert told["path"] == "out/adapter"
    assert told["several"] == ["q_proj", "v_proj"]
    assert told["nothing"] is None
    assert told["flag"] is True
    assert told["choice"] == "cosine"
    assert told["nested"] == {"a": {"b": [1, 2.5]}}
    assert "日本".encode() in path.read_bytes(), "text is UTF-8, not escapes"


def test_half_a_surrogate_pair_survives(path: Path) -> None:
    assert _written(path, text="bad \udc80 name")["text"] == "bad \udc80 name"


@pytest.mark.parametrize(
    ("value", "found"),
    [(object(), "builtins.object"), ({"a": {1, 2}}, "builtins.set"), ([1 + 2j], "builtins.complex")],
)
def test_other_values_are_refused_and_nothing_is_written(path: Path, value: object, found: str) -> None:
    with pytest.raises(TrainingError, match="holds a value that JSON cannot") as caught:
        Recorder(path).write("step", value=value)
    assert caught.value.found == found
    assert "value" in str(caught.value.where)
    assert not path.exists()


def test_a_tensor_is_refused(path: Path) -> None:
    import torch

    with pytest.raises(TrainingError, match=r"torch\.Tensor"):
        Recorder(path).write("step", loss=torch.tensor(1.0))


def test_a_mapping_with_other_keys_is_refused(path: Path) -> None:
    with pytest.raises(TrainingError, match="a key that is not text") as caught:
        Recorder(path).write("config", config={3: 4})
    assert caught.value.found == "3"


@pytest.mark.parametrize("key", ["time", "elapsed", "nonfinite", "repaired"])
def test_the_recorder_s_own_keys_are_refused(path: Path, key: str) -> None:
    with pytest.raises(TrainingError, match="sets by itself") as caught:
        Recorder(path).write("step", **{key: 1})
    assert caught.value.found == key


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file where the folder should be")
    with pytest.raises(TrainingError, match="could not be written") as caught:
        Recorder(tmp_path / "folder" / "records.jsonl").write("run")
    assert caught.value.where == tmp_path / "folder" / "records.jsonl"


def test_a_half_written_line_is_ended(path: Path) -> None:
    Recorder(path).write("run", run="1")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "step", "st')
    recorder = Recorder(path)
    recorder.write("run", run="2", resumed_from_step=3)
    recorder.write("step", step=4)
    lines = path.read_bytes().split(b"\n")
    assert lines[1] == b'{"event": "step", "st'
    assert json.loads(lines[2])["repaired"] is True
    assert "repaired" not in json.loads(lines[3])
    assert lines[4] == b""
    assert [step.step for step in read_records(path).steps] == [4]


def test_a_kill_leaves_a_file_that_can_be_read_and_continued(path: Path) -> None:
    loop = (
        "import sys; from lorafit.training.record import Recorder\n"
        "recorder = Recorder(sys.argv[1]); recorder.write('run', resumed_from_step=0)\n"
        "for step in range(1, 10**9): recorder.write('step', step=step, text='x' * 5000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", loop, str(path)]) as process:
        while not path.exists() or path.stat().st_size < 50_000:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    killed = read_records(path)
    assert killed.end is None
    assert len(killed.steps) >= 8
    last = killed.steps[-1].step
    recorder = Recorder(path)
    recorder.write("run", resumed_from_step=last)
    recorder.write("step", step=last + 1)
    assert read_records(path).steps[-1].step == last + 1


def test_importing_is_cheap() -> None:
    told = "import sys, lorafit.training.record; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout == "False\n"


def test_environment() -> None:
    import torch

    told = environment(torch.device("cpu"), torch.bfloat16, 7)
    assert list(told) == [
        "lorafit",
        "python",
        "torch",
        "transformers",
        "peft_layout",
        "platform",
        "device",
        "dtype",
        "cores",
        "threads",
        "memory_bytes",
        "seed",
    ]
    assert (told["device"], told["dtype"], told["seed"]) == ("cpu", "bfloat16", 7)
    assert told["torch"] == torch.__version__
    assert told["lorafit"] == lorafit.__version__
    assert told["threads"] == torch.get_num_threads()
    assert isinstance(told["cores"], int)
    assert 1 <= told["cores"] <= (os.cpu_count() or 1)
    assert isinstance(told["memory_bytes"], int)
    assert told["memory_bytes"] > 2**28
    assert environment("cuda:0", "float32")["seed"] is None


def test_a_missing_distribution_is_null() -> None:
    assert record._release("no-such-distribution-anywhere") is None


def test_environment_can_be_recorded(path: Path) -> None:
    Recorder(path).write("run", resumed_from_step=0)
    Recorder(path).write("environment", **environment("cpu", "float32", 1))
    assert read_records(path).environment["device"] == "cpu"
