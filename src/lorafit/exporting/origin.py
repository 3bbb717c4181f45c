"""Where an adapter comes from, as far as the folders beside it tell: data, settings, scores, licences."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit import store
from lorafit.card import UNKNOWN
from lorafit.errors import CheckpointError

FRONT = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
LICENCE = re.compile(r"^license:\s*[\"']?([^\"'\n]+?)[\"']?\s*$", re.MULTILINE)
CHOSEN = (
    "method",
    "method_options",
    "targets",
    "rank_pattern",
    "modules_to_save",
    "packing",
    "max_length",
    "dtype",
    "quantise",
    "seed",
)
"""Settings of a run that its card shows, and those of `TRAINED` from among the training arguments."""
TRAINED = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type")


@dataclass(frozen=True)
class Origin:
    """What is known of an adapter.

    Attributes:
        base: its base model's name.
        data: what it learnt from; "unknown" where nobody says.
        base_licence, data_licence: as their own cards have them; "unknown" where nobody says.
        settings: of the run that made it.
        scores: of that run.
    """

    base: str | None
    data: str
    base_licence: str
    data_licence: str
    settings: Mapping[str, object] = field(default_factory=dict)
    scores: Mapping[str, object] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, object]:
        """For the head of a card."""
        return {
            "base model": self.base or UNKNOWN,
            "licence of the base": self.base_licence,
            "data": self.data,
            "licence of the data": self.data_licence,
        }


def origin(adapter: Path, base: str | None, place: str | None) -> Origin:
    """What the folders tell.

    Args:
        adapter: the adapter's folder; it lies in a run's folder if that one made it.
        base: the base model's name; None for what the adapter says.
        place: the base model's folder, if it is on this machine.
    """
    config = store.read(adapter).config
    base = base or config.get("base_model_name_or_path")
    run = adapter.absolute().parent
    settings = _read(run / "settings.json")
    licence = licence_of(place, base, "model")
    if settings is None:
        return Origin(base, UNKNOWN, licence, UNKNOWN)
    data, data_licence = _data(settings)
    options = {**settings, **(settings.get("training") or {})}
    shown = {key: options[key] for key in (*CHOSEN, *TRAINED) if options.get(key) not in (None, [], {})}
    return Origin(base, data, licence, data_licence, shown, _scores(_read(run / "result.json")))


def _scores(result: Mapping[str, Any] | None) -> dict[str, object]:
    if result is None:
        return {}
    found: dict[str, object] = {"steps": result.get("steps")}
    told = str(result.get("unit") or "")
    unit = "nats per prediction" if not told or told.startswith("nats") else told
    for key, name in (("eval_loss_before", "held-out loss before"), ("eval_loss_after", "held-out loss after")):
        value = result.get(key)
        found[name] = UNKNOWN if value is None else f"{value:.4f} {unit}"
    found |= _agreement(result.get("agreement") or {})
    verdict = result.get("verdict")
    if verdict is not None:
        found["verdict"] = verdict.get("sentence")
    findings: Mapping[str, Any] = result.get("findings") or {}
    for name, finding in findings.items():
        if isinstance(finding, Mapping) and finding.get("sentence"):
            found[name] = finding["sentence"]
    return found


def _agreement(figures: Mapping[str, float]) -> dict[str, object]:
    """How well a regression's numbers agree with the right ones; each with its 95 % interval."""
    found: dict[str, object] = {}
    for key, name in (("mean_absolute_error", "mean absolute error"), ("pearson", "Pearson"), ("spearman", "Spearman")):
        if key in figures:
            low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
            ends = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
            found[name] = f"{figures[key]:.3f}{ends}"
    return found


def _data(settings: Mapping[str, Any]) -> tuple[str, str]:
    named = settings.get("data")
    if named is None:
        return "the embedded questions on Python's standard library", "PSF-2.0"
    path = Path(str(named))
    if path.exists():
        return path.name, licence_of(str(path if path.is_dir() else path.parent), None, "dataset")
    return str(named), licence_of(None, str(named), "dataset")


def licence_of(folder: str | None, name: str | None, kind: str) -> str:
    """The licence that a card or a manifest names; "unknown" where there is none on this machine."""
    cards = [] if folder is None else [Path(folder) / "README.md"]
    if folder is not None:
        manifest = _read(Path(folder) / "lorafit.json")
        if manifest is not None and "licence" in manifest:
            return str(manifest["licence"]).lower()
    if name is not None and name.count("/") == 1 and not Path(name).exists():
        from huggingface_hub import try_to_load_from_cache

        kept = try_to_load_from_cache(name, "README.md", repo_type=kind)
        cards += [Path(kept)] if isinstance(kept, str) else []
    for card in cards:
        front = FRONT.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
        found = None if front is None else LICENCE.search(front.group(1))
        if found is not None:
            return found.group(1)
    return UNKNOWN


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path.name} of the adapter's run is damaged",
            where=path,
            expected="the JSON object that the run wrote",
            fix="restore the file, or move the adapter out of the run's folder",
        )
    return found
