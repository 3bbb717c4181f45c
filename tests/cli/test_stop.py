"""Ctrl-C on a real process: status 130, a checkpoint, and the same command finishes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.time() + 90
    while time.time() < deadline and process.poll() is None:
        if found():
            return
        time.sleep(0.02)
    raise AssertionError(f"it did not come to that (status {process.poll()})")


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "lorafit", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_saves_and_the_same_command_goes_on(
    lorafit: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    arguments = [*command, "--output-dir", "run", "--max-steps", "400", "--save-steps", "50", "--dropout", "0.1"]
    process = start(tmp_path, arguments)
    records = tmp_path / "run" / "records.jsonl"
    try:
        wait_for(lambda: records.exists() and records.read_text().count('"event": "step"') >= 20, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "lorafit train" in out.splitlines()[-1] and "goes on from there" in out
    saved = list((tmp_path / "run").glob("checkpoint-*"))
    assert saved and not (tmp_path / "run" / "adapter").exists()
    resumed = lorafit(*arguments, "--json")
    assert resumed.status == 0 and resumed.json["steps"] == 400
    assert f"goes on from step {max(int(path.name[11:]) for path in saved)}" in resumed.err


def test_ctrl_c_before_there_is_anything_to_save(command: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, [*command, "--output-dir", "run"])
    try:
        wait_for((tmp_path / "run" / "settings.json").exists, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
