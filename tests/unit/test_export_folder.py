"""The folder of an export appears when it is whole, wherever it is to be, and what a kill left goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafit.exporting import folder
from lorafit.exporting.folder import STALE, fresh


def test_a_link_to_an_empty_directory_keeps_pointing_there(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with fresh(tmp_path / "link") as place:
        (place / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "x"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "real"]


def test_the_current_directory_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh(Path()) as place:
        (place / "file").write_text("x")
        (place / "inner").mkdir()
    assert sorted(each.name for each in Path().iterdir()) == ["file", "inner"]


def test_a_mount_point_is_filled_and_nothing_stays_there_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(folder, "_replaceable", lambda _: False)
    with pytest.raises(RuntimeError), fresh(tmp_path / "out") as place:
        assert place.parent == tmp_path / "out"
        raise RuntimeError
    assert not list((tmp_path / "out").iterdir())
    with fresh(tmp_path / "out") as place:
        (place / "file").write_text("x")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["file"]


def test_what_a_killed_export_left_goes_once_no_one_writes_there(tmp_path: Path) -> None:
    for name, age in (("old", STALE + 60), ("new", 0)):
        left = tmp_path / f".out.partial-{name}"
        left.mkdir()
        (left / "model.safetensors").write_text("half")
        for path in (left / "model.safetensors", left):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    other = tmp_path / ".other.partial-old"
    other.mkdir()
    os.utime(other, (0, 0))
    with fresh(tmp_path / "out"):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == [".other.partial-old", ".out.partial-new", "out"]
