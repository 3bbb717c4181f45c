"""Optimizer steps on a denoiser's adapters, and on those of the text encoders, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from lorafit.diffusion.family import Family
from lorafit.diffusion.pools import Batch, Pools, Prompts
from lorafit.diffusion.seeds import derived
from lorafit.diffusion.settings import Settings
from lorafit.errors import ConfigError, TrainingError
from lorafit.handle import Handle
from lorafit.hooks import quick
from lorafit.training import ranks

RATE = 1e-4
"""The learning rate where nobody names one, times what the method asks for; that of diffusers' scripts."""
TEXT_RATE = 0.1
"""That of text encoders, as a share of the denoiser's."""


@dataclass(frozen=True)
class Taken:
    """What a step was like. Losses are means over its pictures; `norm` is the gradients', before they are cut."""

    loss: float
    instance: float
    prior: float | None
    norm: float
    rate: float


@dataclass(frozen=True)
class Rates:
    """Learning rates of the denoiser's adapter and of the text encoders'."""

    denoiser: float
    text: float

    @classmethod
    def of(cls, settings: Settings, times: float) -> Rates:
        """As the settings have them; `times` is what the method asks for."""
        own = settings.learning_rate
        rate = RATE * times if own is None else own
        text = settings.text_encoder_learning_rate
        return cls(rate, rate * TEXT_RATE if text is None else text)


def check_alone() -> None:
    """Raises `ConfigError` in one of several processes: a handful of pictures is trained in one."""
    if ranks.launched():
        raise ConfigError(
            "this run is for one process",
            where="the launcher",
            found="several processes",
            expected="one",
            fix="lorafit dreambooth without torchrun or accelerate launch",
        )


@final
class Stepper:
    """Takes the steps of a run; its state is all that a run needs to go on, beside the adapters.

    Args:
        settings: of the run.
        family: of the pipeline.
        handles: name of the part → adapter, the denoiser's first.
        pools: what is trained on.
        prompts: encodes what is shown.
        rates: learning rates.
        total: the run's steps.
    """

    def __init__(
        self,
        settings: Settings,
        family: Family,
        handles: Mapping[str, Handle],
        pools: Pools,
        prompts: Prompts,
        rates: Rates,
        total: int,
    ) -> None:
        self._settings = settings
        self._family = family
        self._handles = dict(handles)
        self._pools = pools
        self._prompts = prompts
        half = family.dtype is torch.float16
        self._scaler = torch.amp.GradScaler(family.device.type, enabled=half)
        self.optimizer = _optimizer(settings, family, self._handles, rates, total, fused=not half)
        self._schedule: Any = get_scheduler(
            settings.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=total,
        )

    def take(self, step: int) -> Taken:
        """Takes the step of this number, counted from 0.

        Raises:
            TrainingError: the loss or a gradient is not finite.
        """
        parts = self._settings.gradient_accumulation_steps
        sums = [0.0, 0.0, 0.0]
        prior = False
        rate = float(self._schedule.get_last_lr()[0])
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(parts):
            number = step * parts + part
            batch = self._pools.batch(number)
            with seeded(derived(self._settings.seed, "dropout", number), self._family.device):
                loss, own, other = self._loss(batch)
                if not bool(torch.isfinite(loss.detach())):
                    raise _diverged("the loss is not finite", step, loss.item())
                self._scaler.scale(loss / parts).backward()  # type: ignore[no-untyped-call]
            prior = other is not None
            for place, value in enumerate((loss, own, own if other is None else other)):
                sums[place] += float(value.detach()) / parts
        norm = self._cut()
        # In float16 a step whose gradients overflow is left out, and the next one's loss is scaled by less. A scale
        # below 1 has made them smaller than they are: then it is not the scale that they overflow by.
        scaled = self._scaler.is_enabled() and self._scaler.get_scale() >= 1
        if not scaled and not math.isfinite(norm):
            raise _diverged("the gradients are not finite", step, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()
        return Taken(sums[0], sums[1], sums[2] if prior else None, norm, rate)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss, the subject's part of it and that of the class."""
        losses = self._family.error(
            batch.latents,
            self._prompts.condition(batch.prompts),
            batch.noise,
            batch.shares,
            min_snr=self._settings.min_snr,
        )
        own = losses[: batch.subjects].mean()
        if len(losses) == batch.subjects:
            return own, own, None
        other = losses[batch.subjects :].mean()
        return own + self._settings.prior_loss_weight * other, own, other

    def _cut(self) -> float:
        """Cuts the gradients to the norm that is allowed, and gives what it was."""
        self._scaler.unscale_(self.optimizer)
        parameters = [each for handle in self._handles.values() for each in handle.parameters()]
        most = self._settings.max_grad_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(parameters, most))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the adapters."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the adapters are loaded already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])


def _optimizer(
    settings: Settings, family: Family, handles: Mapping[str, Handle], rates: Rates, total: int, *, fused: bool
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    named: list[tuple[str, nn.Parameter]] = []
    for part, handle in handles.items():
        groups += handle.param_groups(rates.denoiser if part == family.denoiser else rates.text)
        named += handle.named_parameters()
    quickly = fused and quick(torch.optim.AdamW, named, ())
    optimizer = torch.optim.AdamW(
        groups, lr=rates.denoiser, weight_decay=settings.weight_decay, fused=True if quickly else None
    )
    for handle in handles.values():
        handle.bind(optimizer, total_steps=total)
    return optimizer


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it torch's own generators start from a seed, for dropout; afterwards they are where they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _diverged(message: str, step: int, found: float) -> TrainingError:
    return TrainingError(
        message,
        where=f"step {step + 1}",
        found=found,
        expected="finite numbers",
        fix="lower the learning rate, or warm up for longer (warmup_steps); in float16, use bfloat16 or float32",
    )
