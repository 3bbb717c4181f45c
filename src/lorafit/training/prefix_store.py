"""A file of hidden states, one entry for each sequence of tokens, found by a digest of the sequence.

Entries are appended. The index is written at commit points, after the entries that it names are on the disk: whatever
a kill cut off stands behind the last entry of the index, and is overwritten. An index of another key (other weights,
another layer, another type) is not read: the file then begins anew.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, final

import torch
from torch import Tensor

from lorafit import files

STATES = "states.bin"
INDEX = "index.json"


@final
class PrefixStore:
    """Hidden states on disk.

    Args:
        folder: holds the two files, and nothing else; made if it is not there.
        key: of everything that the states depend on beside their tokens.
        width: numbers of one token.
        dtype: of the numbers.
    """

    def __init__(self, folder: Path, key: str, width: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self._key = key
        self._width = width
        self._dtype = dtype
        self._entries: dict[str, tuple[int, int]] = {}  # digest → (first byte, tokens)
        self._end = 0
        self._committed = 0
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / STATES
        self._read_index(path)
        if not self._entries:  # else what it says of other states could be read out of the new ones after a kill
            (folder / INDEX).unlink(missing_ok=True)
        self._file: BinaryIO = path.open("r+b" if self._entries else "w+b")

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return self._end

    def tokens(self, digest: str) -> int:
        """The length of an entry."""
        return self._entries[digest][1]

    def write(self, digest: str, states: Tensor) -> None:
        """Appends an entry: (tokens, width), on any device. Raises OSError, and keeps what it has, on a full disk."""
        raw = _bytes(states.detach().to("cpu", self._dtype).contiguous())
        self._file.seek(self._end)
        self._file.write(raw)
        self._entries[digest] = (self._end, len(states))
        self._end += len(raw)

    def read(self, digest: str) -> Tensor:
        """An entry, (tokens, width), on the CPU. Raises EOFError if the file is shorter than its index says."""
        place, tokens = self._entries[digest]
        states = torch.empty(tokens, self._width, dtype=self._dtype)
        self._file.seek(place)
        raw = _bytes(states)
        if self._file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise EOFError(f"{self.folder / STATES} ends before byte {place + len(raw)}")
        return states

    def commit(self) -> None:
        """Brings all entries to the disk and then names them in the index. Raises OSError on a full disk."""
        if self._committed == len(self._entries):
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        index = {"key": self._key, "end": self._end, "entries": self._entries}
        files.write_text(self.folder / INDEX, json.dumps(index))
        self._committed = len(self._entries)

    def close(self) -> None:
        """Closes the file; the entries of the last commit stay for a run that goes on."""
        with suppress(OSError):
            self._file.close()

    def remove(self) -> None:
        """Closes the file and removes the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_index(self, states: Path) -> None:
        """Takes over the entries of this key that are whole; anything else counts for nothing: it is only a cache."""
        try:
            index = json.loads((self.folder / INDEX).read_text())
            entries = {str(digest): (int(place), int(tokens)) for digest, (place, tokens) in index["entries"].items()}
            end, known = int(index["end"]), index["key"]
            whole = states.stat().st_size >= end
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return
        row = self._width * self._dtype.itemsize
        if known == self._key and whole and all(at >= 0 and at + n * row <= end for at, n in entries.values()):
            self._entries, self._end, self._committed = entries, end, len(entries)


def _bytes(states: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return states.view(torch.uint8).reshape(-1).numpy().data
