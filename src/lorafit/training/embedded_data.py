"""The data a run learns from when none are named: questions about Python's standard library.

2,493 records to learn from and 221, of other modules, to evaluate on; where they come from and under which
licence is told in `lorafit/data/NOTICE.md`. A record has the columns `question`, `answer` and `module`. In
SmolLM2's chat template a pair has 59 tokens on average and 103 at most; 12 of them, the answer and the token that
ends it, are learnt.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from lorafit.errors import ConfigError, DataError, nearest

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


def embedded_data_path(split: Split) -> Path:
    """The JSON Lines file of one split of the embedded data.

    Args:
        split: `train` or `eval`.

    Raises:
        ConfigError: there is no such split.
        DataError: the package was installed without its data, or in a form that has no files.
    """
    if split not in SPLITS:
        raise ConfigError(
            "the embedded data have no such split",
            found=split,
            expected=" or ".join(SPLITS),
            near=nearest(split, SPLITS),
        )
    path = resources.files("lorafit") / "data" / "python_qa" / f"{split}.jsonl"
    if not isinstance(path, Path) or not path.is_file():
        raise DataError(
            "the embedded data are not where the package should have them",
            where=path,
            expected="a file",
            fix="install lorafit from its wheel, unpacked (pip does that), or name data of your own",
        )
    return path
