"""A run's model without its weights: shapes from the config, adapters attached, ready to be priced batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lorafit.errors import ConfigError, LorafitError, TrainingError
from lorafit.handle import Handle
from lorafit.inject import attach
from lorafit.methods import INNER, build
from lorafit.training.batches import AnyCollator, Collator
from lorafit.training.config import Settings
from lorafit.training.data import Data
from lorafit.training.loss import FullLogits, HeadRows, KeptColumns, SupervisedLoss, chunk_for
from lorafit.training.models import Located, classifier_shape, head_paths
from lorafit.training.objectives import NextToken, Objective
from lorafit.training.packing import PackingCollator
from lorafit.training.planning_machine import Rates
from lorafit.training.planning_shades import Ledger, held_bytes, shades
from lorafit.training.pooling import pooling_of
from lorafit.training.prefix_trial import undisturbed
from lorafit.training.prepare import check_unpacked, labelled, lay_out
from lorafit.training.quantised import STORAGES, check_plain, layers, shapes, sketch
from lorafit.training.recompute_cheap import CheapAgain, Keeping, KeepsAll, find_places
from lorafit.training.valued import AnyData, class_names


@final
@dataclass(frozen=True)
class Sizes:
    """Bytes that a run holds all the time.

    Attributes:
        base: weights of the model.
        adapter: what is trained, and what comes with it.
        gradients: of what is trained.
        optimizer: its state.
        loading: of the base while it is loaded, where that is more than what is kept of it.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    loading: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.gradients + self.optimizer


@final
@dataclass(frozen=True)
class Price:
    """What a batch takes.

    Attributes:
        tokens: places of the batch, padding included.
        peak: bytes beyond `Sizes`, at the moment at which there are the most.
        work: its operations.
    """

    tokens: int
    peak: int
    work: Mapping[Any, int]

    def seconds(self, machine: Rates) -> float:
        """On a machine of these rates."""
        return machine.seconds(self.work)


