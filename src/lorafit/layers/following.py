"""Layers whose own forward the low-rank path goes through, such as a convolution that pads its input inside of it.

Let f(x; W, b) be what a layer computes. Where for every x, A and E

    f(x; W + s E A, b) = f(x; W, b) + s E f(x; A, none),    E a product at each position,

the low-rank path is f itself with A in the place of W, and E after it: whatever f does to x before, and whatever its
arguments beside x are. That is so where f is linear in W and treats its output channels apart and alike, and b is added
as it is (a gain must not touch it). For a layer of torch's own it is known, for another class it is tried once, on a
copy of the layer and a random input: what fails is refused with the reason.

Where one pass with W' = W + s E A is less work than the layer's own pass and a thin one, that is what is done.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.delta import Delta, LowRank
from lorafit.errors import StateError, some
from lorafit.kernels.convolution import FULL
from lorafit.kernels.precision import wanted
from lorafit.layers.site import Acting, BaseForward, Site, apply

MOST = 2**18
"""Numbers of a weight on which a forward is tried: of a larger one some rows of each group stand for all."""
LARGER = (1, 4)
"""How large a trial input is: the larger one where the layer does not take the smaller."""
NEAR = 1e-9
"""How far two results in double precision may lie apart that are the same but for rounding."""
FIXED = (bool, int, float, str, torch.dtype, torch.SymInt, torch.SymFloat)
"""What a forward can be given and cannot write to."""
Draw = Callable[..., Tensor]


def genuine(kind: type[nn.Module]) -> type[nn.Module]:
    """A class without what this library, or a library after it, made of it by subclassing."""
    for each in kind.__mro__:
        base: type[nn.Module] | None = vars(each).get("_lorafit_base")
        if base is not None:
            return base
    return kind


def overriding(kind: type[nn.Module], base: type[nn.Module]) -> str | None:
    """The name of the class that gives `kind` a forward other than that of `base`, which it extends; None for none."""
    for method in ("forward", "_conv_forward"):
        owner = next((each for each in kind.__mro__ if method in vars(each)), None)
        if owner is not None and not issubclass(base, owner):
            return owner.__qualname__
    return None


def stand_in(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """An object that is the layer but for some tensors. Nothing is copied, and nothing of the layer changes."""
    kind = genuine(type(module))
    made = kind.__new__(kind)
    vars(made).update(vars(module), **tensors)  # found before torch looks among the parameters
    return made


def _swapped(module: nn.Module, own: BaseForward, x: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """The same for a compiler, which follows what is put among the parameters and not what is made of a class."""
    held: dict[str, Any] = module._parameters
    before = {name: held[name] for name in tensors}
    for name, tensor in tensors.items():
        held[name] = tensor
    try:
        return own(module, x)
    finally:
        for name, tensor in before.items():
            held[name] = tensor


def _with(base: Callable[..., Tensor], more: tuple[Any, ...], named: Mapping[str, Any]) -> BaseForward:
    """A layer's forward that is given this beside its input."""

    def own(module: nn.Module, x: Tensor) -> Tensor:
        return base(module, x, *more, **named)

    return own if more or named else base


def _again(base: Callable[..., Tensor], more: tuple[Any, ...], named: Mapping[str, Any]) -> BaseForward:
    """The same as often as it is called: tensors are what they are now, though a pass writes to them."""
    more, named = tuple(_copy(each) for each in more), {key: _copy(each) for key, each in named.items()}

    def own(module: nn.Module, x: Tensor) -> Tensor:
        return base(module, x, *map(_copy, more), **{key: _copy(each) for key, each in named.items()})

    return own if more or named else base


def _writable(more: tuple[Any, ...], named: Mapping[str, Any]) -> list[str]:
    """The types of what a layer is called with and may write to, such as a cache: a second pass finds it changed."""
    return [
        type(each).__name__ for each in (*more, *named.values()) if not isinstance(each, Tensor) and not _fixed(each)
    ]


def _fixed(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_fixed(each) for each in value)
    return value is None or isinstance(value, FIXED)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _refused(module: nn.Module, written: Sequence[str], when: str, fix: str) -> StateError:
    return StateError(
        f"a layer whose low-rank path is its own forward is called with a cache or the like {when}",
        found=f"{genuine(type(module)).__qualname__} called with {some(written)}, which one pass may have written to "
        "before another reads it",
        expected="tensors, numbers or nothing beside the input",
        fix=f"{fix}; or leave the layer out with exclude=",
    )


