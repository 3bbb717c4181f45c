"""The journal of a loop in two processes: one speaks and writes, all go on from the same checkpoint."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lorafit.report import read_records

WORK = Path(__file__).with_name("journal_work.py")


def two(folder: Path, stop: int) -> list[tuple[int, str, str]]:
    """Status, output and errors of both processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(WORK), str(folder), str(stop)],
            env={**os.environ, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [each.communicate(timeout=200) for each in running]
    return [(each.returncode, out, err) for each, (out, err) in zip(running, said, strict=True)]


def ended(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder.parent / f"process-{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_keep_one_journal_and_go_on_after_a_kill(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    for folder in (straight, broken):
        folder.parent.mkdir()
    done = two(straight, -1)
    assert [status for status, _, _ in done] == [0, 0], done[0][2][-2000:] + done[1][2][-2000:]
    assert "held-out loss before training" in done[0][1] and done[1][1] == ""
    killed = two(broken, 2)
    assert all(status != 0 for status, _, _ in killed)
    assert (broken / "checkpoint-6" / "random-1.pt").is_file()
    again = two(broken, -1)
    assert [status for status, _, _ in again] == [0, 0], again[0][2][-2000:] + again[1][2][-2000:]
    assert "goes on from step 6, after 2 rounds" in again[0][1]
    expected, found = ended(straight), ended(broken)
    for one in (*expected[1:], *found):
        assert one["losses"] == expected[0]["losses"]
        assert all(torch.equal(*pair) for pair in zip(one["parameters"], expected[0]["parameters"], strict=True))
    run = read_records(broken / "records.jsonl")
    assert len(run.processes) == 2 and run.resolved["processes"] == 2 and run.remarks == ()
