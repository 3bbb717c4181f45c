"""Adapters as plain LoRA, for readers that know nothing else: exactly where the update is low-rank, else at a rank.

AdaLoRA is LoRA with A' = Λ Q and B' = P; VeRA with A' = Λ_d A and B' = Λ_b B. Delta-LoRA, LoRA-drop and LoRA that
started elsewhere than at B A = 0 are written as plain LoRA to begin with. What rescales W (DoRA) or is dense (intrinsic
dimension) becomes the nearest LoRA of a rank, by the singular value decomposition of W' − W.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit import store
from lorafit.adapted import trained_copy
from lorafit.card import plain_card
from lorafit.checkpoint import Ready, fitted
from lorafit.compress import NOTICED, Squeezed, TruncationWarning, relative, squeeze_dense, squeeze_low_rank
from lorafit.delta import LowRank
from lorafit.errors import CheckpointError, LorafitWarning, MergeError
from lorafit.fitting import copy_into
from lorafit.layouts import ADALORA, LORA, PAIRS, VERA, Layout, Ours, config_of, parse, tensors_of
from lorafit.layouts.base import Record, split
from lorafit.layouts.lora import EMBEDDING, MAGNITUDES, MATRIX, alpha_for, scale_at
from lorafit.layouts.own import OWN
from lorafit.layouts.pairs import transposed
from lorafit.layouts.vera import projection
from lorafit.method import Around, Method
from lorafit.methods import describe, validate
from lorafit.methods.adalora import AdaLoRA
from lorafit.methods.dora import DoRA
from lorafit.methods.lora import LoRA, LoRAAdapter
from lorafit.patterns import heads
from lorafit.peft_config import COMMON, NOT_MATHEMATICS, Parsed
from lorafit.peft_layout import PREFIX, Description, Placed, exact_pattern, for_file, join, saved_as
from lorafit.plan import check_model
from lorafit.store import Stored


def convert(
    path: str | Path,
    to: str = "lora",
    *,
    output: str | Path | None = None,
    model: nn.Module | None = None,
    r: int | None = None,
) -> Path:
    """Writes an adapter's folder again as plain LoRA.

    Args:
        path: the folder of an adapter, written by this library or by PEFT.
        to: "lora", what every reader knows.
        output: the folder to write; None is a new one beside `path` that ends in "-lora".
        model: the base model. Needed for DoRA and intrinsic dimension, whose change depends on the weights, and where
            the file does not say how large the layers are. It stays as it is.
        r: the highest rank of the result: the best approximation of that rank, where the update has a higher one. None
            keeps a low-rank update exactly; DoRA then gets the rank of its LoRA, and a dense change needs one from you.

    Returns:
        The folder that was written, in one step that a kill cannot split. `path` is never written to.

    Raises:
        CheckpointError: the adapter cannot be read, or not converted without `model` or `r`; or the folder to write is
            the one that is read.
        ConfigError: another target than "lora".

    A `TruncationWarning` says how far the result is from the adapter if that is more than 0.001 of it; the errors site
    by site are in the config's key "lorafit".
    """
    validate.choice("convert.to", to, ("lora",), "adapters cannot be converted to this")
    if r is not None:
        validate.rank("convert.r", r)
    stored = store.read(Path(path))
    source = stored.config_path.parent.resolve()
    beside = source.with_name(f"{source.name}-lora")
    target = beside if output is None else Path(output)
    if target.resolve() == source:
        raise CheckpointError(
            "an adapter is not written over the one that it is made from",
            where=target,
            expected="another folder",
            fix=f"output={str(beside)!r}",
        )
    if model is None:
        _from_file(stored, target, r)
    else:
        _from_model(model, source, target, r)
    return target


# With the model: whatever the adapters say of the weights, layer by layer


def _from_model(model: nn.Module, source: Path, target: Path, r: int | None) -> None:
    check_model(model)
    ready = fitted(model, source)
    for note in ready.notes:
        warnings.warn(note, LorafitWarning, stacklevel=3)
    rslora = ready.method.settings().get("rslora") is True
    made: dict[str, Squeezed] = {}
    placed: dict[str, Placed] = {}
    with torch.no_grad():
        for each in ready.planned:
            made[each.path], scale = _squeezed(ready, each.path, r)
            up, down, groups = made[each.path].up, made[each.path].down, each.site.shape.groups
            adapter = LoRAAdapter(down, up, scale=scale, dropout=0.0, groups=groups)
            own = made[each.path].r
            method = LoRA(r=own, alpha=alpha_for(scale, own, rslora), rslora=rslora)
            placed[each.path] = Placed(each.site, adapter, method)
    copies = {path: trained_copy(ready.modules.by_path[path]) for path in ready.found.copies}
    for path, tensors in ready.found.copies.items():
        copy_into(copies[path], tensors)
    config = ready.stored.config
    description = Description(
        method=Counter(each.method for each in placed.values()).most_common(1)[0][0],
        sites=placed,
        copies=copies,
        modules=ready.modules.aliases,
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
    )
    if transposed(placed):
        raise _no_plain_form(source)
    settings = {key: value for key, value in config_of(description, LORA).items() if key != OWN}
    settings |= _errors(made, describe(ready.method))
    store.write_parts(target, settings, tensors_of(description, LORA), plain_card(settings))


def _squeezed(ready: Ready, path: str, r: int | None) -> tuple[Squeezed, float]:
    """The factors of a site's update as A and B, and their scale."""
    site = next(each.site for each in ready.planned if each.path == path)
    update = ready.adapters[path].update(site.weight)
    delta, groups = update.delta, site.shape.groups
    if update.gain is None and isinstance(delta, LowRank):
        up, down = LowRank(delta.up, delta.down, delta.mid, delta.out, groups=groups).fold()
        if r is None or r >= down.shape[0]:
            return Squeezed(up, down, norm=0.0, lost=0.0), delta.scale
        if down.shape[1] != site.shape.inn:
            raise MergeError(
                "this adapter mixes the groups of a grouped convolution, which no change of its weight can do",
                where=path,
                fix="r=None keeps it as it is",
            )
        return squeeze_low_rank(up * delta.scale, down, r, groups), 1.0
    rank = _own_rank(ready, path) if r is None else r
    return squeeze_dense(update.change(site.weight()), rank, groups), 1.0


