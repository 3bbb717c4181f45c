"""Names of adapters, and the directories that they may come from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorafit import CheckpointError, ConfigError
from lorafit.serve.names import Folders, UnknownAdapterError


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two adapters, a run, a folder of something else and a hidden one."""
    adapter(tmp_path / "runs" / "beta")
    adapter(tmp_path / "runs" / "alpha")
    adapter(tmp_path / "runs" / "demo" / "adapter")
    adapter(tmp_path / "runs" / ".hidden")
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "a file").write_text("")
    return tmp_path / "runs"


def test_adapters_are_found_by_the_names_of_their_folders(runs: Path) -> None:
    found = Folders([runs], base="base").found()
    assert found == {"alpha": runs / "alpha", "beta": runs / "beta", "demo": runs / "demo" / "adapter"}
    assert list(found) == sorted(found)


@pytest.mark.parametrize("path", ["demo", "demo/adapter"])
def test_a_run_and_its_adapter_go_by_the_name_of_the_run(runs: Path, path: str) -> None:
    folders = Folders([runs / path], base="base")
    assert folders.found() == {"demo": runs / "demo" / "adapter"}
    assert folders.explicit == {runs / "demo" / "adapter"}


def test_a_name_can_be_chosen(runs: Path) -> None:
    folders = Folders([runs], base="base", named={"first": runs / "alpha", "run": runs / "demo"})
    found = folders.found()
    assert list(found) == ["first", "run", "beta"]
    assert found["run"] == runs / "demo" / "adapter"
    assert folders.explicit == {runs / "alpha", runs / "demo" / "adapter"}
    assert Folders([runs], base="base").explicit == frozenset()


def test_two_of_the_same_name(runs: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "more" / "alpha")
    with pytest.raises(ConfigError, match="same name") as caught:
        Folders([runs, tmp_path / "more"], base="base").found()
    assert "--adapters alpha-2=" in str(caught.value)
    assert "alpha" in Folders([runs, runs], base="base").found(), "the same folder twice is no second one"


@pytest.mark.parametrize("name", ["", ".", "..", "a b", "ä", "a/b", "a\n", "x" * 129, "<b>"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        Folders(base="base").check_name(name)


def test_the_base_has_its_name_for_itself(runs: Path) -> None:
    Folders(base="base").check_name("x" * 128)
    with pytest.raises(ConfigError, match="base model"):
        Folders([runs], base="alpha").found()


def test_paths_inside(runs: Path) -> None:
    folders = Folders([runs], base="base")
    for path in ("alpha", "./alpha", "beta/../alpha", str(runs / "alpha")):
        assert folders.resolve(path) == runs / "alpha", path
    assert folders.resolve("demo") == runs / "demo" / "adapter"


@pytest.mark.parametrize(
    "path",
    ["..", "../outside", "/etc", "/etc/passwd", "nothing", "notes", "~", "", "a\0b", "x" * 5000, "alpha/nothing"],
)
def test_paths_that_lead_nowhere_all_get_the_same_answer(runs: Path, path: str) -> None:
    adapter(runs.parent / "outside")
    with pytest.raises(UnknownAdapterError, match="no adapter was found there") as caught:
        Folders([runs], base="base").resolve(path)
    assert str(runs) not in str(caught.value), "nothing is told of this machine"


def test_a_link_that_leads_out_is_followed_and_refused(runs: Path) -> None:
    adapter(runs.parent / "outside")
    (runs / "link").symlink_to(runs.parent / "outside")
    (runs / "inner").symlink_to(runs / "alpha")
    folders = Folders([runs], base="base")
    with pytest.raises(UnknownAdapterError):
        folders.resolve("link")
    assert folders.resolve("inner") == runs / "alpha"


def test_a_file_that_lies_elsewhere(runs: Path) -> None:
    outside = adapter(runs.parent / "outside")
    (runs / "alpha" / "adapter_model.safetensors").unlink()
    (runs / "alpha" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="leads out") as caught:
        Folders([runs], base="base").resolve("alpha")
    assert caught.value.found == "adapter_model.safetensors"
    assert Folders([runs, outside], base="base").resolve("alpha") == runs / "alpha", "both are allowed"


def test_pickle_is_refused_by_name(runs: Path) -> None:
    weights = runs / "alpha" / "adapter_model.safetensors"
    shutil.move(weights, weights.with_name("adapter_model.bin"))
    with pytest.raises(CheckpointError, match="pickle is never read") as caught:
        Folders([runs], base="base").resolve("alpha")
    assert caught.value.found == "adapter_model.bin"


def test_a_config_without_weights(runs: Path) -> None:
    (runs / "alpha" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        Folders([runs], base="base").resolve("alpha")


def test_without_directories_nothing_is_allowed(runs: Path) -> None:
    with pytest.raises(UnknownAdapterError):
        Folders(base="base").resolve(str(runs / "alpha"))


def test_what_is_served(runs: Path) -> None:
    folders = Folders([runs], base="base")
    with pytest.raises(UnknownAdapterError):
        folders.folder("alpha")
    folders.keep("alpha", runs / "alpha")
    assert folders.folder("alpha") == runs / "alpha"
    folders.forget("alpha")
    folders.forget("alpha")
    with pytest.raises(UnknownAdapterError):
        folders.folder("alpha")
