"""A model's layers one by one: which are adapted, at which rank, which are not, and why. The rules of `suggest`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn
from torch.nn.parameter import is_lazy

from lorafit.adapted import plain_class, walk
from lorafit.calls import called
from lorafit.errors import ConfigError, TargetError
from lorafit.layers import KINDS, Shape, site_class, site_of
from lorafit.layers.running import keeps_statistics
from lorafit.method import Batch, Method
from lorafit.methods import LoRA
from lorafit.patterns import inside
from lorafit.plan import Modules, Planned, all_linear, refuse, refuse_copy, saved_paths, shared_weights
from lorafit.suggestion import Fate, Row, Suggestion, few
from lorafit.targets import Targets, match, suffixes_for

RANK = 16
"""The highest rank that is suggested where nobody says another."""
SHARE = 4
"""One part in so many of the largest possible rank is the most that a layer gets."""
RATE = 1e-3
"""The rate for LoRA."""
HEAD = "the model's last layer, with few outputs: those of a new task are others"
STATISTICS = "keeps running statistics, which model.train() changes"


@final
@dataclass(frozen=True)
class Layer:
    """A layer of a known type that nothing speaks against.

    Attributes:
        plan: the layer, with the method as it is there.
        rank: of an adapter in it, where the method lets layers have ranks of their own.
        why: what speaks for this rank, or against an adapter.
    """

    plan: Planned
    rank: int | None = None
    why: str = ""

    @property
    def path(self) -> str:
        """The module's path."""
        return self.plan.path

    @property
    def shape(self) -> Shape:
        """The weight as a matrix."""
        return self.plan.site.shape

    def row(self, fate: Fate, trained: int = 0, why: str = "") -> Row:
        """The layer as a row of the table."""
        rank = self.rank if fate is Fate.ADAPTED else None
        return Row(fate, self.plan.site.kind, _sizes(self.shape), (self.path,), rank, trained, why or self.why)


@final
@dataclass(frozen=True)
class Chosen:
    """The layers to adapt at some highest rank, and those that are left out with the reason."""

    adapted: tuple[Layer, ...]
    left: tuple[Layer, ...]