class FollowingSite(Site):
    """A layer of which the low-rank path is its own forward.

    Args:
        module: the layer.
        own: its forward, with whatever it was given beside x; None for the forward of its class.
    """

    __slots__ = ("own",)
    based: ClassVar[type[nn.Module]]
    """The layer type of torch that it is."""

    def __init__(self, module: nn.Module, own: BaseForward | None = None) -> None:
        super().__init__(module)
        self.own = own

    @abstractmethod
    def kernel(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, in) as the weight of such a layer with so many outputs."""

    @abstractmethod
    def trial(self, draw: Draw, larger: int) -> Tensor:
        """An input that such a layer takes, drawn by `draw(*sizes)`; of several samples."""

    @abstractmethod
    def positions(self, x: Tensor) -> int:
        """About how often the weight meets x."""

    def run(self, x: Tensor, **tensors: Tensor | None) -> Tensor:
        """What the layer's own forward makes of x with these tensors in the place of its own."""
        own: BaseForward = genuine(type(self.module)).forward if self.own is None else self.own
        if torch.compiler.is_compiling():
            return _swapped(self.module, own, x, tensors)
        return own(stand_in(self.module, tensors), x)

    def project(self, x: Tensor, matrix: Tensor, dropout: float = 0.0) -> Tensor:
        return self.run(F.dropout(x, dropout) if dropout else x, weight=self.kernel(matrix), bias=None)

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        return self.called(x, base, acting, (), {})

    def called(
        self,
        x: Tensor,
        base: Callable[..., Tensor],
        acting: Sequence[Acting],
        more: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> Tensor:
        """As `forward`, for a layer that is called with more than its input (an output size, a cache).

        Given what it may write to, it is passed once, with the changed weight, in whatever precision that has.
        """
        own = _with(base, more, named)
        written, drops = _writable(more, named), any(dropout for _, dropout in acting)
        if written or (len(acting) == 1 and not drops and self._one_pass(x, acting[0].update.delta)):
            if drops:
                raise _refused(self.module, written, "while its adapter drops inputs", "evaluation mode, or dropout=0")
            self.own = own
            return self._changed(x, acting)
        self.own = _again(base, more, named)  # before the layer's own pass, which may write to what it is given
        return apply(self, x, own(self.module, x), acting)

    def beside(self, more: tuple[Any, ...], named: Mapping[str, Any]) -> FollowingSite:
        if not more and not named:
            return self
        written = _writable(more, named)
        if written:
            raise _refused(self.module, written, "while its inputs are looked at", "calls without it (use_cache=False)")
        return type(self)(self.module, _again(genuine(type(self.module)).forward, more, named))

    def _changed(self, x: Tensor, acting: Sequence[Acting]) -> Tensor:
        """One pass with the weight that the updates make of the layer's own."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        matrix = self.weight()
        changes = [self.unfold(update.change(matrix)) for update, _ in acting]
        return self.run(x, weight=weight + sum(changes[1:], changes[0]).to(weight.dtype))

    def _one_pass(self, x: Tensor, delta: Delta) -> bool:
        """Whether a pass with the changed weight is the least work, as if all of the update were trained.

        By shapes alone: an adapter has the same output while it is trained and when it was loaded.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if wanted(x, weight.dtype) not in FULL:  # a small change would be rounded away
            return False
        if not isinstance(delta, LowRank):
            return True  # it is as large as the weight: a pass of its own for it costs a whole one
        out, inn, groups, _ = self.shape
        r, places = delta.down.shape[0], self.positions(x)
        formed = 4 * delta.up.numel() * inn
        return delta.down.shape[1] == inn and formed + places * out * inn < 3 * places * r * (inn + out // groups)

    def objection(self, path: str) -> tuple[str, str] | None:
        kind = type(self.module)
        owner = overriding(kind, self.based)
        if owner is None or genuine(kind) is not kind:  # an adapted layer was tried before
            return None
        held = type(self.module._parameters.get("weight"))
        plain = held is nn.Parameter  # nothing can be added to another library's own kind of tensor
        reason = _unlike(self) if plain else f"its weight is a {held.__name__}, and no plain tensor"
        if reason is None:
            return None
        return (
            f"{owner} has a forward of its own, which a low-rank path for {self.kind} would not follow: {reason}",
            f"leave it out with exclude=[{path!r}]",
        )


# Trying it


def _unlike(site: FollowingSite) -> str | None:
    """What the layer's own forward does that an adapter could not follow; None where it does nothing of the kind."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the layer itself has to say, it says when it is used
            tried = type(site)(_spare(site))
            for mode in (False, True):
                tried.module.train(mode)
                reason = _differs(tried, _input(tried))
                if reason is not None:
                    return reason
    except Exception as error:  # whatever another's code raises: that it does is the reason
        text = str(error).strip().partition("\n")[0]
        return f"on a trial input it raises {type(error).__name__}: {text}"
    return None


def _spare(site: FollowingSite) -> nn.Module:
    """The layer on the CPU, in double precision, with another weight, of some outputs of each group, and another bias.

    Nothing of it is the layer's own.
    """
    module, shape, draw = site.module, site.shape, _drawn(0)
    rows = shape.groups * min(shape.out // shape.groups, max(1, MOST // max(1, shape.groups * shape.inn)))
    tensors: dict[str, nn.Parameter | None] = {}
    tensors["weight"] = nn.Parameter(site.kernel(draw(rows, shape.inn)), requires_grad=False)
    tensors["bias"] = None if site.bias() is None else nn.Parameter(draw(rows), requires_grad=False)
    twin = stand_in(module, {})
    own = vars(twin)
    own["_parameters"] = {**module._parameters, **tensors}
    # Hooks may hold on to anything, and the layer's own are not called here.
    own.update({key: OrderedDict() for key in own if key.endswith(("_hooks", "_with_kwargs", "_always_called"))})
    return copy.deepcopy(twin).to(device="cpu", dtype=torch.float64)


def _drawn(seed: int) -> Draw:
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda *sizes: torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")


def _input(site: FollowingSite) -> Tensor:
    """The first trial input that the layer takes. Raises what it raises for the last."""
    for larger in LARGER[:-1]:
        x = site.trial(_drawn(1), larger)
        try:
            site.run(x)
        except Exception:  # another's code: the larger input tells
            continue
        return x
    return site.trial(_drawn(1), LARGER[-1])


def _differs(site: FollowingSite, x: Tensor) -> str | None:
    """What is wrong with a layer's forward for x, all in double precision."""
    module, shape, bias = site.module, site.shape, site.bias()
    held = [each.clone() for each in module.buffers()]
    y = site.run(x)
    if not isinstance(y, Tensor) or y.dtype != x.dtype:
        return f"it gives {_said(y)} for an input of {x.dtype}"
    axis = y.dim() - site.channel(x.new_empty(shape.out)).dim()
    if y.dim() != x.dim() or y.shape[axis] != shape.out:
        return f"its output has the shape {tuple(y.shape)}, without the {shape.out} channels where they belong"
    if not _near(site.run(x), y):
        return "it gives another output each time"
    if not all(torch.equal(before, now) for before, now in zip(held, module.buffers(), strict=True)):
        return "it changes its own buffers"
    if not _near(site.run(x[:1]), y[:1]):
        return "its output for one sample depends on the others"
    alone = y if bias is None else site.run(x, bias=None)
    if bias is not None and not _near(alone + site.channel(bias), y):
        return "its bias is not added as it is"
    weight = module.weight
    assert isinstance(weight, Tensor)
    nothing = site.run(x, weight=torch.zeros_like(weight), bias=None)
    if _near(nothing, alone) and bool(alone.any()):
        return "its weight is not read as self.weight"
    if bool(nothing.isfinite().all()) and not _near(nothing, torch.zeros_like(nothing)):
        return "it adds something to its output that is neither its weight's nor its bias"
    return _nonlinear(site, x, y, weight)


def _nonlinear(site: FollowingSite, x: Tensor, y: Tensor, weight: Tensor) -> str | None:
    """Whether the equation at the head of this file fails."""
    shape, draw = site.shape, _drawn(2)  # others than W has: with its own rows for A the question would be easier
    each = 2 if shape.out // shape.groups != 2 else 3  # another number of outputs than the layer has
    down, up = draw(shape.groups * each, shape.inn), draw(shape.out, each)
    through = site.expand(site.project(x, down), up)
    if through.shape != y.shape:
        return f"with another weight its output has the shape {tuple(through.shape)}, not {tuple(y.shape)}"
    changed = site.run(x, weight=weight + site.unfold(LowRank(up, down, groups=shape.groups).dense()))
    if _near(changed, y + through):
        return None
    apart = float((changed - y - through).norm() / through.norm().clamp(min=1e-300))
    return f"its output is not linear in its weight, or mixes its channels (off by {apart:.1%} of the change)"


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same but for rounding; never where one is not a number."""
    if one.shape != other.shape:
        return False
    largest = float(other.abs().max()) if other.numel() else 0.0
    return math.isfinite(largest) and bool(((one - other).abs() <= NEAR * max(largest, NEAR)).all())


def _said(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
