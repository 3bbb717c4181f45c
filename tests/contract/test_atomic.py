"""Saving over an adapter: a kill, a full disk or a broken target leaves the old one or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafit as lf
from lorafit import files, store
from lorafit.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

LAUNCHER = """
import os, sys, torch
import lorafit as lf
torch.set_num_threads(1)
handles = []
for r in (4, 8):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    handle = lf.attach(model, lf.LoRA(r=r, alpha=3 * r))
    for parameter in handle.parameters():
        torch.nn.init.constant_(parameter, r)
    handles.append(handle)
for _ in sys.stdin:  # a line asks for a writer; forking saves importing torch for each
    pid = os.fork()
    while pid == 0:
        for handle in handles:
            handle.save(sys.argv[1])
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def adapter(r: int) -> lf.Handle:
    handle = lf.attach(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), lf.LoRA(r=r, alpha=3 * r))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.fill_(r)
    return handle


def which(folder: Path) -> int:
    """The rank of the adapter in the folder, after checking that all of it is of that rank."""
    handle = lf.load(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), folder)
    r = handle.method.r
    assert r in (4, 8) and handle.method.alpha == 3 * r
    for path in handle.sites:
        one = handle.adapter(path)
        assert one.A.shape == (r, 64) and one.B.shape == (64, r) and one.scale == 3
        assert one.A.eq(r).all() and one.B.eq(r).all()
    return r


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_writer_killed_at_any_moment_leaves_one_of_the_two(tmp_path):
    chance, seen, kills = random.Random(0), set(), 24
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LAUNCHER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        for _ in range(kills):
            print("go", file=launcher.stdin, flush=True)
            pid = int(launcher.stdout.readline())
            while not (tmp_path / CONFIG).exists():
                time.sleep(0.005)
            time.sleep(chance.uniform(0.02, 0.12))
            os.kill(pid, signal.SIGKILL)
            assert int(launcher.stdout.readline()) == signal.SIGKILL  # it was at work until then
            seen.add(which(tmp_path))
        launcher.stdin.close()
    assert seen == {4, 8}
    adapter(4).save(tmp_path)
    assert which(tmp_path) == 4


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends (as far as `save` can tell) after `count` renames."""
    commit, done = files.commit, []

    def dying(temporary: Path, path: Path) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(path)
        commit(temporary, path)

    monkeypatch.setattr(files, "commit", dying)


def test_a_kill_between_the_renames_reads_as_the_new_adapter(tmp_path, monkeypatch):
    adapter(4).save(tmp_path)
    with monkeypatch.context() as patch:
        kill_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            adapter(8).save(tmp_path)
    assert '"r": 4' in (tmp_path / CONFIG).read_text()  # the config is the old one still
    assert which(tmp_path) == 8
    adapter(4).save(tmp_path)
    assert which(tmp_path) == 4
    adapter(8).save(tmp_path)
    assert which(tmp_path) == 8


def test_a_kill_in_a_new_folder_before_the_config_is_there(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            adapter(8).save(tmp_path)
    # There was no old adapter: the new one, or none.
    try:
        assert which(tmp_path) == 8
    except CheckpointError as error:
        assert "holds no adapter" in str(error)


def test_a_kill_before_the_first_rename_leaves_the_old_adapter(tmp_path, monkeypatch):
    adapter(4).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        kill_after(0, patch)
        with pytest.raises(KeyboardInterrupt):
            adapter(8).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert which(tmp_path) == 4


def test_a_config_edited_by_hand_is_what_counts(tmp_path):
    adapter(4).save(tmp_path)
    text = (tmp_path / CONFIG).read_text().replace('"lora_alpha": 12', '"lora_alpha": 20')
    (tmp_path / CONFIG).write_text(text)
    with pytest.warns(lf.LorafitWarning, match=r"lora_alpha \(saved as 12, now 20\)"):
        handle = lf.load(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), tmp_path)
    assert handle.adapter("0").scale == 5


def test_old_leftovers_of_killed_writers_are_swept(tmp_path):
    adapter(4).save(tmp_path)
    old = [tmp_path / f".{name}.abc.tmp" for name in (CONFIG, WEIGHTS, "README.md")]
    fresh, foreign = tmp_path / f".{WEIGHTS}.new.tmp", tmp_path / ".other.tmp"
    for path in (*old, fresh, foreign):
        path.write_text("left")
    for path in (*old, foreign):
        os.utime(path, (time.time() - 3600,) * 2)
    adapter(8).save(tmp_path)
    assert leftovers(tmp_path) == sorted(
        [fresh.name, foreign.name]
    )  # a writer may be at work; others' files are theirs
    assert which(tmp_path) == 8


LIMITED = """
import resource, signal, sys, torch
import lorafit as lf
from lorafit.errors import CheckpointError
handle = lf.attach(torch.nn.Sequential(torch.nn.Linear(64, 64)), lf.LoRA(r=32))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    handle.save(sys.argv[1])
except CheckpointError as error:
    print(error)
    print("where", error.where, "fix", error.fix)
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX's")
def test_a_file_that_the_system_will_not_hold_leaves_the_old_adapter(tmp_path):
    adapter(4).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert f"cannot write {WEIGHTS}" in result.stdout and "free some space" in result.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("failing", [WEIGHTS, CONFIG, "README.md"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")], ids=str
)
def test_any_file_that_cannot_be_written_leaves_the_old_adapter(failing, error, tmp_path, monkeypatch):
    adapter(4).save(tmp_path)
    (tmp_path / "README.md").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stage = files.stage

    def full(path, write):
        def writing(temporary):
            write(temporary)
            if path.name == failing:
                raise error

        return stage(path, writing)

    monkeypatch.setattr(files, "stage", full)
    with pytest.raises(CheckpointError, match=f"cannot write {failing}") as caught:
        adapter(8).save(tmp_path)
    assert caught.value.where == tmp_path / failing and str(error) in str(caught.value)
    assert "untouched" in caught.value.fix
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert which(tmp_path) == 4


def test_a_folder_where_a_file_should_be(tmp_path):
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        adapter(4).save(tmp_path)
    assert caught.value.where == tmp_path / WEIGHTS and caught.value.fix
    assert leftovers(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(CheckpointError, match="cannot write") as caught:
            adapter(4).save(path)
        assert caught.value.fix
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_of_the_program_is_not_taken_for_the_disks(tmp_path, monkeypatch):
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(store, "save_file", broken)
    with pytest.raises(ZeroDivisionError):
        adapter(4).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_have_the_modes_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        adapter(4).save(tmp_path)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path.name


def test_saving_twice_gives_the_same_files(tmp_path):
    handle = adapter(4)
    handle.save(tmp_path / "a")
    handle.save(tmp_path / "b")
    for name in (CONFIG, "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    one, two = ((tmp_path / folder / WEIGHTS).read_bytes() for folder in "ab")
    assert sorted(one) == sorted(two)  # safetensors orders its metadata by chance


def test_the_users_readme_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("my own words")
    adapter(4).save(tmp_path, base_model="me/base")
    assert (tmp_path / "README.md").read_text() == "my own words"
    (tmp_path / "README.md").unlink()
    adapter(4).save(tmp_path, base_model="me/base")
    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "me/base"' in card and "| r | 4 |" in card
