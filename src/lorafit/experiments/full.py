"""All weights trained, or the head alone, with no adapter: the references that adapters are held against.

The data, their order, the objective, the batches and the evaluation are those of `training/run.py`; the loop and the
checkpoints are `transformers.Trainer`'s.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from lorafit import files
from lorafit.errors import ConfigError
from lorafit.experiments.trained import Everything, Trained
from lorafit.experiments.trial import Notify
from lorafit.training import memory
from lorafit.training.batches import LengthBucketSampler
from lorafit.training.callbacks import Interrupt, Timing, terminated
from lorafit.training.config import Settings
from lorafit.training.folder import open_folder
from lorafit.training.meter import Meter
from lorafit.training.models import default_rate
from lorafit.training.objectives import Objective, mean_loss
from lorafit.training.owned import COMPLETE
from lorafit.training.prepare import Task, prepare, training_arguments
from lorafit.training.record import Recorder, environment
from lorafit.training.trainer import DivergedError, planned_steps, records_per_step, settle_warmup

BEST = "best"
STEP = "step.json"


def train_full(settings: Settings, notify: Notify, trained: Trained | None = None) -> float | None:
    """Trains all weights or some, or goes on where it was stopped; the folder then has them.

    Args:
        settings: of the run; those of the method are not used.
        notify: is told what is decided.
        trained: which weights; all of them if None.

    Returns:
        The held-out loss of what was kept: of the evaluation with the lowest, or the last one.

    Raises:
        LorafitError: settings, data or model do not do.
        KeyboardInterrupt: it was stopped; a checkpoint is saved.
    """
    if settings.quantise != "none":
        raise ConfigError(
            "the weights of a quantised base cannot be trained",
            where="quantise",
            found=settings.quantise,
            expected="none, where all weights are trained",
            fix="leave quantise out, or the reference",
        )
    trained = Everything() if trained is None else trained
    folder = open_folder(settings)
    recorder = Recorder(folder.records)
    checkpoint = newest(folder.path)
    recorder.write("run", run=trained.name, command=trained.name, resumed_from_step=_step(checkpoint))
    with terminated():
        # Weights that are trained are kept in 32 bits, whatever the frozen base of an adapter may be in.
        arguments = training_arguments(settings, folder.path)
        task = prepare(settings.model_copy(update={"dtype": "float32"}), arguments, notify)
        folder.check_data(task.fingerprint)
        if "learning_rate" not in settings.training:
            arguments.learning_rate = default_rate(task.model.config.get_text_config().hidden_size) * trained.times
        trained.choose(task.model)
        best = folder.path / BEST if settings.keep_best else None
        trainer = WholeTrainer(task, arguments, recorder, best, trained)
        parameters = [one for one in task.model.parameters() if one.requires_grad]
        resolved = {
            "method": trained.name,
            "learning_rate": arguments.learning_rate,
            "trainable": sum(one.numel() for one in parameters),
            "train_steps": planned_steps(arguments, len(task.data.train)),
        }
        recorder.write("config", config=settings.model_dump(), resolved=resolved)
        recorder.write("environment", **environment(arguments.device, torch.float32, settings.seed))
        recorder.write("data", **task.data.info)
        if checkpoint is None and trainer.eval_dataset is not None:
            trainer.evaluate()
        return _trained(trainer, task, folder.path, checkpoint, trained, notify)


def _trained(
    trainer: WholeTrainer, task: Task, folder: Path, checkpoint: Path | None, trained: Trained, notify: Notify
) -> float | None:
    interrupt = Interrupt(notify)
    trainer.add_callback(interrupt)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.restore()
    state = trainer.state
    if interrupt.requested and state.global_step < state.max_steps:
        raise KeyboardInterrupt
    loss = None
    if trainer.eval_dataset is not None:
        loss = trainer.kept_loss if trainer.evaluated == state.global_step else trainer.evaluate()["eval_loss"]
        loss = trainer.restore(loss)
    trained.save(task, folder)
    shutil.rmtree(folder / BEST, ignore_errors=True)
    return loss


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; None for none."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


@final
class WholeTrainer(Trainer):
    """Trains weights of a task's model on the task's objective.

    Args:
        task: model, data and objective.
        arguments: of training.
        recorder: is told steps and evaluations.
        best: the folder to keep the weights of the lowest held-out loss in; None keeps the last ones.
        trained: which weights are trained.
    """

    control: Any

    def __init__(self, task: Task, arguments: Any, recorder: Recorder, best: Path | None, trained: Trained) -> None:
        lengths = [len(one) for one in task.data.train]
        settle_warmup(arguments, len(lengths))
        super().__init__(
            model=task.model,
            args=arguments,
            train_dataset=list(task.data.train),
            eval_dataset=list(task.data.eval) or None,
            data_collator=task.layout,
            processing_class=task.tokenizer,
        )
        self.meter = Meter()
        self.evaluated, self.kept_loss = -1, math.nan
        self._objective: Objective = task.objective
        self._recorder = recorder
        self._best = best
        self._trained = trained
        self._lengths: Sequence[int] = lengths
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        timing = Timing(self.meter)
        for callback in (timing, _Steps(recorder, timing)):
            self.add_callback(callback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._trained.settle(model)
        self.meter.count(self._objective.tokens(inputs), self._objective.counted(inputs))
        loss = self._objective.loss(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss.detach()):
            raise DivergedError("the loss is not finite", where=f"step {self.state.global_step + 1}", found=loss.item())
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean over held-out predictions, as `AdapterTrainer.evaluate` has it."""
        started = time.perf_counter()
        self.model.eval()
        losses, counts = [0.0], [0.0]
        # A loader draws from torch's generator: evaluating must not change what training draws next.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in self.get_eval_dataloader(eval_dataset):
                tally = self._objective.tally(self.model, self._prepare_inputs(batch))
                losses += tally.losses.tolist()
                counts += tally.counts.tolist()
        self.model.train()
        loss, step = mean_loss(math.fsum(losses), math.fsum(counts)), self.state.global_step
        seconds = time.perf_counter() - started
        self._recorder.write("evaluation", step=step, loss=loss, seconds=seconds)
        self.evaluated, self.kept_loss = step, loss
        if self._best is not None and step and loss <= self._lowest():
            self.model.save_pretrained(self._best)
            files.write_text(self._best / STEP, json.dumps({"step": step, "loss": loss}))
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _lowest(self) -> float:
        kept = self._kept()
        # What a process that was killed kept after the checkpoint from which this one went on is not of this run.
        return math.inf if kept is None or kept["step"] > self.state.global_step else float(kept["loss"])

    def _kept(self) -> dict[str, Any] | None:
        path = None if self._best is None else self._best / STEP
        return json.loads(path.read_text()) if path is not None and path.is_file() else None

    def restore(self, loss: float) -> float:
        """Puts the best weights back if they are not the last ones; gives their held-out loss."""
        kept = self._kept()
        if kept is None or kept["step"] == self.state.global_step or not kept["loss"] < loss:
            return loss
        assert self._best is not None
        best = type(self.model).from_pretrained(self._best, dtype=torch.float32)
        self.model.load_state_dict(best.state_dict())
        return float(kept["loss"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthBucketSampler(self._lengths, records_per_step(self.args), self.args.seed)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        super()._save_checkpoint(model, trial)
        # Last of all: a checkpoint without it was cut off by a kill and is not gone on from.
        files.write_text(folder / COMPLETE, json.dumps({"step": self.state.global_step}))


@final
class _Steps(TrainerCallback):
    """Writes steps into the records."""

    def __init__(self, recorder: Recorder, timing: Timing) -> None:
        self._recorder = recorder
        self._timing = timing

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            kept = {key: logs.get(key) for key in ("loss", "learning_rate", "grad_norm")}
            self._recorder.write(
                "step",
                step=state.global_step,
                epoch=state.epoch,
                **kept,
                **self._timing.figures,
                **memory.peaks(),
            )
