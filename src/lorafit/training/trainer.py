"""`transformers.Trainer` around an adapter: its loop, our optimizer, loss, order of data, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments

from lorafit import files
from lorafit.distributed import is_sharded
from lorafit.errors import CheckpointError, LorafitError, TrainingError
from lorafit.handle import Handle
from lorafit.sharded import in_parts, share_state, whole_state
from lorafit.state import load_state, save_state
from lorafit.training import ranks
from lorafit.training.batches import LengthBucketSampler, SharedBatches
from lorafit.training.meter import Meter
from lorafit.training.objectives import COLUMNS, COUNTS, LOSSES, Objective, Tally, mean_loss
from lorafit.training.owned import COMPLETE, DAMAGE, without
from lorafit.training.prefix import Computed, Prefix
from lorafit.training.recompute import FrozenInputs
from lorafit.training.recompute_cheap import Keeping, KeepsAll
from lorafit.training.verdict import Evaluation

TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


class DivergedError(TrainingError):
    """The loss of a run is not finite."""


def records_per_step(arguments: TrainingArguments) -> int:
    """Records that go into one optimizer step, over all processes."""
    return int(arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size)


def steps_per_epoch(arguments: TrainingArguments, records: int) -> int:
    """Optimizer steps of one pass over so many records."""
    batches = math.ceil(records / (arguments.train_batch_size * arguments.world_size))
    steps: int = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return steps


def planned_steps(arguments: TrainingArguments, records: int) -> int:
    """Optimizer steps of a whole run on so many records."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    steps: int = math.ceil(steps_per_epoch(arguments, records) * arguments.num_train_epochs)
    return steps


def records_in_all(arguments: TrainingArguments, records: int) -> int:
    """Records that a whole run on so many trains on, each as often as it comes up."""
    return planned_steps(arguments, records) * records_per_step(arguments)


def settle_warmup(arguments: TrainingArguments, records: int) -> None:
    """Takes away a warm-up that is a share of the run and comes to less than one step.

    The trainer rounds it up to a whole step, whose rate is 0: a short run would lose much of what it learns, and a run
    of one step all of it.
    """
    if 0 < arguments.warmup_steps < 1 and arguments.warmup_steps * planned_steps(arguments, records) < 1:
        arguments.warmup_steps = 0


def check_engine(handle: Handle, *, deepspeed: bool) -> None:
    """Raises `TrainingError` for a method with a schedule in DeepSpeed's hands."""
    if deepspeed and handle.schedule is not None:
        raise TrainingError(
            f"{handle.method.name} works on its parameters around the step; DeepSpeed's optimizer has copies of them",
            where="the configuration of `accelerate launch`",
            found="distributed_type: DEEPSPEED",
            expected="a method without a schedule (LoRA, LoRA+, DoRA, VeRA, ...), or another engine",
            fix="torchrun -m lorafit train, with --shard where the model is too large",
        )


@contextmanager
def _reading(checkpoint: str | Path, names: str) -> Iterator[None]:
    """Whatever a damaged file of a checkpoint leads to is a `CheckpointError` that says how to go on."""
    folder = Path(checkpoint)
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            error.message, found=error.found, expected=error.expected, where=error.where or folder, fix=without(folder)
        ) from error
    except LorafitError:
        raise
    except DAMAGE as error:
        raise CheckpointError(
            "the checkpoint is damaged",
            where=f"{folder}: {names}",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="the files as the run wrote them",
            fix=without(folder),
        ) from error


