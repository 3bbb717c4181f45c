"""Which adapters go by which name, and from which directories they may come.

A client gives names, and at run time paths. A name is a short plain word, since it becomes a label of metrics and a
part of addresses. A path counts only if it leads, every link followed, into a directory that the operator allowed; for
all others the answer is the same, whether there is something or not.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import final

from lorafit.errors import CheckpointError, ConfigError
from lorafit.store import CONFIG, PICKLED, WEIGHTS

RUN = "adapter"
"""Where a run's folder keeps its adapter; it goes by the run's name."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class UnknownAdapterError(CheckpointError):
    """A name or a path that leads to no adapter, or to none that may be served."""


@final
class Folders:
    """The directories that adapters may come from, and the folder of each adapter that is served.

    Args:
        allowed: directories, each an adapter, a run's folder, or a directory of such.
        base: what the base model is called; no adapter may have that name.
        named: adapters whose names were chosen; their folders are allowed as well.
    """

    def __init__(
        self,
        allowed: Sequence[Path | str] = (),
        *,
        base: str,
        named: Mapping[str, Path | str] = MappingProxyType({}),
    ) -> None:
        self.base = base
        self._allowed = tuple(Path(os.path.realpath(folder)) for folder in allowed)
        self._named = {name: Path(os.path.realpath(folder)) for name, folder in named.items()}
        self._served: dict[str, Path] = {}
        self._lock = threading.Lock()

    @property
    def explicit(self) -> frozenset[Path]:
        """The folders that were given as adapters themselves rather than found in a directory."""
        own = (adapter for folder in self._allowed for adapter in _adapters(folder))
        return frozenset((*own, *(_adapter(folder) or folder for folder in self._named.values())))

    def found(self) -> dict[str, Path]:
        """The adapters in the directories by name, in alphabetical order, those with chosen names first.

        Raises:
            ConfigError: two have the same name, or a name is none.
        """
        found: dict[str, Path] = {}
        for name, folder in (*self._named.items(), *self._scanned()):
            path = _adapter(folder) or folder
            if found.get(name, path) != path:
                raise ConfigError(
                    "two adapters have the same name",
                    where=name,
                    found=f"{found[name]} and {path}",
                    fix=f"name one of them: --adapters {name}-2={path}",
                )
            self.check_name(name)
            found[name] = path
        return found

    def _scanned(self) -> Iterator[tuple[str, Path]]:
        taken = {_adapter(folder) or folder for folder in self._named.values()}
        for allowed in self._allowed:
            own = _adapters(allowed)
            inner = sorted(child for child in allowed.iterdir() if child.is_dir()) if allowed.is_dir() else []
            folders = [allowed] if own else [child for child in inner if not child.name.startswith(".")]
            for folder in folders:
                adapter = _adapter(folder)
                if adapter is not None and adapter not in taken:
                    yield (folder.parent.name if folder.name == RUN else folder.name), adapter

    def check_name(self, name: str) -> None:
        """Raises `ConfigError` for what cannot be the name of an adapter."""
        if not _NAME.fullmatch(name) or not name.strip("."):
            raise ConfigError(
                "this cannot be the name of an adapter",
                found=repr(name[:150]),
                expected="1 to 128 of the characters A-Z a-z 0-9 . _ -",
                fix="choose another name",
            )
        if name == self.base:
            raise ConfigError("this is the name of the base model", found=name, fix="choose another name")

    def resolve(self, path: str) -> Path:
        """The adapter's folder that a path means; relative paths begin in each of the allowed directories.

        Raises:
            UnknownAdapterError: it leads to no adapter in an allowed directory.
            CheckpointError: the weights are pickled, or a file of the folder lies elsewhere.
        """
        for allowed in (*self._allowed, *self._named.values()):
            folder = self._inside(allowed, path)
            adapter = None if folder is None else _adapter(folder)
            if adapter is not None and self._owns(adapter):
                self._check_files(adapter, path)
                return adapter
        raise UnknownAdapterError(
            "no adapter was found there in the directories that are allowed",
            where=path[:300],
            expected=f"a folder with {CONFIG} and {WEIGHTS}",
            fix="give its path in one of the directories that the server was started with (--adapters)",
        )

    def _inside(self, allowed: Path, path: str) -> Path | None:
        try:
            folder = Path(os.path.realpath(allowed / path))
            return folder if self._owns(folder) and folder.is_dir() else None
        except (OSError, ValueError):  # too long, or a NUL inside
            return None

    def _owns(self, path: Path) -> bool:
        return any(path == root or root in path.parents for root in (*self._allowed, *self._named.values()))

    def _check_files(self, folder: Path, asked: str) -> None:
        names = sorted(entry.name for entry in folder.iterdir())
        if WEIGHTS not in names:
            pickled = [name for name in PICKLED if name in names]
            raise CheckpointError(
                "the weights are pickled, and pickle is never read: it can run any code"
                if pickled
                else "the folder has a config and no weights",
                where=asked[:300],
                found=pickled[0] if pickled else None,
                expected=WEIGHTS,
                fix="save it again as safetensors" if pickled else "wait until it is written whole, or copy it again",
            )
        away = [name for name in names if not self._owns(Path(os.path.realpath(folder / name)))]
        if away:
            raise CheckpointError(
                "a file of the adapter is a link that leads out of the directories that are allowed",
                where=asked[:300],
                found=away[0],
                fix="copy the file instead of linking it",
            )

    def keep(self, name: str, folder: Path) -> None:
        """Notes that an adapter is served from now on."""
        with self._lock:
            self._served[name] = folder

    def forget(self, name: str) -> None:
        """Notes that an adapter is not served any more."""
        with self._lock:
            self._served.pop(name, None)

    def folder(self, name: str) -> Path:
        """Where an adapter that is served lies.

        Raises:
            UnknownAdapterError: there is none by this name.
        """
        with self._lock:
            folder = self._served.get(name)
        if folder is None:
            raise UnknownAdapterError("there is no adapter by this name", found=name)
        return folder


def _adapter(folder: Path) -> Path | None:
    """The adapter that a folder is, or that the run has whose folder it is."""
    for path in (folder, folder / RUN):
        if (path / CONFIG).is_file():
            return Path(os.path.realpath(path))
    return None


def _adapters(folder: Path) -> list[Path]:
    adapter = _adapter(folder)
    return [] if adapter is None else [adapter]