@final
@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and how it is trained.

    Attributes:
        model: of shades.
        handle: the adapter on it.
        objective: what is minimised.
        layout: makes batches.
        told: how batches are laid out, in a sentence.
        sizes: what is held all the time.
        arguments: of the trainer.
        keeping: what a forward pass keeps for the backward pass.
    """

    model: Any
    handle: Handle
    objective: Objective
    layout: AnyCollator | PackingCollator
    told: str
    sizes: Sizes
    arguments: TrainingArguments
    keeping: Keeping

    def places(self, records: Sequence[Any]) -> int:
        """How many tokens a batch of these records has, padding included."""
        return self.layout(records)["input_ids"].numel()

    def step(self, records: Sequence[Any]) -> Price:
        """A forward and a backward pass over a batch."""

        def run(batch: Mapping[str, Tensor]) -> None:
            self.model.train()
            with self.keeping.over():
                loss = self.objective.loss(self.model, batch, None)
            loss.backward()  # type: ignore[no-untyped-call]

        try:
            price = self._priced(records, run)
        finally:
            for parameter in self.handle.parameters():
                parameter.grad = None
        # Gradients are held all the time and counted there.
        return Price(price.tokens, max(0, price.peak - self.sizes.gradients), price.work)

    def look(self, records: Sequence[Any]) -> Price:
        """A forward pass as in evaluation."""

        def run(batch: Mapping[str, Tensor]) -> None:
            self.model.eval()
            with torch.no_grad():
                self.objective.loss(self.model, batch, None)

        return self._priced(records, run)

    def _priced(self, records: Sequence[Any], run: Any) -> Price:
        batch = self.layout(records)
        ledger = Ledger()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            ledger.known(tensor)
        with _traceable("one step"), ledger, _autocast(self.arguments):
            run(batch)
        return Price(batch["input_ids"].numel(), ledger.peak, dict(ledger.work))


class NotTraceableError(TrainingError):
    """A model or a method looks at values that are not there."""


@contextmanager
def _traceable(what: str) -> Iterator[None]:
    try:
        yield
    except LorafitError:
        raise
    except (ArithmeticError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as e:
        raise NotTraceableError(
            f"{what} of this model cannot be priced without its weights: {(str(e).splitlines() or [''])[0]}",
            found=type(e).__name__,
            expected="a model whose operations do not depend on values",
            fix="lorafit train --max-steps 3 says what that takes",
        ) from e


def _autocast(arguments: TrainingArguments) -> torch.autocast:
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    return torch.autocast("cpu", dtype=dtype, enabled=bool(arguments.bf16 or arguments.fp16))


def skeleton(
    settings: Settings,
    arguments: TrainingArguments,
    located: Located,
    data: AnyData,
    pad: int,
    dtype: torch.dtype,
) -> Skeleton:
    """The model of these settings, without weights. Nothing of the size of the model is read or made.

    Raises:
        LorafitError: the settings do not fit the model, as in a run.
        NotTraceableError: it needs values.
    """
    model, handle, based = fitted(settings, located, data, pad, dtype)
    if arguments.activation_checkpointing:
        model.activation_checkpointing_enable(dict(arguments.activation_checkpointing_kwargs or {}))
        model.disable_input_require_grads()
    objective, layout, told = _trained(settings, arguments, model, data, pad)
    shortest: list[Any] = sorted(data.train, key=len)[:2]
    keeping = _keeping(settings, arguments, model, objective, layout(shortest))
    return Skeleton(model, handle, objective, layout, told, _sizes(model, handle, arguments, based), arguments, keeping)


def fitted(
    settings: Settings, located: Located, data: AnyData, pad: int, dtype: torch.dtype
) -> tuple[Any, Handle, _Base]:
    """The model without weights, the adapter on it, and what a quantised base takes otherwise.

    Raises:
        LorafitError: the settings do not fit the model, as in a run.
        NotTraceableError: the adapter needs values.
    """
    model, head, based = _model(settings, located, data, pad, dtype)
    with _traceable("the adapter"), Ledger():
        handle = attach(
            model,
            build(settings.method, _plain(settings.method_options)),
            settings.targets,
            exclude=settings.exclude,
            rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern,
            modules_to_save=[*settings.modules_to_save, *(one for one in head if one not in settings.modules_to_save)],
            seed=settings.seed,
        )
    return model, handle, based


def _keeping(
    settings: Settings, arguments: TrainingArguments, model: Any, objective: Objective, batch: Mapping[str, Tensor]
) -> Keeping:
    """What a run finds to be computed again, found on shades; that gradients stay the same is left to the run."""
    if settings.recompute != "cheap":
        return KeepsAll()
    with _traceable("a forward pass"), undisturbed(model, torch.device("cpu")), Ledger(), _autocast(arguments):
        places = find_places(model, lambda: objective.loss(model, batch, None))
    return CheapAgain(places) if places.modules else KeepsAll()


class _Base(NamedTuple):
    """What a quantised base takes otherwise than its shades do: bytes more or less, and bytes while it is loaded."""

    beside: int = 0
    loading: int = 0


def _quantised(name: str, model: Any, saved: Sequence[str], *, causal: bool) -> _Base:
    """Gives a model on the meta device the layers that the run will have; NF4 is formed as int8 rows are."""
    storage = STORAGES.get(name)
    if storage is None:
        return _Base()
    storage.check()
    whole = held_bytes([*model.parameters(), *model.buffers()]) if storage.whole or not causal else 0
    paths, _ = layers(model, saved, storage)
    known = shapes(model, paths)
    sketch(model, paths)
    own, sketched = (sum(one.bytes(*shape) for shape in known) for one in (storage, STORAGES["int8"]))
    return _Base(own - sketched, whole)


def _model(
    settings: Settings, located: Located, data: AnyData, pad: int, dtype: torch.dtype
) -> tuple[Any, list[str], _Base]:
    from transformers import AutoConfig, AutoModelForCausalLM

    pooling = None if isinstance(data, Data) else pooling_of(located.path, settings.pooling).kind
    try:
        config = AutoConfig.from_pretrained(located.path)
        with torch.device("meta"):
            if isinstance(data, Data):
                model, head = AutoModelForCausalLM.from_config(config, dtype=dtype), list[str]()
            else:
                model = classifier_shape(config, class_names(data), pad, pooling, dtype=dtype)
                head = head_paths(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model's config cannot be read: {str(error).strip().splitlines()[0]}",
            where=f"model: {located.path}",
            expected="a model directory, or a hub name that can be reached",
            fix="mend the name, or leave model out for the embedded default",
        ) from error
    if settings.quantise in STORAGES:
        check_plain(located)
    saved = list(dict.fromkeys([*settings.modules_to_save, *head]))
    based = _quantised(settings.quantise, model, saved, causal=isinstance(data, Data))
    shades(model)
    return model, head, based


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options without an initialiser: it changes values, and no shape."""
    kept = {name: value for name, value in options.items() if name != "init"}
    if isinstance(kept.get(INNER), Mapping):
        kept[INNER] = _plain(kept[INNER])
    return kept


