"""Where records come from: a file, a directory of files with one schema, or a data set of the hub.

A name is a path if there is such a path; only a name that is none, and that looks like a hub name, goes to
the hub. What is left out of a directory is said in `Source.note`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import DataError, MissingExtraError, nearest, some
from lorafit.training.formats import Record, format_of, read_file

__all__ = ["HubLoader", "Record", "Source", "load_hub", "read_records"]

HubLoader = Callable[[str, "str | None", str], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        records: in the order of the file, files in the order of their names.
        format: the file format, for people: `JSON Lines`.
        name: the short name, for people: `data.jsonl`.
        note: what was left out, or empty.
    """

    records: list[Record]
    format: str
    name: str
    note: str = ""


def load_hub(name: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a hub data set; class labels come as their names.

    Raises:
        MissingExtraError: `datasets` is not installed.
        Exception: whatever `datasets` raises.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "A data set of the hub needs the `datasets` package.",
            where=name,
            fix="pip install 'lorafit[train]', or name a local file",
        ) from error
    rows = datasets.load_dataset(name, config, split=split)
    classes = {key: kind for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    for row in rows:
        for key, kind in classes.items():
            # -1 is the convention for "no label"; it stays as it is, and is refused where labels are read.
            if row[key] is not None and row[key] >= 0:
                row[key] = kind.int2str(row[key])
        yield row


def read_records(source: str | Path, *, split: str | None = None, hub: HubLoader = load_hub) -> Source:
    """Reads all records of `source`.

    Args:
        source: a file (.jsonl .json .csv .tsv .parquet .txt .md, text formats also with .gz), a directory of
            such files, or a hub name: `owner/name`, `owner/name:config`.
        split: which split of a hub data set, or of a directory whose files are named by split; `train` if
            None.
        hub: fetches the rows of `(name, config, split)`.

    Returns:
        At least one record, each knowing where it is from.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_directory(path, name, split)
    if path.exists():
        if split is not None:
            raise DataError(
                "A file has no splits.",
                where=name,
                found=f"the split {split!r}",
                expected="a directory with a file for each split, or a hub data set",
                fix="leave the split away, or name the split's own file",
            )
        label, records = read_file(path, name)
        return Source(_some_records(records, name), label, path.name)
    known = _HUB_NAME.fullmatch(name)
    near = _near_paths(path)
    if known is None or format_of(path) is not None or _is_slip(name, path, near):
        raise _missing(name, path, near)
    return _read_hub(known, split or "train", hub, near)


# Files ----------------------------------------------------------------------

_HUB_NAME = re.compile(r"(?P<name>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?")


def _some_records(records: list[Record], name: str) -> list[Record]:
    if not records:
        raise DataError(
            "There are no records.", where=name, expected="at least one", fix="name data that are not empty"
        )
    return records


def _missing(name: str, path: Path, near: tuple[str, ...]) -> DataError:
    parent = path.parent
    held = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else None
    if held is None:
        found = f"no directory {str(parent)!r}"
    else:
        found = f"{str(parent)!r} holds {some(held)}" if held else f"{str(parent)!r} is empty"
    return DataError(
        "There is no such file or directory.",
        where=name,
        found=found,
        near=near,
        fix=f"did you mean {near[0]}?" if near else "check the spelling, and the directory you are in",
    )


def _is_slip(name: str, path: Path, near: tuple[str, ...]) -> bool:
    """Whether a name that could be a hub name is rather a path with a slip in it.

    A name with an owner is one if the owner is a directory here, or very nearly one.
    """
    if "/" not in name:
        return bool(near)
    owner = path.parts[0]
    return path.parent.exists() or any(
        difflib.SequenceMatcher(None, owner.casefold(), Path(other).parts[0].casefold()).ratio() >= 0.8
        for other in near
    )


def _near_paths(path: Path) -> tuple[str, ...]:
    """Existing paths that resemble `path` in its first part that does not exist."""
    wrong = path
    while not wrong.parent.exists():
        wrong = wrong.parent
    if not wrong.parent.is_dir():
        return ()
    names = [entry.name for entry in wrong.parent.iterdir() if not entry.name.startswith(".")]
    # Case is the most frequent slip, and counts for much in a comparison of letters.
    folded = {name.casefold(): name for name in names}
    found = dict.fromkeys((*nearest(wrong.name, names), *_same(wrong.name, folded)))
    return tuple(str(wrong.parent / name) for name in found)


def _same(name: str, folded: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(folded[near] for near in nearest(name.casefold(), folded))


# Directories ----------------------------------------------------------------

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    "test": "test",
}
# Documents about the data that lie beside the data, and would pass for data by their suffix.
_ABOUT = {"readme", "license", "licence", "changelog", "citation", "notice"}


def _split_of(path: Path) -> str | None:
    return _SPLITS.get(re.split(r"[-_.]", path.name.lower())[0])


def _read_directory(path: Path, name: str, split: str | None) -> Source:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and format_of(entry) is not None]
    if len({format_of(file) for file in files}) > 1:
        files = [file for file in files if file.stem.lower() not in _ABOUT]
    _check_directory(files, entries, name)
    files = _choose_split(files, split, name)
    records: list[Record] = []
    for file in files:
        label, more = read_file(file, str(Path(name) / file.name))
        records += more
    left = [entry.name for entry in entries if entry not in files]
    many = f"{label}, {len(files)} files" if len(files) > 1 else f"{label} ({files[0].name})"
    note = f"left out of the directory: {some(left)}" if left else ""
    return Source(_some_records(records, name), many, path.name or name, note)


def _check_directory(files: list[Path], entries: list[Path], name: str) -> None:
    if not files:
        inside = [entry.name + "/" * entry.is_dir() for entry in entries]
        below = [str(Path(name) / entry.name) for entry in entries if entry.is_dir()]
        raise DataError(
            "The directory holds no data.",
            where=name,
            found=some(inside) if inside else "nothing",
            expected="files named .jsonl .json .csv .tsv .parquet .txt or .md",
            near=below[:3],
            fix="name a directory or a file that holds records",
        )
    labels = {known.label: file.name for file in files if (known := format_of(file)) is not None}
    if len(labels) > 1:
        raise DataError(
            "The directory holds files of several formats.",
            where=name,
            found=", ".join(f"{file} ({label})" for label, file in sorted(labels.items())),
            expected="one format, one schema",
            fix="name one file, or move the others away",
        )


def _choose_split(files: list[Path], split: str | None, name: str) -> list[Path]:
    """The files of one split, if files are named by split; else all of them."""
    splits = sorted({named for file in files if (named := _split_of(file)) is not None})
    if not splits and split is None:
        return files
    wanted = _SPLITS.get(split or "train", split)
    chosen = [file for file in files if _split_of(file) == wanted]
    if not chosen:
        raise DataError(
            "The directory has no file for the split.",
            where=name,
            found=some([file.name for file in files]),
            expected=f"a file whose name begins with {split or 'train'!r}",
            near=splits,
            fix="name the file itself" + (f", or the split {splits[0]!r}" if splits else ""),
        )
    return chosen


# The hub --------------------------------------------------------------------


def _read_hub(known: re.Match[str], split: str, hub: HubLoader, near: tuple[str, ...]) -> Source:
    name, config = known["name"], known["config"]
    label = f"{known[0]}[{split}]"
    try:
        rows = [dict(row) for row in hub(name, config, split)]
    except MissingExtraError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries, none with a common root
        raise DataError(
            "There is no such path, and the hub gave no data set of that name.",
            where=label,
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            expected="a local file or directory, or a hub data set that can be reached",
            near=near,
            fix="check the spelling and the network (a set with several configs: owner/name:config), "
            "or fetch the data and name the file",
        ) from error
    records = [Record(row, f"{label} row {number}") for number, row in enumerate(rows, start=1)]
    return Source(_some_records(records, label), "hub data set", label)
