"""Work in a thread of its own, of which nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorafit.serve.apart import apart

THREADS = """
import os, time
import torch
from lorafit.serve.apart import apart

def work():
    return torch.ones(2_000_000).add_(1).sum().item()  # enough for all threads

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = count()
apart(work)
end = time.monotonic() + 20
while count() > before and time.monotonic() < end:  # the system takes a moment to end a thread
    time.sleep(0.01)
after = count()
work()
print(before, after, count())
"""


def test_it_gives_what_the_work_gives():
    assert apart(lambda: threading.current_thread().name) == "lorafit-apart"


def test_it_raises_what_the_work_raises():
    with pytest.raises(KeyError, match="lost"):
        apart(lambda: {}["lost"])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_the_threads_that_helped_have_ended_with_it():
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    before, after, at_last = map(int, done.stdout.split())
    assert after == before
    assert at_last > after, "work in the main thread leaves helpers behind: else nothing is shown here"
