"""The clients of the load benchmark at a server of a tiny model: right answers, and nothing left behind."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import load

TOKENS = 12


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_clients_that_chat_leave_load_and_err_get_what_they_ought_to(tiny_dir, tmp_path):
    prepared = load.prepared(str(tiny_dir), str(tmp_path), adapters=8, tokens=TOKENS, threads=1)
    with load.server(tiny_dir, tmp_path, 1, "--max-waiting", "8", "--memory", "3MB") as (url, process):
        target = load.known(url, str(tmp_path), prepared, TOKENS)
        asyncio.run(load.hammered(target, load.Tally(), 24, 6.0, seed=1))  # what is made once
        load.settled(url)
        before = load.resident(process.pid)
        tally = load.Tally()
        asyncio.run(load.hammered(target, tally, 24, 12.0, seed=0))
        left = load.settled(url)
        after = load.resident(process.pid)
    assert tally.wrong == []
    assert {"stream", "answer", "several", "leave", "wrong", "load"} <= {*tally.done}, tally.done
    assert len(tally.whole) > 100
    assert left["lorafit_adapters"] == 8  # those that clients loaded are gone
    assert after - before < 40_000_000, f"{before:,} bytes, then {after:,}"
    assert process.returncode == 0
