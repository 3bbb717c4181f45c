"""One DreamBooth run from settings to adapter: `train` does what `lorafit dreambooth` shows.

Ruiz et al. 2022, arXiv:2208.12242: a pipeline learns a subject from a handful of pictures under a prompt with a rare
word, and with pictures of the class that it draws itself keeps what it knew of the class. Here an adapter learns it.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from rich.console import Console

from lorafit.diffusion.bar import Bar
from lorafit.diffusion.choosing import Chooser, without_drop
from lorafit.diffusion.family import Family
from lorafit.diffusion.folder import RunFolder, open_folder, restored
from lorafit.diffusion.heldout import LOOKED_AT, Held
from lorafit.diffusion.library import library
from lorafit.diffusion.outcome import Outcome
from lorafit.diffusion.pipelines import choose_dtype, default_device, family, open_pipeline
from lorafit.diffusion.places import adapt_encoders, frozen, sites_of
from lorafit.diffusion.pools import Fixed, Learnt, Pool, Pools, Prompts
from lorafit.diffusion.saving import save
from lorafit.diffusion.settings import Settings
from lorafit.diffusion.shown import Shown, check, gather
from lorafit.diffusion.stepping import Rates, Stepper, Taken, check_alone
from lorafit.diffusion.subjects import read_gallery
from lorafit.diffusion.watching import Watch
from lorafit.errors import CheckpointError
from lorafit.handle import Handle
from lorafit.layers import Shape
from lorafit.method import Method
from lorafit.methods import build
from lorafit.training.callbacks import Interrupt, schedule_facts, terminated
from lorafit.training.meter import peaks
from lorafit.training.outcome import Told
from lorafit.training.owned import step_of, without
from lorafit.training.record import Recorder, environment
from lorafit.training.spans import duration

Notify = Callable[[str], object]

COST_OF_A_STEP = 3.0
"""A training step in forward passes of its pictures: the gradient of the input costs one more, adapters the rest."""


def train(settings: Settings, *, command: str, notify: Notify, console: Console) -> Outcome:
    """Trains the adapters of one subject, or goes on with a run that was interrupted.

    Args:
        settings: everything the run depends on.
        command: how the user asked for it, for the records.
        notify: is told, line by line, what is found and decided.
        console: for the progress bar.

    Returns:
        The outcome. In `settings.folder` are then records.jsonl, settings.json, samples/, checkpoint-*/ and adapter/.

    Raises:
        LorafitError: settings, pictures, pipeline or folder do not do; nothing that was there is lost.
    """
    check_alone()
    return _Run(settings, command, notify, console).execute()


@final
class _Run:
    """The steps of one run, in order, and what they share."""

    def __init__(self, settings: Settings, command: str, notify: Notify, console: Console) -> None:
        self.settings = settings
        self.command = command
        self.notify = notify
        self.console = console
        self.started = time.perf_counter()
        self.train_seconds = 0.0
        self.saved = 0
        self.folder: RunFolder = open_folder(settings)
        self.recorder = Recorder(self.folder.records)
        self.checkpoint: Path | None = None

    def execute(self) -> Outcome:
        done = self.folder.result()
        if done is not None:
            self.notify(f"this run is finished already: {self.folder.path}")
            return Outcome.read(done, self.folder)
        self.checkpoint = self.folder.checkpoint(self.notify)
        self.recorder.write("run", run=uuid.uuid4().hex[:12], command=self.command, resumed_from_step=self._begin())
        try:
            with terminated():
                return self._train()
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.recorder.write("end", status=status, message=f"{type(error).__name__}: {error}")
            raise

    def _begin(self) -> int:
        return 0 if self.checkpoint is None else step_of(self.checkpoint) or 0

    # Before the first step

    def _train(self) -> Outcome:
        settings = self.settings
        subject = read_gallery(settings.instance_images, "pictures of the subject", size=settings.resolution)
        held = None
        if settings.eval_images is not None:
            held = read_gallery(settings.eval_images, "held-out pictures of the subject", size=settings.resolution)
        device = default_device()
        pipe = open_pipeline(settings.pipeline, dtype=choose_dtype(settings.dtype, device), device=device)
        kind = family(pipe)
        kind.check_training()
        frozen(kind)
        check(settings, kind)
        # Before class pictures are drawn, which may take an hour.
        method = build(settings.method, settings.method_options)
        rates = Rates.of(settings, method.rate(list(self._shapes(kind, method).values())))
        shown = gather(settings, pipe, subject, held, self.notify)
        self.folder.check_data(shown.fingerprint())
        shown.tell(kind, settings.resolution, self.notify)
        pools = Pools(
            kind,
            Pool.of("subject", kind, shown.subject, shown.subject_said, settings),
            None if shown.prior is None else Pool.of("class", kind, shown.prior, shown.prior_said, settings),
            settings,
        )
        held_pool = None if shown.held is None else Pool.of("held", kind, shown.held, shown.held_said, settings)
        prompts: Prompts = Learnt(kind) if settings.train_text_encoder else Fixed(kind, shown.prompts)
        chooser = Chooser(settings, kind, pools, prompts, rates, self.folder, self.recorder, self.notify)
        self._prepare(kind)
        method = chooser.settled(method)
        handles = {kind.denoiser: chooser.handle(method)}
        if settings.train_text_encoder:
            inner = without_drop(method)
            handles |= adapt_encoders(kind, inner, seed=settings.seed, sample=chooser.sample(inner))
        # Before the optimizer: a schedule may have given the adapters other ranks.
        kept = None if self.checkpoint is None else restored(self.checkpoint, handles)
        stepper = Stepper(settings, kind, handles, pools, prompts, rates, settings.max_steps)
        watch = Watch(
            settings,
            kind,
            prompts,
            Held("subject", pools.subject if held_pool is None else held_pool, kind, settings),
            None if pools.prior is None else Held("class", pools.prior, kind, settings, most=LOOKED_AT),
            self.folder,
            self.recorder,
        )
        if kept is not None:
            state, progress = kept
            self._go_on(stepper, watch, state, progress)
        self._announce(kind, handles, rates, shown, device)
        return self._loop(handles, stepper, watch)

    def _shapes(self, kind: Family, method: Method) -> dict[str, Shape]:
        settings = self.settings
        return sites_of(
            kind,
            settings.targets,
            settings.exclude,
            method=method,
            rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern,
        )

    def _go_on(self, stepper: Stepper, watch: Watch, state: dict[str, Any], progress: dict[str, Any]) -> None:
        assert self.checkpoint is not None
        try:
            stepper.load_state_dict(state)
            watch.load_state_dict(progress)
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                "the checkpoint is damaged",
                where=self.checkpoint,
                found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                expected="the files as the run wrote them",
                fix=without(self.checkpoint),
            ) from error
        self.notify(f"goes on from step {self._begin()}")

    def _prepare(self, kind: Family) -> None:
        """Modes of the parts that are trained: in training mode, and computing activations again where asked to.

        Before all that looks at gradients: a trial of LoRA-drop, and initialisers, need as much room as a step.
        """
        for part in kind.components if self.settings.train_text_encoder else (kind.denoiser,):
            model: Any = kind.component(part)
            model.train()
            if not self.settings.gradient_checkpointing:
                continue
            if part == kind.denoiser:
                model.enable_gradient_checkpointing()
            else:
                with warnings.catch_warnings():
                    # Newer releases of transformers have it under another name, and keep this one until 6.
                    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable", category=FutureWarning)
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _announce(self, kind: Family, handles: dict[str, Handle], rates: Rates, shown: Shown, device: Any) -> None:
        settings = self.settings
        for part, handle in handles.items():
            self.notify(f"{part}: {handle.summary()}")
        text = f", text encoder {rates.text:.2g}" if settings.train_text_encoder else ""
        pictures = settings.batch_size * settings.gradient_accumulation_steps
        beside = "" if shown.prior is None else f" and {pictures} of the class"
        self.notify(
            f"{settings.max_steps:,} steps of {pictures} picture{'' if pictures == 1 else 's'} of the subject{beside}, "
            f"learning rate {rates.denoiser:.2g}{text}, {settings.lr_scheduler_type} schedule"
        )
        for handle in handles.values():
            told = None if handle.schedule is None else handle.schedule.told()
            if told is not None:
                self.notify(told)
        first = next(iter(handles.values()))
        trainable = sum(handle.num_trainable for handle in handles.values())
        total = sum(handle.num_total for handle in handles.values())
        resolved = {
            "model": settings.pipeline,
            "pipeline": kind.pipeline,
            "method": settings.method,
            **first.method.settings(),
            "learning_rate": rates.denoiser,
            "text_encoder_learning_rate": rates.text if settings.train_text_encoder else None,
            "parts": list(handles),
            "sites": sum(len(handle.sites) for handle in handles.values()),
            "trainable": trainable,
            "total": total,
            "share": trainable / total,
            "train_steps": settings.max_steps,
            "records_per_step": pictures,
            "task": "DREAMBOOTH",
        }
        self.recorder.write("config", config=settings.model_dump(), resolved=resolved)
        self.recorder.write(
            "environment", **environment(device, kind.dtype, settings.seed), diffusers=str(library().__version__)
        )
        self.recorder.write(
            "data",
            instance_images=settings.instance_images,
            instance_pictures=len(shown.subject.pictures),
            class_images=None if shown.prior is None else str(settings.prior_folder),
            class_pictures=0 if shown.prior is None else len(shown.prior.pictures),
            held_out_pictures=0 if shown.held is None else len(shown.held.pictures),
        )

    # The steps

    def _loop(self, handles: dict[str, Handle], stepper: Stepper, watch: Watch) -> Outcome:
        settings, begin = self.settings, self._begin()
        if not watch.evaluations:
            loss = watch.evaluate(0)
            self.notify(f"loss on the subject before training: {loss:.4f}")
            watch.sheet(0)
            pictures = settings.batch_size * settings.gradient_accumulation_steps * (1 if not watch.priors else 2)
            seconds = settings.max_steps * pictures * COST_OF_A_STEP * watch.seconds_per_picture
            self.notify(f"training will take about {duration(seconds)}, samples and class pictures aside")
        interrupt, bar = Interrupt(self.notify), Bar(self.console, settings.max_steps, begin)
        interrupt.on_train_begin(None, None, None)
        step, self.saved = begin, begin if self.checkpoint is not None else -1
        try:
            if 0 < begin < settings.max_steps and not watch.evaluated(begin):
                self._look(begin, watch, bar)  # whoever stopped the run did not wait for it
            while step < settings.max_steps and not interrupt.requested:
                started = time.perf_counter()
                taken = stepper.take(step)
                step += 1
                seconds = time.perf_counter() - started
                self.train_seconds += seconds
                watch.learnt(taken.instance)
                self._record(step, taken, seconds, handles)
                pictures = (
                    settings.batch_size * settings.gradient_accumulation_steps * (1 if taken.prior is None else 2)
                )
                bar.show(step, taken.loss, pictures / seconds)
                last = step == settings.max_steps
                if not interrupt.requested and not last:
                    self._look(step, watch, bar)
                if last or _due(step, settings.save_every):
                    self._save(step, handles, stepper, watch)
            if self.saved != step:
                self._save(step, handles, stepper, watch)
        finally:
            bar.close()
            interrupt.restore()
        if step < settings.max_steps:
            return self._interrupted(step, watch)
        return self._done(step, handles, watch)

    def _look(self, step: int, watch: Watch, bar: Bar) -> None:
        if _due(step, self.settings.evaluate_every):
            bar.say(f"step {step}: loss on the subject {watch.evaluate(step):.4f}")
        if _due(step, self.settings.sample_every):
            watch.sheet(step)

    def _record(self, step: int, taken: Taken, seconds: float, handles: dict[str, Handle]) -> None:
        self.recorder.write(
            "step",
            step=step,
            loss=taken.loss,
            instance_loss=taken.instance,
            prior_loss=taken.prior,
            learning_rate=taken.rate,
            grad_norm=taken.norm,
            seconds=seconds,
            **peaks(),
        )
        every = self.settings.evaluate_every
        facts = schedule_facts(next(iter(handles.values()))) if _due(step, every) else {}
        if facts:
            self.recorder.write("schedule", **{**facts, "step": step})

    def _save(self, step: int, handles: dict[str, Handle], stepper: Stepper, watch: Watch) -> None:
        folder = self.folder.save(
            step, handles, stepper.state_dict(), watch.state_dict(), self.settings.save_total_limit
        )
        self.saved = step
        self.recorder.write("saved", step=step, path=folder.name)

    # After the last step

    def _interrupted(self, step: int, watch: Watch) -> Outcome:
        outcome = self._outcome("interrupted", self.folder.path / f"checkpoint-{step}", step, watch, None)
        self.recorder.write("end", **outcome.figures(), adapter=outcome.adapter.name, message="stopped by the user")
        return outcome

    def _done(self, step: int, handles: dict[str, Handle], watch: Watch) -> Outcome:
        if not watch.evaluated(step):
            watch.evaluate(step)
        watch.sheet(step)
        settings = self.settings
        save(handles, self.folder.adapter, base=settings.pipeline, prompt=settings.instance_prompt)
        verdict = watch.verdict()
        told = None if verdict is None else Told(verdict.kind.value, verdict.sentence, verdict.hints, None)
        if told is not None:
            self.recorder.write("verdict", **asdict(told))
        outcome = self._outcome("done", self.folder.adapter, step, watch, told)
        self.recorder.write("end", **outcome.figures(), adapter=self.folder.adapter.name, message="")
        self.folder.finish(
            {
                **outcome.figures(),
                "resumed_from": outcome.resumed_from,
                "verdict": None if told is None else asdict(told),
            }
        )
        return outcome

    def _outcome(self, status: str, adapter: Path, step: int, watch: Watch, told: Told | None) -> Outcome:
        return Outcome(
            status=status,
            folder=self.folder,
            adapter=adapter,
            steps=step,
            resumed_from=self._begin(),
            eval_before=watch.evaluations[0].mean if watch.evaluations else None,
            eval_after=watch.evaluations[-1].mean if watch.evaluations else None,
            prior_before=watch.priors[0][1] if watch.priors else None,
            prior_after=watch.priors[-1][1] if watch.priors else None,
            train_seconds=self.train_seconds,
            seconds=time.perf_counter() - self.started,
            **peaks(),
            sheets=self.folder.sheets(),
            verdict=told,
        )


def _due(step: int, every: int) -> bool:
    """Whether something that comes every so many steps comes after this one."""
    return every > 0 and step % every == 0
