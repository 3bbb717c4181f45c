"""The loss of a causal language model, with logits for the tokens that are learnt and for no others.

In fine-tuning most tokens are prompt or padding, and a model's own loss computes a row of logits for each. How
they can be left out depends on the model: `SupervisedLoss.prepare` tries it once on a tiny batch and takes the
first way that gives exactly the model's own loss:

* `HeadRows`: only the hidden states in front of a learnt token enter the output head.
* `KeptColumns`, for models that do something to the logits after the head (soft-capping, scaling): the model is
  asked for the logits of those positions at which any sequence of the batch learns (`logits_to_keep`).
* `FullLogits`: the model's own loss. Mixtures of experts whose router has a loss need it.

All of them run the model's own forward, so what wraps it (DistributedDataParallel, FSDP, autocast, gradient
checkpointing) works as always.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from lorafit.errors import DataError, TrainingError
from lorafit.rest import at_rest
from lorafit.training.batches import RECORDS, TOKENS
from lorafit.training.crossentropy import (
    FrozenMatrix,
    Head,
    each_cross_entropy,
    needs_autograd,
    summed_cross_entropy,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = 64
"""Of a head's output, so many are looked at to see whether it is its matrix' product."""
IGNORED = -100
"""The label of a token that is not learnt."""

Batch = Mapping[str, Tensor]


class Losses(NamedTuple):
    """A loss before it is summed.

    Attributes:
        values: `[learnt tokens]`, float32, the loss of each.
        records: `[learnt tokens]`, int64, to which record of the batch each belongs, from 0.
    """

    values: Tensor
    records: Tensor


class _Reduce(Protocol):
    """What becomes of hidden states under a head: `summed_cross_entropy` or `each_cross_entropy`."""

    def __call__(self, hidden: Tensor, targets: Tensor, head: Head, *, through_head: bool, chunk: int) -> Tensor: ...


class _Learnt(NamedTuple):
    """Where a batch learns: `mask` is `[batch, length - 1]`, true at a position whose next token is learnt."""

    mask: Tensor
    targets: Tensor  # [rows]: the tokens learnt, in the order of the mask

    @staticmethod
    def of(labels: Tensor) -> _Learnt:
        following = labels[:, 1:]
        mask = following != IGNORED
        return _Learnt(mask, following[mask])


class SupervisedLoss(ABC):
    """The loss of a causal language model on the learnt tokens of a batch; see `prepare`.

    Attributes:
        name: `rows`, `columns` or `full`.
        description: the same in a few words, for the user.
    """

    name: ClassVar[str]
    description: ClassVar[str]

    @staticmethod
    def prepare(model: PreTrainedModel, *, chunk: int | None = None) -> SupervisedLoss:
        """Choose how to compute the loss of `model`, by trying on a batch of eight tokens.

        Args:
            model: a causal language model, on its device, not yet wrapped. It is left as it was.
            chunk: rows of logits to hold at once; by default 192 on a CPU (more are no faster, and far
                fewer are slower) and 1,024 elsewhere.

        Raises:
            TrainingError: the model is not a causal language model.
        """
        return _choose(model, chunk)

    @final
    def __call__(self, model: nn.Module, batch: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss to train on.

        Args:
            model: the prepared model or what wraps it, such as DistributedDataParallel.
            batch: what the model's forward takes, with `labels` `[batch, length]`, `IGNORED` where a token is not
                learnt. The label of a position is the token *at* that position; the shift is made here.
            num_items_in_batch: if given, the sum over the learnt tokens is divided by it instead of by their
                number: the learnt tokens of all the batches whose gradients are accumulated, as
                transformers.Trainer counts them. (Trainer multiplies by the number of processes, because
                their gradients are averaged; this does not.)

        Returns:
            A scalar in float32.

        Raises:
            DataError: no token is learnt and `num_items_in_batch` is not given: a mean over nothing.
        """
        learnt = _Learnt.of(batch["labels"])
        count = len(learnt.targets)
        if num_items_in_batch is None and count == 0:
            raise DataError(
                "the batch has no token to learn",
                found=f"labels of shape {tuple(batch['labels'].shape)}, all {IGNORED} after the first position",
                expected="at least one label that is a token",
                fix="leave out records without an answer; max_length may have cut it off",
            )
        total = self._reduced(model, batch, learnt, summed_cross_entropy, own_terms=True)
        if num_items_in_batch is None:
            return total / count
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    @final
    def each(self, model: nn.Module, batch: Batch) -> Losses:
        """The cross-entropy of each learnt token. Call it under `torch.no_grad()`."""
        learnt = _Learnt.of(batch["labels"])
        values = self._reduced(model, batch, learnt, each_cross_entropy, own_terms=False)
        # A token belongs to the record of the place from which it is predicted, the one before its own.
        if RECORDS in batch:
            records = batch[RECORDS][:, :-1]
        else:
            records = torch.arange(len(learnt.mask), device=learnt.mask.device)[:, None].expand_as(learnt.mask)
        return Losses(values, records[learnt.mask].to(values.device))

    @abstractmethod
    def _reduced(self, model: nn.Module, batch: Batch, learnt: _Learnt, reduce: _Reduce, *, own_terms: bool) -> Tensor:
        """What `reduce` gives for the learnt tokens; with `own_terms` and a sum, what the model adds to its loss, too.

        That is then times the number of learnt tokens.
        """


