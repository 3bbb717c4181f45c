"""What a folder says of the head that lies in it: classes by name, or the scale of numbers, and what it reads.

`labels.json` has the names of a classifier's classes. `task.json` says what is learnt, what the head reads, and of a
regression how its output becomes a label. Where other libraries would read the adapter and compute something else, its
card says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lorafit import files
from lorafit.errors import CheckpointError
from lorafit.store import CARD
from lorafit.training.folder import LABELS, TASK
from lorafit.training.numbers import Scale
from lorafit.training.tasks import CLASSES, NUMBERS


@final
@dataclass(frozen=True)
class Headed:
    """A head.

    Attributes:
        labels: the names of the classes by index; none of a regression.
        scale: how a regression's output becomes a label; None of a classifier.
        pooling: what it reads, as `pooling.WORDS` has it; None for what the model's own class reads.
    """

    labels: tuple[str, ...] = ()
    scale: Scale | None = None
    pooling: str | None = None

    def write(self, folder: Path) -> None:
        """Puts both files into a folder."""
        if self.scale is None:
            files.write_text(folder / LABELS, json.dumps(list(self.labels), ensure_ascii=False))
        told: dict[str, Any] = {"task": CLASSES if self.scale is None else NUMBERS, "pooling": self.pooling}
        if self.scale is not None:
            told["scale"] = self.scale.as_json()
        files.write_text(folder / TASK, json.dumps(told, indent=2))
        self.warn(folder)

    def warn(self, folder: Path) -> None:
        """Says in an adapter's card what other libraries would get wrong, unless it says so already."""
        path = folder / CARD
        if not path.is_file():
            return
        card = path.read_text(encoding="utf-8", errors="replace")
        new = [line for line in self.warnings() if line not in card]
        if new:
            files.write_text(path, "\n".join([card.rstrip("\n"), *(f"\n{line}" for line in new)]) + "\n")

    def warnings(self) -> list[str]:
        """A line for each thing that only this library knows of the head.

        >>> Headed(labels=("bad", "good")).warnings()
        []
        """
        found = []
        if self.pooling is not None:
            found.append(
                f"The head reads the `{self.pooling}` pooling of the encoder (`{TASK}`): PEFT over "
                "AutoModelForSequenceClassification would read this adapter without complaint and compute something "
                "else. `lorafit eval` and `lorafit merge` follow it."
            )
        if self.scale is not None and (self.scale.offset, self.scale.factor) != (0.0, 1.0):
            found.append(
                f"The head's output is no label yet: label = {self.scale.offset:.6g} + {self.scale.factor:.6g} · "
                f"output (`{TASK}`); `lorafit merge` folds that into the head."
            )
        return found

    @classmethod
    def read(cls, folder: Path) -> Headed | None:
        """What `write` left in a folder; None where there is nothing of the kind.

        Raises:
            CheckpointError: a file is damaged.
        """
        names, told = _json(folder / LABELS), _json(folder / TASK)
        if names is None and told is None:
            return None
        try:
            labels = () if names is None else tuple(str(name) for name in names)
            scale = None if told is None or told["task"] != NUMBERS else Scale.read(told["scale"])
            return cls(labels, scale, None if told is None else told["pooling"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder / TASK, error) from None


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "what the folder says of the head is damaged",
        where=path,
        found=f"{type(error).__name__}: {error}",
        expected="the JSON that the run wrote",
        fix="restore the file, or run the same command again in a new folder",
    )