def _trained(
    settings: Settings, arguments: TrainingArguments, model: Any, data: AnyData, pad: int
) -> tuple[Objective, AnyCollator | PackingCollator, str]:
    if not isinstance(data, Data):
        check_unpacked(settings)
        objective, collator = labelled(data, pad)  # which scale a number has changes no shape
        return objective, collator, ""
    loss, plain = _loss(model, arguments.device), Collator(pad)
    # Nobody can try whether this model keeps records apart in a row. Most do: all losses count as equal here.
    agreeing: Any = lambda model, batch: 0.0  # noqa: E731
    tried = loss if isinstance(loss, FullLogits) else agreeing
    decision = lay_out(settings, arguments, model, tried, data, plain)
    return NextToken(loss), decision.collator, decision.told


def _loss(model: Any, device: torch.device) -> SupervisedLoss:
    """How the loss will be computed, told from where the logits come from."""
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}
    chunk = chunk_for(device)
    head = model.get_output_embeddings()
    if model.config.to_dict().get("output_router_logits"):
        return FullLogits(options, chunk)
    if head is not None and _ends_in(model, head):
        return HeadRows(head, options, chunk)
    return KeptColumns(options, chunk) if "logits_to_keep" in known else FullLogits(options, chunk)


def _ends_in(model: Any, head: nn.Module) -> bool:
    """Whether the logits are what the output head gives, untouched."""
    given: list[Any] = []
    hook = head.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        with _traceable("a forward pass"), Ledger(), torch.no_grad():
            logits = model(input_ids=torch.tensor([[0, 1]])).logits
    finally:
        hook.remove()
    return len(given) == 1 and (logits is given[0] or logits.dtype != given[0].dtype)


def _sizes(model: Any, handle: Handle, arguments: TrainingArguments, based: _Base) -> Sizes:
    trained = handle.parameters()
    own = {id(one) for entry in handle.entries().values() for one in (*entry.parameters(), *entry.buffers())}
    everything = [*model.parameters(), *model.buffers()]
    adapter = held_bytes(one for one in everything if id(one) in own)
    gradients = sum(one.numel() * one.element_size() for one in trained)
    base = held_bytes(everything) - adapter + based.beside
    return Sizes(base, adapter, gradients, int(gradients * _state_ratio(arguments)), based.loading)


def _state_ratio(arguments: TrainingArguments) -> float:
    """Bytes that the optimizer keeps for each byte of a parameter, from one step of it on a small matrix."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    parameter = nn.Parameter(torch.zeros(64, 64))
    try:
        optimizer = kind([parameter], **{**options, "lr": 1e-3})
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return 2.0  # one that wants more than parameters: as Adam
    kept = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    return sum(one.numel() * one.element_size() for one in kept) / (parameter.numel() * parameter.element_size())
