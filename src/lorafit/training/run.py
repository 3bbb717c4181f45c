"""One run from settings to adapter: `train` does what `lorafit train` and `lorafit demo` show."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, final

from rich.console import Console
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from lorafit.distributed import is_sharded
from lorafit.errors import ConfigError
from lorafit.handle import Handle
from lorafit.inject import attach
from lorafit.layers import Shape
from lorafit.method import Method, Sample
from lorafit.methods import build
from lorafit.plan import Modules, choose, saved_paths
from lorafit.training import ranks
from lorafit.training.answers import answers
from lorafit.training.batches import Records, inputs_of
from lorafit.training.callbacks import Announcing, Bar, Interrupt, Recording, Timing, schedule_facts, terminated
from lorafit.training.config import Settings
from lorafit.training.data import Data
from lorafit.training.dropping import Trial, settle
from lorafit.training.folder import open_folder
from lorafit.training.judging import Judging, StoppedThereError
from lorafit.training.measuring import Watch
from lorafit.training.meter import peaks
from lorafit.training.models import default_rate
from lorafit.training.outcome import Outcome, Shown, Told, agreed
from lorafit.training.owned import SETTINGS
from lorafit.training.prefix import Computed, Prefix
from lorafit.training.prefix_run import shorten
from lorafit.training.prepare import Task, headed, prepare, training_arguments
from lorafit.training.record import Recorder, Unheard, environment
from lorafit.training.sharding import check_several, check_shard, divide
from lorafit.training.spans import duration
from lorafit.training.trainer import AdapterTrainer

Notify = Callable[[str], object]

SAMPLE_BATCHES = 8
"""How many batches an initialiser that looks at data is shown."""

COST_OF_A_STEP = 3.0
"""A training step in forward passes of its tokens: the gradient of the input costs one more, adapters the rest, and
evaluation has the larger batches. Measured on the embedded data."""


def train(settings: Settings, *, command: str, notify: Notify, console: Console) -> Outcome:
    """Trains one adapter, or goes on with a run that was interrupted.

    In one of several processes that a launcher started (torchrun, accelerate, Ray Train) it is one run of all of them;
    the first one speaks and writes.

    Args:
        settings: everything the run depends on.
        command: how the user asked for it, for the records.
        notify: is told, line by line, what is found and decided.
        console: for the progress bar.

    Returns:
        The outcome. In `settings.folder` are then records.jsonl, adapter/, checkpoint-*/ and settings.json.

    Raises:
        LorafitError: settings, data, model or folder do not do; nothing that was there is lost.
    """
    ranks.join(settings.training)
    if not ranks.speaks():
        notify, console = _nobody, Console(quiet=True)
    with ranks.lost(command):
        return _Run(settings, command, notify, console).execute()


def _nobody(text: str) -> None:
    """Is told what another process says already."""


@final
class _Run:
    """The steps of one run, in order, and what they share."""

    def __init__(self, settings: Settings, command: str, notify: Notify, console: Console) -> None:
        self.settings = settings
        self.command = command
        self.notify = notify
        self.console = console
        self.started = time.perf_counter()
        check_shard(settings)
        if settings.shard:
            check_several()
        self.folder = ranks.first(lambda: open_folder(settings))
        ranks.agreed(self._check_here)
        self.recorder = (Recorder if ranks.speaks() else Unheard)(self.folder.records)
        self.checkpoint: Path | None = None
        self.copies_rate = settings.full_learning_rate
        self.prefix: Prefix = Computed()

    def _check_here(self) -> None:
        """Raises `ConfigError` if what the first process wrote into the run's folder is not there for this one."""
        if not (self.folder.path / SETTINGS).is_file():
            raise ConfigError(
                "the run's folder is not the same in all processes",
                where=self.folder.path.absolute(),
                found=f"no {SETTINGS}, which process 0 has written there",
                expected="a folder that all machines share, under the same path",
                fix="--output-dir on a file system that all machines have",
            )

    def execute(self) -> Outcome:
        done = ranks.first(self.folder.result)
        if done is not None:
            self.notify(f"this run is finished already: {self.folder.path}")
            return Outcome.read(done, self.folder)
        self.checkpoint = ranks.first(lambda: self.folder.checkpoint(self.notify))
        self.recorder.write("run", run=uuid.uuid4().hex[:12], command=self.command, resumed_from_step=self._step())
        try:
            with terminated(), ranks.lost(self.command):
                return self._train()
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.recorder.write("end", status=status, message=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.prefix.close()

    def _step(self) -> int:
        return 0 if self.checkpoint is None else int(self.checkpoint.name.rpartition("-")[2])

    def _train(self) -> Outcome:
        arguments = training_arguments(self.settings, self.folder.path)
        task = ranks.agreed(lambda: prepare(self.settings, arguments, self.notify))
        ranks.check_alike(task.fingerprint, "data")
        ranks.first(lambda: self.folder.check_data(task.fingerprint))
        method = build(self.settings.method, self.settings.method_options)
        if "learning_rate" not in self.settings.training:
            width, times = task.model.config.get_text_config().hidden_size, method.rate([*self._sites(task).values()])
            arguments.learning_rate = default_rate(width) * times
            factor = "" if times == 1 else f" times {times:.3g} for {method.name}"
            self.copies_rate = default_rate(width) if self.copies_rate is None else self.copies_rate
            self.notify(
                f"learning rate {arguments.learning_rate:.2g}, from the model's width{factor}; --learning-rate sets it"
            )
        trial = Trial(
            task,
            self.settings,
            arguments,
            tuple(self._sites(task)),
            lambda method: self._attach(task, method),
            self.notify,
            self.console,
        )
        chosen = settle(method, trial, self.folder, self.recorder)
        handle = ranks.agreed(lambda: self._attach(task, chosen))
        divide(handle, arguments, self.checkpoint, self.notify, sharded=self.settings.shard)
        trainer = self._trainer(task, handle, arguments)
        self._announce(task, handle, trainer)
        held = _limited(task.data.eval, self.settings.eval_limit)
        self.prefix = shorten(trainer, task, self.settings, held, self.folder.path, self.notify)
        judging = Judging(
            trainer,
            handle,
            self.recorder,
            self.folder,
            keep_best=self.settings.keep_best,
            stop=self.settings.early_stopping,
        )
        judging.recall(self._step())
        before = self._first_evaluation(trainer)
        judging.add()
        watch = Watch(task, trainer, handle, self.recorder, self.folder, self.notify)
        watch.before(resumed=self.checkpoint is not None)
        self._estimate(task, trainer)
        first = self._first_answers(task, handle)
        interrupt, bar = Interrupt(self.notify), Bar(self.console, trainer.meter)
        timing, announcing = Timing(trainer.meter), Announcing(self.notify, handle)
        for callback in (timing, announcing, Recording(self.recorder, timing, handle), judging, interrupt, bar):
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        except StoppedThereError:
            pass  # nothing left to train
        finally:
            bar.close()
            interrupt.restore()
        if ranks.any_of(interrupt.requested) and trainer.state.global_step < trainer.state.max_steps:
            return self._interrupted(trainer, before)
        return self._done(task, handle, trainer, judging, watch, before, first)

    def _attach(self, task: Task, method: Method) -> Handle:
        settings = self.settings
        head = [path for path in task.head if path not in settings.modules_to_save]
        handle = attach(
            task.model,
            method,
            settings.targets,
            exclude=settings.exclude,
            rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern,
            modules_to_save=[*settings.modules_to_save, *head],
            seed=settings.seed,
            sample=None if method.evidence() is None else self._sample(task),
        )
        _fuse(task, handle)
        return handle

    def _sites(self, task: Task) -> dict[str, Shape]:
        """Path → shape of the layers that `_attach` will adapt."""
        modules = Modules.of(task.model)
        saved = saved_paths(modules, [*self.settings.modules_to_save, *task.head])
        paths = choose(task.model, modules, self.settings.targets, self.settings.exclude, saved)
        return {path: site.shape for path, site in zip(paths, modules.sites(paths), strict=True)}

    def _sample(self, task: Task) -> Sample:
        """A few batches of the training data, evenly chosen, for methods that look at data first."""
        size = int(self.settings.training["per_device_train_batch_size"])
        records = _limited(task.data.train, SAMPLE_BATCHES * size)
        self.notify(f"looks at {len(records)} training records before the first step, as the initialiser asks")
        batches = [task.collator(records[start : start + size]) for start in range(0, len(records), size)]
        return Sample(batches, loss=lambda model, batch: task.objective.loss(model, batch, None))

    def _trainer(self, task: Task, handle: Handle, arguments: Any) -> AdapterTrainer:
        held = _limited(task.data.eval, self.settings.eval_limit)
        trainer = AdapterTrainer(
            handle=handle,
            objective=task.objective,
            lengths=[len(one) for one in task.data.train],
            base_model=task.located.name,
            model=task.model,
            args=arguments,
            train_dataset=Records(task.data.train),
            eval_dataset=Records(held) if held else None,
            data_collator=task.layout,
            processing_class=task.tokenizer,
            copies_rate=self.copies_rate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def _announce(self, task: Task, handle: Handle, trainer: AdapterTrainer) -> None:
        arguments, settings = trainer.args, self.settings
        size, steps = trainer.records_per_step(), trainer.planned_steps()
        own = handle.copies and self.copies_rate not in (None, arguments.learning_rate)
        full = f" (modules trained in full: {self.copies_rate:.2g})" if own else ""
        self.notify(handle.summary())
        self.notify(
            f"{steps:,} steps of {size} records{_divided(arguments)}, "
            f"learning rate {arguments.learning_rate:.2g}{full}, "
            f"{arguments.lr_scheduler_type.value} schedule; {task.objective.description}"
        )
        if self.checkpoint is not None:
            self.notify(f"goes on from step {self._step()}")
        resolved = {
            "model": task.located.name,
            "method": settings.method,
            **handle.method.settings(),
            "learning_rate": arguments.learning_rate,
            "sites": len(handle.sites),
            "trainable": handle.num_trainable,
            "total": handle.num_total,
            "share": handle.num_trainable / handle.num_total,
            "train_steps": steps,
            "records_per_step": size,
            "processes": ranks.count(),
            "task": task.objective.task,
        }
        self.recorder.write("config", config=settings.model_dump(), resolved=resolved)
        self.recorder.write(
            "environment", **environment(arguments.device, next(task.model.parameters()).dtype, settings.seed)
        )
        self.recorder.write("data", **task.data.info)

    def _first_evaluation(self, trainer: AdapterTrainer) -> float | None:
        """The held-out loss before the first step: measured once, remembered when the run goes on."""
        if trainer.eval_dataset is None:
            return None
        known = ranks.first(self.folder.first_evaluation)
        if known is not None and self.checkpoint is not None:
            return known
        metrics = trainer.evaluate()
        self.recorder.write(
            "evaluation", step=0, **{key.removeprefix("eval_"): value for key, value in metrics.items()}
        )
        self.notify(f"held-out loss before training: {metrics['eval_loss']:.3f}")
        return metrics["eval_loss"]

    def _estimate(self, task: Task, trainer: AdapterTrainer) -> None:
        """Says how long training will take, from the measured speed of a forward pass."""
        rate = trainer.forward_rate()
        steps = trainer.planned_steps() - self._step()
        per_record = sum(map(len, task.data.train)) / len(task.data.train)
        seconds = steps * trainer.records_per_step() * per_record * COST_OF_A_STEP / rate
        self.notify(f"training will take about {duration(seconds)} (from {rate:,.0f} tokens/s in evaluation)")

    def _first_answers(self, task: Task, handle: Handle) -> list[str]:
        with handle.disabled():
            made = answers(task.model, task.tokenizer, task.samples, self.settings.max_new_tokens)
        if self.checkpoint is None:
            self._record_answers(task, made, "before")
        return made

    def _record_answers(self, task: Task, made: Sequence[str], phase: str) -> None:
        for index, (sample, output) in enumerate(zip(task.samples, made, strict=True)):
            self.recorder.write(
                "sample", phase=phase, index=index, prompt=sample.prompt, output=output, gold=sample.gold
            )

    def _interrupted(self, trainer: AdapterTrainer, before: float | None) -> Outcome:
        step = trainer.state.global_step
        path = self.folder.path / f"checkpoint-{step}"
        outcome = self._outcome("interrupted", path, trainer, before, None, ())
        self.recorder.write("end", **outcome.figures(), adapter=path.name, message="stopped by the user")
        return outcome

    def _done(
        self,
        task: Task,
        handle: Handle,
        trainer: AdapterTrainer,
        judging: Judging,
        watch: Watch,
        before: float | None,
        first: Sequence[str],
    ) -> Outcome:
        after = None
        if trainer.eval_dataset is not None:
            evaluated = trainer.last_evaluated == trainer.state.global_step
            after = trainer.last_loss if evaluated else trainer.evaluate()["eval_loss"]
        verdict, kept = judging.verdict(), judging.restore()
        if judging.stopped is not None:
            self.notify(f"stopped at step {trainer.state.global_step:,} of {trainer.state.max_steps:,}: it overfits")
        if kept is not None:
            after = kept.mean
        self._tell_best(handle, trainer)
        findings = watch.after(judging.evaluations, trainer.last_records if kept is None else kept)
        self.prefix.remove()
        last = answers(task.model, task.tokenizer, task.samples, self.settings.max_new_tokens)
        self._record_answers(task, last, "after")
        if ranks.speaks() or is_sharded(handle):
            handle.save(self.folder.adapter, base_model=task.located.name, task_type=task.objective.task_type)
        if ranks.speaks():
            task.tokenizer.save_pretrained(self.folder.adapter)
            if not isinstance(task.data, Data):
                headed(task).write(self.folder.adapter)
        shown = tuple(
            Shown(sample.prompt, sample.gold, old, new)
            for sample, old, new in zip(task.samples, first, last, strict=True)
        )
        judging.remove()
        outcome = replace(
            self._outcome("done", self.folder.adapter, trainer, before, after, shown),
            findings=findings,
            unit=task.objective.unit,
        )
        if verdict is not None:
            hints = verdict.hints if findings.slices is None else (*verdict.hints, *findings.slices.hints)
            told = Told(verdict.kind.value, verdict.sentence, hints, trainer.restored)
            outcome = replace(outcome, verdict=told)
            self.recorder.write("verdict", **asdict(told))
        self.recorder.write("end", **outcome.figures(), adapter=self.folder.adapter.name, message="")
        result = {
            **outcome.figures(),
            "resumed_from": outcome.resumed_from,
            "unit": outcome.unit,
            "agreement": agreed(self.folder, trainer.restored or trainer.state.global_step),
            "shown": [asdict(one) for one in shown],
            "verdict": None if outcome.verdict is None else asdict(outcome.verdict),
            "findings": findings.as_json(),
        }
        ranks.first(lambda: self.folder.finish(result))  # the last thing: all end when it is there
        return outcome

    def _tell_best(self, handle: Handle, trainer: AdapterTrainer) -> None:
        """Where the best adapter was put back: what the schedule has of it, which need not be what it aimed at."""
        facts = schedule_facts(handle)
        if trainer.restored is None or not facts:
            return
        self.recorder.write("schedule", **{**facts, "step": trainer.state.global_step})
        budget, ranks = facts.get("budget"), facts.get("ranks")
        if budget is not None and ranks is not None and sum(ranks.values()) > budget:
            self.notify(
                f"the best adapter is of step {trainer.restored:,}, before the budget was reached: "
                f"{sum(ranks.values()):,} triplets, not {budget:,}"
            )

    def _outcome(
        self,
        status: str,
        adapter: Path,
        trainer: AdapterTrainer,
        before: float | None,
        after: float | None,
        shown: tuple[Shown, ...],
    ) -> Outcome:
        return Outcome(
            status=status,
            folder=self.folder,
            adapter=adapter,
            steps=trainer.state.global_step,
            resumed_from=self._step(),
            eval_before=before,
            eval_after=after,
            train_seconds=trainer.meter.total_seconds,
            seconds=time.perf_counter() - self.started,
            **peaks(),
            shown=shown,
        )


def _divided(arguments: Any) -> str:
    """How the records of a step are shared out, where there is more than one way to it."""
    if ranks.count() == 1:
        return ""
    accumulated = arguments.gradient_accumulation_steps
    times = f" × {accumulated} accumulated" if accumulated > 1 else ""
    return f" ({arguments.train_batch_size} in each of {ranks.count()} processes{times})"


def _fuse(task: Task, handle: Handle) -> None:
    """Has layers that read the same input computed as one: the shortest record, whole as some models want it, shows."""
    shortest: Any = min(task.data.train, key=len)
    batch = task.collator([shortest])
    device = task.model.get_input_embeddings().weight.device
    handle.fuse(**{key: value.to(device) for key, value in inputs_of(batch).items()})


def _limited(records: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of the records, evenly spaced."""
    if limit is None or limit >= len(records):
        return records
    return [records[place * len(records) // limit] for place in range(limit)]