def _own_rank(ready: Ready, path: str) -> int:
    method = next(each.method for each in ready.planned if each.path == path)
    inner = method.within if isinstance(method, DoRA) else method
    found = inner.settings().get("r", inner.settings().get("init_r"))
    if isinstance(found, int):
        return found
    raise CheckpointError(
        f"{method.name} has no rank of its own, and LoRA needs one",
        where=f"{ready.stored.config_path.parent}: {path}",
        found="r=None",
        expected="a rank",
        fix="convert(..., r=16): the larger, the closer",
    )


def _errors(made: Mapping[str, Squeezed], method: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of a result that is not exact; nothing for one that is."""
    norm, lost = sum(each.norm for each in made.values()), sum(each.lost for each in made.values())
    if norm == 0:
        return {}
    overall, errors = relative(lost, norm), {path: each.error for path, each in made.items()}
    if overall > NOTICED:
        worst = max(errors, key=errors.__getitem__)
        message = (
            f"the plain LoRA is not exactly the adapter that it was made from: relative error {overall:.3g} over all "
            f"sites, {errors[worst]:.3g} at {worst}; a larger r comes closer"
        )
        warnings.warn(TruncationWarning(message, overall, errors), stacklevel=4)
    return {OWN: {"method": None, "converted": {"from": dict(method), "error": overall, "errors": errors}}}


# Without the model: what the file says is all there is


@dataclass(frozen=True)
class Pair:
    """A and B of one site, flat, with their scale, and the keys and the shapes that they have in a file."""

    down: Tensor
    up: Tensor
    scale: float
    keys: tuple[str, str] = MATRIX
    kernel: tuple[int, ...] = ()
    """Of A, after its first two dimensions."""


def _from_file(stored: Stored, target: Path, r: int | None) -> None:
    layout, parsed, own = parse(stored.config, stored.config_path)
    if layout is PAIRS:
        if (stored.config.get(OWN) or {}).get("transposed"):
            raise _no_plain_form(stored.config_path.parent)
        raise _needs_model(stored, "A of its convolutions in groups sees the channels of its own group alone")
    if layout not in (LORA, ADALORA, VERA) or isinstance(parsed.method, DoRA):
        raise _needs_model(stored, f"what {dependent(parsed.method).name} changes depends on the model's weights")
    settings = {key: value for key, value in stored.config.items() if key != OWN}
    if layout is LORA and r is None:
        store.write_parts(target, settings, dict(stored.tensors), plain_card(settings))
        return
    by_site, rest = grouped(stored, layout, parsed)
    record = own.record if isinstance(own, Ours) else {}
    kind = {"LORA": _lora, "ADALORA": _adalora, "VERA": _vera}[layout.peft_type]
    pairs, made = kind(stored, parsed, by_site, rest, record), dict[str, Squeezed]()
    tensors = {key: value for key, value in rest.items() if key not in layout.shared}
    if r is not None:
        for path, pair in pairs.items():
            if r >= pair.down.shape[0]:
                continue
            if pair.up.shape[1] != pair.down.shape[0]:
                raise _needs_model(stored, f"{path} is a grouped convolution, and a lower rank is found group by group")
            made[path] = squeeze_low_rank(pair.up * pair.scale, pair.down, r)
            pairs[path] = replace(pair, down=made[path].down, up=made[path].up, scale=1.0)
    for path, pair in pairs.items():
        ones = (1,) * len(pair.kernel)
        tensors[join(path, pair.keys[0])] = pair.down.reshape(pair.down.shape[0], -1, *pair.kernel)
        tensors[join(path, pair.keys[1])] = pair.up.reshape(*pair.up.shape, *ones)
    config = plain_config(settings, pairs) | _errors(made, {"peft_type": layout.peft_type})
    store.write_parts(target, config, for_file(tensors), plain_card(config))


def dependent(method: Method) -> Method:
    """The method whose change depends on the weights, out of those around it that change nothing about that."""
    while isinstance(method, Around) and not isinstance(method, DoRA):
        method = method.within
    return method


def _no_plain_form(folder: Path) -> CheckpointError:
    return CheckpointError(
        "it changes a transposed convolution, and the plain LoRA that every reader knows has none for such a layer",
        where=folder,
        expected="linear layers, embeddings and convolutions",
        fix="merge it: lorafit.load(model, folder), then merge_and_detach()",
    )


def _needs_model(stored: Stored, why: str) -> CheckpointError:
    return CheckpointError(
        f"the file alone does not say what its plain LoRA would be: {why}",
        where=stored.config_path.parent,
        found="model=None",
        expected="the base model",
        fix="convert(path, model=model)",
    )


def grouped(stored: Stored, layout: Layout, parsed: Parsed) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of a file by site and key, and those that belong to none."""
    by_site: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in stored.tensors.items():
        path, own = split(key.removeprefix(PREFIX), layout.keys(parsed)) if key.startswith(PREFIX) else (None, "")
        if path is None:
            rest[key] = tensor
        else:
            by_site.setdefault(path, {})[own] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return by_site, rest


def _taken(stored: Stored, path: str, tensors: Mapping[str, Tensor], *keys: str) -> list[Tensor]:
    for key in keys:
        if key not in tensors:
            raise CheckpointError(
                "missing key",
                where=f"{stored.weights_path}: {join(path, key)}",
                found=f"only {', '.join(tensors)}",
                expected=repr(key),
                fix="the file is incomplete: save or copy it again",
            )
    return [tensors[key] for key in keys]


@dataclass(frozen=True)
class Plain:
    """A file of type LORA, layer by layer.

    Attributes:
        parsed: its config.
        pairs: module path → A and B, in at least single precision.
        magnitudes: module path → the key and the tensor of a DoRA's magnitudes, as the file has them.
        rest: the keys that belong to no adapter: modules saved in full, and copies of base weights.
    """

    parsed: Parsed
    pairs: dict[str, Pair]
    magnitudes: dict[str, tuple[str, Tensor]]
    rest: dict[str, Tensor]

    @property
    def replaced(self) -> list[str]:
        """The keys of modules saved in full; the others of `rest` PEFT copies from the base, as embeddings are."""
        return [key for key in self.rest if self._is_saved(key.removeprefix(PREFIX))]

    def _is_saved(self, key: str) -> bool:
        return any(saved_as(name, path) for path in heads(key) for name in self.parsed.modules_to_save)


def read_pairs(stored: Stored) -> Plain | None:
    """What a file of type LORA holds; None for a file of another type.

    Raises:
        CheckpointError: its config is not one, or a key is missing.
    """
    layout, parsed, _ = parse(stored.config, stored.config_path)
    if layout is not LORA:
        return None
    by_site, rest = grouped(stored, layout, parsed)
    magnitudes = {
        path: (key, stored.tensors[join(path, key)])
        for path, tensors in by_site.items()
        for key in MAGNITUDES
        if key in tensors
    }
    return Plain(parsed, _lora(stored, parsed, by_site, rest, {}), magnitudes, rest)


Tensors = Mapping[str, Tensor]
Sites = Mapping[str, Tensors]


def _lora(stored: Stored, parsed: Parsed, sites: Sites, rest: Tensors, record: Record) -> dict[str, Pair]:
    found = {}
    for path, tensors in sites.items():
        keys = EMBEDDING if EMBEDDING[0] in tensors else MATRIX
        down, up = _taken(stored, path, tensors, *keys)
        kernel = tuple(down.shape[2:])
        found[path] = Pair(down.flatten(1), up.flatten(1), scale_at(parsed, path), keys, kernel)
    return found


def _adalora(stored: Stored, parsed: Parsed, sites: Sites, rest: Tensors, record: Record) -> dict[str, Pair]:
    method = parsed.method
    assert isinstance(method, AdaLoRA)
    if record.get("vectors") is False:
        raise _needs_model(stored, "some of its layers are no linear ones, and have A and B in another shape")
    if not record:
        warnings.warn(
            f"{stored.config_path.parent}: PEFT's files of AdaLoRA do not tell convolutions from linear layers: taken "
            "as linear layers. With convolutions give model=, or the result will not load",
            LorafitWarning,
            stacklevel=4,
        )
    found = {}
    for path, tensors in sites.items():
        q, e, p = _taken(stored, path, tensors, "lora_A", "lora_E", "lora_B")
        if q.shape[0] == 0:  # nothing is left here, and a rank is at least 1
            q, e, p = q.new_zeros(1, q.shape[1]), e.new_zeros(1, 1), p.new_zeros(p.shape[0], 1)
        found[path] = Pair(e * q, p, method.scale)
    return found


def _vera(stored: Stored, parsed: Parsed, sites: Sites, rest: Tensors, record: Record) -> dict[str, Pair]:
    shapes = _sizes(stored, record)
    if set(shapes) != set(sites):
        raise _needs_model(stored, "PEFT's files of VeRA do not say how wide the layers are")
    out, inn = (max(shape[i] for shape in shapes.values()) for i in (0, 1))
    pair = projection(parsed, rest, out, inn)
    found = {}
    for path, tensors in sites.items():
        b, d = _taken(stored, path, tensors, "vera_lambda_b", "vera_lambda_d")
        own_out, own_inn = shapes[path]
        if tuple(b.shape) != (own_out,) or own_inn > pair.A.shape[1] or own_out > pair.B.shape[0]:
            raise _needs_model(stored, f"the sizes that it notes for {path} are not those of its tensors")
        found[path] = Pair(d[:, None] * pair.A[:, :own_inn], b[:, None] * pair.B[:own_out], 1.0)
    return found


def _sizes(stored: Stored, record: Record) -> dict[str, tuple[int, int]]:
    """Module path → (out, in), as a file of VeRA's notes it; empty where it does not."""
    shapes = record.get("shapes", {})
    if not isinstance(shapes, Mapping) or not all(_is_size(each) for each in shapes.values()):
        raise CheckpointError(
            "the sizes of the layers that this file notes are none",
            where=f"{stored.config_path}: {OWN}.shapes",
            found=repr(shapes),
            expected="an object of module path → [out, in]",
            fix="convert(path, model=model), which does not need them",
        )
    return {path: (out, inn) for path, (out, inn) in shapes.items()}


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(each) is int and each > 0 for each in value)


def plain_config(settings: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """The config of a plain LoRA in the same places."""
    rslora = settings.get("use_rslora") is True and settings["peft_type"] == LORA.peft_type
    ranks = {path: pair.down.shape[0] for path, pair in pairs.items()}
    alphas = {path: alpha_for(pair.scale, ranks[path], rslora) for path, pair in pairs.items()}
    r, alpha = Counter((ranks[path], alphas[path]) for path in pairs).most_common(1)[0][0]
    kept = {key: value for key, value in settings.items() if key in COMMON | NOT_MATHEMATICS}
    return {
        **kept,
        "alpha_pattern": exact_pattern({path: each for path, each in alphas.items() if each != alpha}, list(pairs)),
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": LORA.peft_type,
        "r": r,
        "rank_pattern": exact_pattern({path: each for path, each in ranks.items() if each != r}, list(pairs)),
        "use_dora": False,
        "use_rslora": rslora,
    }
