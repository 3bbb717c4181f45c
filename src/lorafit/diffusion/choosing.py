"""What some methods find out before the run: LoRA-drop's trial, and the data that initialisers look at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from lorafit import files
from lorafit.diffusion.family import Family
from lorafit.diffusion.folder import RunFolder
from lorafit.diffusion.places import adapt
from lorafit.diffusion.pools import Batch, Pools, Prompts
from lorafit.diffusion.settings import Settings
from lorafit.diffusion.stepping import Rates, Stepper
from lorafit.handle import Handle
from lorafit.importance import importance
from lorafit.method import Around, Method, Sample
from lorafit.methods.lora_drop import LoRADrop
from lorafit.training.record import Recorder

Notify = Callable[[str], object]

DROP = "drop.json"
SCORED = 16
"""So many batches the sites of LoRA-drop are scored on, and initialisers look at."""


@final
@dataclass(frozen=True)
class Chooser:
    """What is known of a run before its adapters are made."""

    settings: Settings
    family: Family
    pools: Pools
    prompts: Prompts
    rates: Rates
    folder: RunFolder
    recorder: Recorder
    notify: Notify

    def sample(self, method: Method) -> Sample | None:
        """A few batches for a method that looks at data first; None for the others."""
        if method.evidence() is None:
            return None
        self.notify(f"looks at {SCORED} batches before the first step, as the initialiser asks")
        return Sample(self._batches(), loss=lambda model, batch: self._error(batch).mean())

    def handle(self, method: Method) -> Handle:
        """Attaches a method to the denoiser as the settings say."""
        settings = self.settings
        return adapt(
            self.family,
            method,
            targets=settings.targets,
            exclude=settings.exclude,
            rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern,
            seed=settings.seed,
            sample=self.sample(method),
        )

    def settled(self, method: Method) -> Method:
        """The method as the run trains it: with its sites chosen, where there is LoRA-drop in it.

        Raises:
            DataError: the trial's adapter learnt nothing.
            TrainingError: its loss was not finite.
        """
        drop = drop_in(method)
        if drop is None or drop.keep is not None:
            return method
        choice = self._known()
        if choice is None:
            choice = self._trial(method, drop)
            files.write_text(self.folder.path / DROP, json.dumps(choice, indent=2))
        else:
            self.notify("which layers matter was found before")
        self.recorder.write("drop", **choice)
        self.notify(f"keeps {len(choice['kept'])} of {len(choice['scores'])} sites")
        return _chosen(method, tuple(choice["kept"]))

    def _known(self) -> dict[str, Any] | None:
        """The choice that the run's folder has; one that is damaged is made again, with the same result."""
        try:
            found = json.loads((self.folder.path / DROP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = (
            isinstance(found, dict) and isinstance(found.get("kept"), list) and isinstance(found.get("scores"), dict)
        )
        return found if whole and found["kept"] else None

    def _trial(self, method: Method, drop: LoRADrop) -> dict[str, Any]:
        steps = max(1, math.ceil(drop.sample * self.settings.max_steps))
        self.notify(f"trial: {steps} steps, to see which layers matter")
        handle = self.handle(method)
        try:
            stepper = Stepper(
                self.settings,
                self.family,
                {self.family.denoiser: handle},
                self.pools,
                self.prompts,
                self.rates,
                steps,
            )
            for step in range(steps):
                stepper.take(step)
            scores = importance(handle, self._batches(), forward=lambda model, batch: self._error(batch))
            kept = drop.chosen(scores).keep or ()
            shapes: dict[str, int] = {}
            for path in scores:
                if path not in kept and drop.rest == "share":
                    shape = handle.sites[path].shape
                    said = f"{shape.out} × {shape.inn}"
                    shapes[said] = shapes.get(said, 0) + 1
        finally:
            handle.detach()
        return {
            "scores": scores,
            "kept": list(kept),
            "shared": shapes,
            "rest": drop.rest,
            "threshold": drop.threshold,
            "sample_records": steps * self.settings.gradient_accumulation_steps * self.settings.batch_size,
            "steps": steps,
        }

    def _batches(self) -> list[dict[str, Any]]:
        return [_mapping(self.pools.batch(number)) for number in range(SCORED)]

    def _error(self, batch: Mapping[str, Any]) -> Tensor:
        condition = self.prompts.condition(batch["prompts"])
        return self.family.error(batch["latents"], condition, batch["noise"], batch["shares"])


def _mapping(batch: Batch) -> dict[str, Any]:
    return {"latents": batch.latents, "prompts": batch.prompts, "noise": batch.noise, "shares": batch.shares}


def drop_in(method: Method) -> LoRADrop | None:
    """The LoRA-drop in a method, at whatever depth."""
    while isinstance(method, Around):
        if isinstance(method, LoRADrop):
            return method
        method = method.within
    return None


def without_drop(method: Method) -> Method:
    """The method without a choice of sites, for parts that have their own few: text encoders."""
    if isinstance(method, LoRADrop):
        return method.within
    return method.around(without_drop(method.within)) if isinstance(method, Around) else method


def _chosen(method: Method, kept: tuple[str, ...]) -> Method:
    if isinstance(method, LoRADrop):
        return replace(method, keep=kept)
    assert isinstance(method, Around)
    return method.around(_chosen(method.within, kept))
