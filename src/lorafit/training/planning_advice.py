"""What to change where a run does not fit, in the order of least harm, each change with what it would come to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

from lorafit.errors import LorafitError
from lorafit.training.config import Settings, resolve
from lorafit.training.planning import Forecast, Planner
from lorafit.training.sequences import Encoded
from lorafit.training.valued import AnyData

KEPT = 0.9
"""The share of the training records that a shorter max_length should leave whole."""
CHOICE = 2
"""Changes that are enough to choose from; more harmful ones are not looked for then."""
LEAST = 0.02
"""The share of the memory, the process itself left out, that a change has to save to be worth a line."""


@final
@dataclass(frozen=True)
class Advice:
    """One change.

    Attributes:
        change: the flags.
        effect: what it costs, in a few words.
        peak: bytes that the run would then take.
        enough: whether that fits.
    """

    change: str
    effect: str
    peak: int
    enough: bool


def advise(planner: Planner, forecast: Forecast) -> list[Advice]:
    """Changes that take memory away, the harmless ones first.

    Each is priced by the formula; what was measured beyond the formula is added to all. Changes that save nothing, or
    that this model or method cannot have, are left out.
    """
    beyond = forecast.peak - forecast.formula.peak
    found: list[Advice] = []
    for change, effect, settings, data in _changes(planner):
        try:
            peak = planner.formula(settings, data).peak + beyond
        except LorafitError:
            continue  # not with this model or method
        if forecast.peak - peak < LEAST * (forecast.peak - forecast.formula.process):
            continue
        enough = forecast.limit.size is not None and peak <= forecast.limit.size
        found.append(Advice(change, effect, peak, enough))
        if sum(one.enough for one in found) == CHOICE:
            break
    return found


def _changes(planner: Planner) -> Iterator[tuple[str, str, Settings, AnyData]]:
    settings, data = planner.settings, planner.data
    arguments = planner.arguments
    held = arguments.eval_batch_size
    if data.eval and held > 1:
        flag = f"--per-device-eval-batch-size {held // 4 or 1}"
        yield flag, "the same results", _training(settings, per_device_eval_batch_size=held // 4 or 1), data
    size, micro = arguments.train_batch_size, arguments.gradient_accumulation_steps
    small, flags = settings, ""
    for part in sorted({size // 2, size // 4, 1} - {0, size}, reverse=True):
        if size % part:
            continue
        small = _training(
            settings,
            per_device_train_batch_size=part,
            gradient_accumulation_steps=micro * size // part,
            per_device_eval_batch_size=min(held, part),
        )
        flags = f"--per-device-train-batch-size {part} --gradient-accumulation-steps {micro * size // part} "
        flags += f"--per-device-eval-batch-size {min(held, part)}"
        yield flags, "the same results, somewhat slower", small, data
    if settings.recompute == "none" and not arguments.activation_checkpointing and not settings.compile:
        yield "--recompute cheap", "the same results, slightly slower", _with(settings, recompute="cheap"), data
    if settings.recompute in ("none", "cheap") and not arguments.activation_checkpointing:
        yield "--recompute blocks", "the same results, a third slower", _with(settings, recompute="blocks"), data
        if small is not settings:
            both = _with(small, recompute="blocks")
            yield f"{flags} --recompute blocks", "the same results, slower by more than a third", both, data
            small, flags = both, f"{flags} --recompute blocks"
    yield from _lossy(settings, data)
    if small is not settings and settings.quantise == "none":
        yield f"{flags} --quantise int8", "slower, over a base of 8 bits", _with(small, quantise="int8"), data


def _lossy(settings: Settings, data: AnyData) -> Iterator[tuple[str, str, Settings, AnyData]]:
    """Changes after which something else is learnt."""
    try:
        frozen = resolve([("the plan", {**_flat(settings), "method": "lora-fa"})])
    except LorafitError:
        pass  # it has settings that LoRA-FA lacks
    else:
        if frozen.method != settings.method:
            yield "--method lora-fa", "A stays as drawn: half of what is trained", frozen, data
    for bits, before, effect in (
        ("int8", ("none",), "the base's weights rounded to 8 bits, an error of about 1 %; somewhat slower"),
        ("nf4", ("none", "int8"), "the base's weights rounded to 4 bits, an error of about 10 %; slower"),
    ):
        if settings.quantise in before:
            yield f"--quantise {bits}", effect, _with(settings, quantise=bits), data
    if settings.dtype in ("auto", "float32"):
        half = _with(settings, dtype="bfloat16")
        yield "--dtype bfloat16", "weights rounded to 8 bits of precision; slow on most CPUs", half, data
    lengths = sorted(len(one) for one in data.train)
    short = lengths[int(KEPT * (len(lengths) - 1))]
    cut = sum(length > short for length in lengths)
    if cut and short >= 2:
        shorter: Any = replace(cast(Any, data), train=_cut(data.train, short), eval=_cut(data.eval, short))
        text = f"{cut:,} of {len(lengths):,} records are cut"
        yield f"--max-length {short}", text, _with(settings, max_length=short), shorter


def _flat(settings: Settings) -> dict[str, Any]:
    """Settings as `resolve` takes them, without what is as it would be anyway."""
    own = settings.model_dump(exclude_unset=True, exclude={"method_options", "training"})
    return {**own, **settings.method_options, **settings.training}


def _cut(records: Sequence[Any], length: int) -> list[Any]:
    """The records as a smaller max_length leaves them; one without anything to learn is dropped there."""
    made: list[Any] = []
    for one in records:
        if isinstance(one, Encoded):
            short = replace(one, input_ids=one.input_ids[:length], labels=one.labels[:length])
            made += [short] if short.supervised else []
        else:
            kinds = one.token_type_ids
            kinds = None if kinds is None else kinds[:length]
            made.append(replace(one, input_ids=one.input_ids[:length], token_type_ids=kinds))
    return made


def _with(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


def _training(settings: Settings, **changes: Any) -> Settings:
    return _with(settings, training={**settings.training, **changes})