@final
class HeadRows(SupervisedLoss):
    """Only hidden states in front of a learnt token enter the output head, a chunk of rows at a time."""

    name = "rows"
    description = "logits for the learnt tokens alone"

    def __init__(self, head: nn.Module, options: Mapping[str, Any], chunk: int) -> None:
        self._head = head
        self._options = options
        self._chunk = chunk

    def _reduced(self, model: nn.Module, batch: Batch, learnt: _Learnt, reduce: _Reduce, *, own_terms: bool) -> Tensor:
        if isinstance(model, nn.DataParallel):
            raise TrainingError(
                "nn.DataParallel runs copies of the model in threads, which share the hook this loss needs",
                fix="start one process for each device: torchrun --nproc-per-node=N",
            )
        with _Tap(self._head, learnt, reduce, self._chunk) as tap:
            model(**_inputs(batch), **self._options)
        if tap.result is None:
            raise TrainingError(
                "the model's forward did not call the output head it had when the loss was prepared",
                found=f"an output head of type {type(self._head).__name__}",
                fix="prepare the loss after the last change to the model's modules and before compiling it",
            )
        return tap.result


class _Tap:
    """Takes the hidden states in front of the output head of a running forward, and computes the loss there.

    Inside the forward, because there the head's weights are gathered (FSDP) and autocast is on (accelerate
    enters it around forward alone). The head proper then gets one row, detached, whose output tells whether the
    head is trained and goes on through the model as its logits.
    """

    def __init__(self, head: nn.Module, learnt: _Learnt, reduce: _Reduce, chunk: int) -> None:
        self.result: Tensor | None = None
        self._head = head
        self._learnt = learnt
        self._reduce = reduce
        self._chunk = chunk
        self._rows: Tensor | None = None
        self._busy = False

    def __enter__(self) -> _Tap:
        self._hooks = (
            self._head.register_forward_pre_hook(self._before),
            self._head.register_forward_hook(self._after),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._busy:
            return None
        hidden = args[0]
        self._rows = hidden[:, :-1][self._learnt.mask.to(hidden.device)]
        return (hidden[:1, :1].detach(), *args[1:])

    def _after(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._busy or self._rows is None:
            return None
        self._busy = True
        try:
            self.result = self._reduce(
                self._rows,
                self._learnt.targets.to(self._rows.device),
                _bare(head, args[0], output),
                through_head=needs_autograd(output),
                chunk=self._chunk,
            )
        finally:
            self._busy = False
        # DistributedDataParallel looks for unused parameters from the outputs: they must depend on what was used.
        return output + 0.0 * self.result.sum().to(output.dtype)


def _bare(head: nn.Module, row: Tensor, output: Tensor) -> Head:
    """The head as a mere matrix, if it is one whose product with a row is what it returned for it, in training.

    Hooks that others have on it would show there: a few columns are enough to tell.
    """
    if (
        not torch.is_grad_enabled()
        or type(head) is not nn.Linear
        or any(one.requires_grad for one in head.parameters())
    ):
        return head
    weight, bias = head.weight, head.bias
    if weight.shape != (head.out_features, head.in_features) or not all(
        type(one) in (Tensor, nn.Parameter) and one.device == row.device for one in head.parameters()
    ):
        return head
    some = slice(0, COLUMNS)
    own = nn.functional.linear(row, weight[some], None if bias is None else bias[some])
    half = output.dtype in (torch.bfloat16, torch.float16)
    same = torch.allclose(
        own.to(output.dtype), output[..., some], rtol=2e-2 if half else 1e-5, atol=1e-2 if half else 1e-6
    )
    return FrozenMatrix(weight, bias) if same else head


@final
class KeptColumns(SupervisedLoss):
    """Logits of the positions at which any sequence of the batch learns."""

    name = "columns"
    description = "logits for the positions where any sequence of the batch learns"

    def __init__(self, options: Mapping[str, Any], chunk: int) -> None:
        self._options = options
        self._chunk = chunk

    def _reduced(self, model: nn.Module, batch: Batch, learnt: _Learnt, reduce: _Reduce, *, own_terms: bool) -> Tensor:
        columns = learnt.mask.any(dim=0).nonzero().squeeze(1)
        logits = model(**_inputs(batch), **self._options, logits_to_keep=columns).logits
        mask = learnt.mask[:, columns].to(logits.device)
        return _of_logits(logits[mask], learnt.targets, reduce, self._chunk)


@final
class FullLogits(SupervisedLoss):
    """The model's own loss, with logits for every position."""

    name = "full"
    description = "the model's own loss, with logits for every token"

    def __init__(self, options: Mapping[str, Any], chunk: int) -> None:
        self._options = options
        self._chunk = chunk

    def _reduced(self, model: nn.Module, batch: Batch, learnt: _Learnt, reduce: _Reduce, *, own_terms: bool) -> Tensor:
        if own_terms and len(learnt.targets):
            mean: Tensor = model(**_inputs(batch), **self._options, labels=batch["labels"]).loss
            return mean.float() * len(learnt.targets)
        logits = model(**_inputs(batch), **self._options).logits
        rows = logits[:, :-1][learnt.mask.to(logits.device)]
        return _of_logits(rows, learnt.targets, reduce, self._chunk)


def _of_logits(logits: Tensor, targets: Tensor, reduce: _Reduce, chunk: int) -> Tensor:
    targets = targets.to(logits.device)
    through_head = logits.dtype == torch.float16
    return reduce(logits, targets, _unchanged, through_head=through_head, chunk=chunk)


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key not in ("labels", TOKENS, RECORDS)}


def chunk_for(device: torch.device) -> int:
    """Rows of logits to hold at once on a device."""
    return 192 if device.type == "cpu" else 1024


def _choose(model: PreTrainedModel, chunk: int | None) -> SupervisedLoss:
    settings = model.config.to_dict()
    known = inspect.signature(model.forward).parameters
    if settings.get("is_encoder_decoder") or not model.can_generate():
        raise TrainingError(
            "the model is not a causal language model",
            found=type(model).__name__,
            expected="a model that predicts each token from those before it, such as LlamaForCausalLM",
            fix="load it with AutoModelForCausalLM",
        )
    options = {"use_cache": False} if "use_cache" in known else {}
    head = model.get_output_embeddings()
    device = model.get_input_embeddings().weight.device
    if chunk is None:
        chunk = chunk_for(device)
    full = FullLogits(options, chunk)
    if _adds_a_loss(settings):
        return full
    ids = torch.tensor([[0, 1, 2, 1], [2, 0, 1, 0]], device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][0, :2] = IGNORED
    with at_rest(model):
        expected = full(model, batch)
        if head is not None and _ends_in(model, head, _inputs(batch)):
            rows = HeadRows(head, options, chunk)
            if _agree(rows(model, batch), expected, head):
                return rows
        if "logits_to_keep" in known:
            columns = KeptColumns(options, chunk)
            if _agree(columns(model, batch), expected, model):
                return columns
    return full


def _adds_a_loss(settings: Mapping[str, Any]) -> bool:
    """Whether a mixture of experts adds its router's loss; the setting may be in the text part of the settings."""
    parts = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return any(part.get("output_router_logits") for part in parts)


def _ends_in(model: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the model calls `head` once, on the hidden states of all positions, and returns what it returns.

    The head's output is replaced by a pattern, and the model's logits are compared with it. (Comparing logits
    would not do: soft-capping hardly changes the small ones of a model that is not trained yet.)
    """
    calls: list[tuple[Any, Any]] = []

    def replace(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls.append((args, output))
        return _pattern(output) if isinstance(output, Tensor) else output

    hook = head.register_forward_hook(replace)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    match calls:
        case [((Tensor() as hidden, *_), Tensor() as output)]:
            pattern = _pattern(output)
            return hidden.shape[:-1] == inputs["input_ids"].shape and torch.equal(logits.to(pattern), pattern)
    return False


def _pattern(like: Tensor) -> Tensor:
    return torch.linspace(-99.0, 99.0, like.numel(), device=like.device).reshape(like.shape).to(like.dtype)


def _agree(ours: Tensor, expected: Tensor, module: nn.Module) -> bool:
    return torch.allclose(ours, expected.to(ours), rtol=1e-2 if is_half(module) else 1e-4)


def is_half(module: nn.Module) -> bool:
    """Whether some of its parameters have 16 bits, so that results agree to two or three digits only."""
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters())