class AdapterTrainer(Trainer):
    """Trains one adapter of a model.

    Args:
        handle: the adapter.
        objective: what is minimised.
        lengths: tokens of each training record.
        base_model: the base model's name, for the adapter's files.
        copies_rate: the learning rate of modules trained in full; None for that of the rest.
        args: the training arguments; a warm-up of less than one step is taken away from them.
        options: what `transformers.Trainer` takes.
    """

    loss_is_scaled_for_ga = True
    optimizer: torch.optim.Optimizer | None
    control: Any

    def __init__(
        self,
        *,
        handle: Handle,
        objective: Objective,
        lengths: Sequence[int],
        base_model: str,
        args: TrainingArguments,
        copies_rate: float | None = None,
        **options: Any,
    ) -> None:
        settle_warmup(args, len(lengths))
        super().__init__(args=args, **options)
        check_engine(handle, deepspeed=self.is_deepspeed_enabled)
        self.handle = handle
        self.sharded = is_sharded(handle)
        if self.sharded:  # what Trainer calls so is a model whose place and gradients are none of accelerate's business
            self.is_distributed_loading_by_transformers = True
        self.copies_rate = copies_rate
        self.objective = objective
        self.meter = Meter()
        self.last_evaluated = -1
        self.last_rate = math.nan
        self.last_loss = math.nan
        self.last_records: Evaluation | None = None
        self.restored: int | None = None
        self.prefix: Prefix = Computed()
        self.keeping: Keeping = KeepsAll()
        self._own: torch.optim.Optimizer | None = None
        self._lengths = lengths
        self._base_model = base_model
        # Makes Trainer count the supervised tokens of all accumulated batches, by which the loss is then divided.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = objective.task_type == "CAUSAL_LM"
        self.add_callback(FrozenInputs())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rate = options.pop("lr")
            optimizer: torch.optim.Optimizer = self.handle.optimizer(
                kind,
                lr=rate,
                total_steps=self.planned_steps(),
                copies_lr=self.copies_rate,
                weight_decay=self.args.weight_decay,
                **options,
            )
            self.optimizer = self._own = optimizer
            return optimizer
        kept: torch.optim.Optimizer = self.optimizer
        return kept

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        learnt = self.objective.counted(inputs)
        self.meter.count(self.objective.tokens(inputs) if learnt else 0, learnt)  # none: an idle record, see `Records`
        with self.prefix.over(inputs), self.keeping.over():
            loss = self.objective.loss(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss.detach()):
            raise DivergedError(
                "the loss is not finite",
                where=f"step {self.state.global_step + 1}",
                found=loss.item(),
                expected="a finite loss",
                fix="lower the learning rate or warm up for longer (warmup_steps); in float16, use bfloat16 instead",
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean over held-out predictions (not over batches), added up over processes."""
        started = time.perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        tokens = 0
        parts = []
        try:
            # A loader draws from torch's generator: evaluating must not change what training draws next.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for batch in loader:
                    tokens += self.objective.tokens(batch)
                    batch = self._prepare_inputs(batch)
                    with self.accelerator.autocast(), self.prefix.over(batch):
                        tally = self.objective.tally(model, batch)
                    parts.append(self._of_all(tally))
        finally:
            model.train(was_training)
        table = torch.cat(parts) if parts else torch.zeros(0, len(COLUMNS), dtype=torch.float64)
        losses, counts = table[:, LOSSES], table[:, COUNTS]
        count = counts.sum().item()
        loss = mean_loss(losses.sum().item(), count)
        self.last_evaluated, self.last_loss = self.state.global_step, loss
        self.last_records = Evaluation.of(self.state.global_step, losses.tolist(), counts.tolist())
        seconds = time.perf_counter() - started
        self.last_rate = ranks.total([tokens])[0] / seconds
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            **{f"{metric_key_prefix}_{name}": value for name, value in self.objective.figures(table).items()},
            f"{metric_key_prefix}_supervised_tokens": count,
            f"{metric_key_prefix}_seconds": seconds,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _of_all(self, tally: Tally) -> torch.Tensor:
        """The records of a batch, those of other processes among them."""
        if self.accelerator.num_processes == 1:
            return tally.stacked()
        gathered: torch.Tensor = self.accelerator.gather_for_metrics(tally.stacked().to(self.args.device))
        return gathered.cpu()

    def forward_rate(self) -> float:
        """Tokens per second of a forward pass, of all processes: as the last evaluation had it, else of one batch."""
        if not math.isnan(self.last_rate):
            return self.last_rate
        count = min(len(self._lengths), self.args.train_batch_size)
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[index] for index in range(count)]))
        started = time.perf_counter()
        with torch.no_grad(), self.accelerator.autocast():
            self.objective.tally(self.model, batch)
        return self.objective.tokens(batch) * ranks.count() / (time.perf_counter() - started)

    def records_per_step(self) -> int:
        """Records that go into one optimizer step, over all processes."""
        return records_per_step(self.args)

    def planned_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return planned_steps(self.args, len(self._lengths))

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBucketSampler:
        return LengthBucketSampler(self._lengths, self.records_per_step(), self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process; of several ones, those that `SharedBatches` gives it, which no loader splits."""
        args = self.args
        if args.world_size == 1:
            alone: DataLoader[Any] = super().get_train_dataloader()
            return alone
        batches = SharedBatches(
            self._get_train_sampler(),
            args.train_batch_size,
            number=args.process_index,
            count=args.world_size,
            drop_last=args.dataloader_drop_last,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        own: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return own

    def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            # accelerate passes on what newer releases of torch have under two other names.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return super()._prepare_for_training(*args, **options)

    # A sharded model is on its device already, and `to` is nothing for it.
    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not in_parts(model):
            super()._move_model_to_device(model, device)

    # `shard` averages what it keeps whole by itself.
    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        pass

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _writes(self) -> bool:
        """Whether this process has a part in writing files of the adapter: all do where each has a part of it."""
        return bool(self.args.should_save) or self.sharded

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self._writes():
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.handle.save(folder, base_model=self._base_model, task_type=self.objective.task_type)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            self.prefix.commit()
            # One after the other: what all gather together, none may come to while another is on its way out.
            ranks.agreed(partial(super()._save_checkpoint, model, trial))
            if self._writes() or ranks.count() > 1:
                ranks.agreed(partial(self._save_state, folder))
        except (OSError, RuntimeError, CheckpointError) as error:  # torch reports a full disk as a RuntimeError
            if ranks.is_lost(error) or isinstance(error, ranks.EchoError):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.args.output_dir).free / 2**20
            raise TrainingError(
                "the checkpoint cannot be written",
                where=folder,
                found=f"{type(error).__name__}: {error}; {free:,.0f} MiB free",
                expected="a folder with enough free space",
                fix="free some space; the same command then goes on from the checkpoint before",
            ) from error
        if self.args.should_save and folder.is_dir():
            # Last of all: a checkpoint without it was cut off by a kill and is not resumed from.
            files.write_text(folder / COMPLETE, json.dumps({"step": self.state.global_step}))

    def _save_state(self, folder: Path) -> None:
        if self._writes():
            save_state(self.handle, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self._own is not None
        state, folder = whole_state(self._own.state_dict()), Path(output_dir)

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

        ranks.first(write)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with _reading(folder, "lorafit_state.safetensors"):
            load_state(self.handle, folder)
        with _reading(folder, TRAINER_STATE):
            state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
            # Trainer reads it again, and only there would stumble over what is no state.
            if f"checkpoint-{state.global_step}" != folder.name or not isinstance(state.stateful_callbacks, dict):
                raise ValueError(f"the state of step {state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _reading(checkpoint, "optimizer.pt or scheduler.pt"):
                super()._load_optimizer_and_scheduler(checkpoint)
                if self._own is not None:
                    share_state(self._own)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _reading(checkpoint, "scaler.pt"):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _reading(checkpoint, "rng_state.pth"):
                super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_state(self.handle, self.state.best_model_checkpoint)
        self.restored = int(Path(self.state.best_model_checkpoint).name.rpartition("-")[2])
        self.last_evaluated = -1  # the last evaluation was of other values than these