@final
class Look:
    """A model's layers, and what is asked of them.

    Args:
        model: the model.
        method: None for LoRA.
        heads, include, exclude, example: as `suggest` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None,
        heads: Sequence[str] | None,
        include: Targets,
        exclude: Targets,
        example: Batch,
    ) -> None:
        self.model = model
        self.modules = Modules.of(model)
        self.method = LoRA() if method is None else method
        self.ranked = _ranked(self.method)
        self.rooted = self.method.settings().get("rslora") is True
        self.order = None if example is None else called(model, self.modules, example)
        self.fixed: list[Row] = []
        self.ways: dict[str, str] = {}
        paths = list(self._adaptable())
        self.shared = shared_weights(model, paths, self.modules)
        self.layers = [Layer(self._plan(path, self.method)) for path in paths]
        self.include = self._included(include)
        self.exclude = self._matched(exclude, "exclude")
        self.linear = set(all_linear(self.modules))
        self.remarks: list[str] = []
        self.guessed: str | None = None
        self.saved = self._heads(heads)
        self._check_apart()

    def _matched(self, patterns: Targets, what: str) -> set[str]:
        """The paths that patterns name, each shared module by its first one."""
        if not patterns:
            return set()
        aliases = self.modules.aliases
        return {aliases[path] for path in match(patterns, aliases, self.modules.known(), what)}

    def _included(self, patterns: Targets) -> set[str]:
        """The layers to include, each of them one that can be adapted.

        Raises:
            TargetError: a pattern names one that cannot be, or none at all.
        """
        known, rows = {layer.path for layer in self.layers}, {row.paths[0]: row for row in self.fixed}
        found: set[str] = set()
        self._matched(patterns, "include")
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            named = self._matched(pattern if isinstance(patterns, str) else [pattern], "include")
            odd = next((path for path in sorted(named) if path in rows), None)
            if odd is None and named & known:
                found |= named & known
                continue
            where = odd if odd is not None else min(named)
            within = [path for path in known if path.startswith(f"{where}.")]
            raise TargetError(
                "a layer to include cannot be adapted",
                where=f"include: {where}",
                found=f"{plain_class(self.modules.by_path[where]).__name__}: "
                + ("no weights of its own" if odd is None else rows[odd].why),
                expected="layers that can be adapted",
                near=sorted(within)[:3],
                fix=self.ways.get(where, f"leave {pattern!r} out of include"),
            )
        return found

    def _check_apart(self) -> None:
        """Raises `ConfigError` for layers of which two arguments say different things."""
        twice = {
            "include and exclude": self.include & self.exclude,
            "include and heads": {path for path in self.include if inside(path, self.saved)},
            "heads and exclude": self.exclude & self.saved.keys(),
        }
        for names, paths in twice.items():
            if paths:
                raise ConfigError(
                    f"{names} say different things of the same layers",
                    where="suggest",
                    found=few(sorted(paths)),
                    expected="each layer in one of them",
                    fix=f"leave {few(sorted(paths)[:1])} out of {names.partition(' ')[0]}",
                )

    def _plan(self, path: str, method: Method) -> Planned:
        return Planned(path, site_of(self.modules.by_path[path]), method, self.shared.get(path, ()))

    def _adaptable(self) -> Iterator[str]:
        """The layers that can be adapted; what else has weights or statistics becomes rows."""
        for path, module in self.modules.by_path.items():
            base = plain_class(module)
            kind = site_class(base)
            own = [parameter for parameter in module._parameters.values() if parameter is not None]
            if kind is not None:
                try:
                    refuse(path, module, base, kind, self.modules.parents[path])
                except TargetError as error:
                    self.ways[path] = str(error.fix).partition(", or exclude=")[0]
                    self._fix(path, base, Fate.REFUSED, str(error.found).partition(": ")[2])
                else:
                    yield path
            elif keeps_statistics(module):
                self._fix(path, base, Fate.FROZEN, STATISTICS)
            elif any(is_lazy(parameter) for parameter in own):
                self._fix(path, base, Fate.REFUSED, "its weight has no shape yet")
            elif own and all(parameter.dim() < 2 for parameter in own):
                self._fix(path, base, Fate.FROZEN, "vectors: a norm, a bias or a scale")
            elif own:
                self._fix(path, base, Fate.REFUSED, "weights of its own, in a layer of no type that is known here")

    def _fix(self, path: str, kind: type[nn.Module], fate: Fate, why: str) -> None:
        self.fixed.append(Row(fate, kind.__name__, "", (path,), None, 0, why))

    def _heads(self, heads: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
        """Path → the suffixes that name it, of modules to train in full."""
        if heads is not None:
            paths = saved_paths(self.modules, heads)
            self.remarks += [f"trained in full, as asked: {few(paths)}"] if paths else []
            return {path: tuple(heads) for path in paths}
        last = self._last()
        if last is None:
            return {}
        names = suffixes_for([last.path], list(self.modules.aliases))
        try:
            refuse_copy(last.path, self.modules)
        except TargetError:
            return {}
        if isinstance(names, str):  # no suffix names it alone
            return {}
        self.guessed = last.path
        told = "the last to be called" if self.order is not None else "the last by definition"
        self.remarks.append(
            f"{few([last.path])}, {told}, is taken for the head ({last.shape.out} outputs) and trained in full: "
            "heads=() adapts it like the others, heads=[...] names another"
        )
        return {last.path: tuple(names)}

    def _last(self) -> Layer | None:
        """The last layer, if it can be a head: linear, and narrowing to half as many outputs or fewer."""
        known = self.modules.known() if self.order is None else self.order
        last = next((layer for layer in self.layers if known and layer.path == known[-1]), None)
        if last is None or len(self.layers) < 2 or not last.plan.site.all_linear:
            return None
        if last.path in self.include | self.exclude:
            return None
        return last if 2 * last.shape.out <= last.shape.inn else None

    def choose(self, most: int) -> Chosen:
        """What is adapted, at ranks of at most `most`."""
        adapted, left = [], []
        for layer in self.layers:
            if inside(layer.path, self.saved):
                continue
            why = self._unwanted(layer)
            placed = self._placed(layer, most)
            own = placed.plan.method
            if not why:
                why = own.impossible(placed.plan.spot) or own.wasteful(placed.plan.spot) or ""
            if not why and layer.path not in self.include:
                why = self._excessive(placed)
            if why and layer.path in self.include:
                raise TargetError(
                    f"{own.name} cannot be put on a layer to include",
                    where=f"include: {layer.path}",
                    found=why,
                    expected="layers that suit the method",
                    fix="another method, or leave the layer out of include",
                )
            if why:
                left.append(Layer(layer.plan, None, why))
            else:
                adapted.append(placed)
        if not adapted:
            refused = (row for row in self.fixed if row.fate is Fate.REFUSED)
            rows = (*refused, *(layer.row(Fate.FROZEN) for layer in left))
            raise TargetError(
                "no layer is left to adapt",
                found="; ".join(_told(rows)) or "none",
                expected="at least one layer that can be adapted, beside the head",
                fix=self._way_out(left),
            )
        return Chosen(tuple(adapted), tuple(left))

    def _way_out(self, left: Sequence[Layer]) -> str:
        """What would let a layer be adapted."""
        able = next((layer.path for layer in left if layer.path not in self.exclude), None)
        if able is not None:
            return f"include=[{able!r}] adapts a layer that was left out"
        if left:
            return "a narrower exclude"
        if self.saved:
            return "heads=() keeps the last layer from being a head"
        ways = (way for way in self.ways.values() if not way.startswith("leave it out"))
        return next(ways, f"a model with a layer that can be adapted: {KINDS}")

    def _unwanted(self, layer: Layer) -> str:
        """Why a layer is left out whatever its rank would be; empty when it is not."""
        if layer.path in self.exclude:
            return "as asked (exclude)"
        if layer.path in self.include:
            return ""
        if self.order is not None and layer.path not in self.order:
            return "not called for the example, in evaluation mode"
        if layer.shape.lookup:
            return "a table of vectors, which new tokens or a new language would need"
        if layer.plan.site.all_linear and layer.path not in self.linear:
            return "the output layer of a language model"
        return ""

    def _placed(self, layer: Layer, most: int) -> Layer:
        """The layer with the method as it would be there."""
        if not self.ranked:
            return layer
        rank = rank_for(layer.shape, most)
        own = self.method.at(r=rank, alpha=self._alpha(rank))
        return Layer(self._plan(layer.path, own), rank, _reason(layer.shape, rank, most))

    def _alpha(self, rank: int) -> float:
        """α of a rank, so that the scale is 2."""
        return 2.0 * (math.sqrt(rank) if self.rooted else rank)

    def _excessive(self, layer: Layer) -> str:
        if not self.ranked:
            return ""
        trained, own = layer.plan.method.num_trainable([layer.shape]), layer.shape.out * layer.shape.inn
        if trained < own:
            return ""
        return f"an adapter of the least rank, {layer.rank}, has {trained:,} numbers, the weight itself {own:,}"

    def trained(self, chosen: Chosen) -> int:
        """How many numbers are trained."""
        return self.in_adapters(chosen) + sum(self.in_full().values())

    def in_adapters(self, chosen: Chosen) -> int:
        """How many of them in adapters."""
        if self.ranked:
            return sum(layer.plan.method.num_trainable([layer.shape]) for layer in chosen.adapted)
        return self.method.num_trainable([layer.shape for layer in chosen.adapted])

    def in_full(self) -> dict[str, int]:
        """Path → numbers, of modules that are trained in full."""
        return {path: numbers(self.modules.by_path[path]) for path in self.saved}

    def suggestion(self, chosen: Chosen, total: int, limit: int | None) -> Suggestion:
        """What was found, in full."""
        paths = [layer.path for layer in chosen.adapted]
        ranks = {layer.path: layer.rank for layer in chosen.adapted if layer.rank is not None}
        base = _commonest(chosen.adapted)
        others = {_key(path): rank for path, rank in ranks.items() if rank != base}
        shapes = [layer.shape for layer in chosen.adapted]
        method = self.method if base is None else self.method.at(r=base, alpha=self._alpha(base))
        return Suggestion(
            method=method,
            targets=suffixes_for(paths, list(self.modules.aliases)),
            rank_pattern=others,
            alpha_pattern={key: self._alpha(rank) for key, rank in others.items()},
            modules_to_save=tuple(dict.fromkeys(name for names in self.saved.values() for name in names)),
            rate=RATE * method.rate(shapes),
            full_rate=RATE,
            rows=tuple(_merged(self._rows(chosen))),
            remarks=(*self.remarks, *self._remarks(chosen, limit)),
            trained=self.trained(chosen),
            total=total,
            model=plain_class(self.model).__name__,
        )

    def _rows(self, chosen: Chosen) -> Iterator[Row]:
        for layer in chosen.adapted:
            yield layer.row(Fate.ADAPTED, layer.plan.method.num_trainable([layer.shape]) if self.ranked else 0)
        for path, count in self.in_full().items():
            kind = plain_class(self.modules.by_path[path]).__name__
            own = next((each for each in self.layers if each.path == path), None)
            size = "" if own is None else _sizes(own.shape)
            yield Row(Fate.FULL, kind, size, (path,), None, count, HEAD if path == self.guessed else "as asked")
        for layer in chosen.left:
            yield layer.row(Fate.FROZEN)
        yield from (row for row in self.fixed if not inside(row.paths[0], self.saved))

    def _remarks(self, chosen: Chosen, limit: int | None) -> Iterator[str]:
        if self.ranked:
            times = "twice the square root of the rank" if self.rooted else "twice the rank"
            yield f"α is {times} everywhere, so that all ranks learn at the same rate"
        else:
            yield f"{self.method.name} has no rank of its own for a layer: {self.in_adapters(chosen):,} numbers in all"
        if limit is not None:
            yield f"at most {limit:,} numbers were asked for"
        if self.order is None:
            yield "no example was given: which layers are called, and which one last, is not known but by definition"
        modules = self.modules.by_path.items()
        moving = [path for path, module in modules if keeps_statistics(module) and not inside(path, self.saved)]
        if moving:
            yield (
                f"{len(moving)} layers keep running statistics ({few(moving)}): call suggestion.train(model) where a "
                "loop calls model.train(), and they stay as they are"
            )
        shared = [layer.path for layer in chosen.adapted if layer.plan.shared]
        if shared:
            yield f"weights that are another layer's, too: {few(shared)}; merge(untie=True) parts them"
        yield "rates and ranks are a start: try a third and three times the rate, and let the held-out loss decide"


def numbers(module: nn.Module) -> int:
    """How many numbers a module has, shared tensors once, without what adapters add and what has no shape yet."""
    held = (p for _, inner, _ in walk(module) for p in inner._parameters.values())
    return sum({id(p): p.numel() for p in held if p is not None and not is_lazy(p)}.values())


def rank_for(shape: Shape, most: int = RANK) -> int:
    """The rank that a weight of this shape gets, where `most` is the highest.

    >>> rank_for(Shape(64, 576)), rank_for(Shape(32, 27)), rank_for(Shape(96, 9, groups=96))
    (16, 4, 96)
    """
    largest = min(shape.out // shape.groups, shape.inn)
    each = max(1, min(largest // SHARE, most // shape.groups))
    return shape.groups * (1 << (each.bit_length() - 1))


def _commonest(layers: Sequence[Layer]) -> int | None:
    """The rank that most layers have, the highest of several; of layers without groups, as long as there are any."""
    known = [layer for layer in layers if layer.rank is not None]
    plain = [layer for layer in known if layer.shape.groups == 1] or known
    counts = Counter(layer.rank for layer in plain if layer.rank is not None)
    return max(counts, key=lambda rank: (counts[rank], rank), default=None)


def _reason(shape: Shape, rank: int, most: int) -> str:
    if shape.groups > 1:
        return f"{rank // shape.groups} for each of {shape.groups} groups"
    largest = min(shape.out, shape.inn)
    return f"a quarter of the largest rank, {largest}" if largest // SHARE < most else "multiplies what goes through it"


def _sizes(shape: Shape) -> str:
    groups = f", {shape.groups} groups" if shape.groups > 1 else ""
    return f"{shape.out} × {shape.inn}{groups}"


def _key(path: str) -> str:
    """A pattern that fits this path alone."""
    return f"^{re.escape(path)}"


def _ranked(method: Method) -> bool:
    """Whether layers can have ranks of their own by this method."""
    try:
        method.at(r=RANK, alpha=2.0 * RANK)
    except ConfigError:
        return False
    return True


def _told(rows: Iterable[Row]) -> list[str]:
    """Why layers are not adapted, each reason once."""
    by: dict[str, list[str]] = {}
    for row in rows:
        by.setdefault(row.why, []).extend(row.paths)
    return [f"{few(paths)}: {why}" for why, paths in by.items()]


def _merged(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows that say the same as one, in the order in which they come first."""
    by: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        by.setdefault((row.fate, row.kind, row.weight, row.rank, row.why), []).append(row)
    for alike in by.values():
        first, paths = alike[0], tuple(path for row in alike for path in row.paths)
        trained = sum(row.trained for row in alike)
        yield Row(first.fate, first.kind, first.weight, paths, first.rank, trained, first.why)
