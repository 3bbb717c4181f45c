"""Outputs of norms and activations, and products of two of them, computed again in the backward pass.

A decoder layer keeps for its backward pass what its matrix products need, and beside that what norms, activation and
the product of gate and up put out. The latter are many and cheap: they follow, number by number, from what is kept
anyway. Whoever saves such a tensor is given a recipe for it instead (torch's hooks for saved tensors); no matrix
product is computed twice. Which modules these are is seen in one forward pass, by what they do and not by their names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lorafit.adapted import bank_of, walk
from lorafit.training.prefix_trial import COARSE, Ran, undisturbed

Batch = Mapping[str, Tensor]


class Keeping(ABC):
    """What a forward pass keeps for the backward pass."""

    @abstractmethod
    def over(self) -> AbstractContextManager[None]:
        """Around a forward pass."""


@final
class KeepsAll(Keeping):
    """Whatever autograd saves."""

    def over(self) -> AbstractContextManager[None]:
        return nullcontext()


class Product(NamedTuple):
    """A place where a module's input is the product of two others' outputs, the first of which is cheap."""

    cheap: nn.Module
    other: nn.Module
    taker: nn.Module


class Places(NamedTuple):
    """Where outputs are cheap."""

    modules: tuple[nn.Module, ...]
    products: tuple[Product, ...]


@final
class _Recipe:
    """How to make a tensor again: (what it was, what it is made of)."""

    def __init__(self, output: Tensor, make: Callable[[], Tensor]) -> None:
        # Identity, not address: other memory may come to lie there while the forward still runs.
        self.memory = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]
        self.dtype = output.dtype
        self._make = make
        self._autocast = _autocast(output.device.type)

    def made(self) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self._make()


class _Packed(NamedTuple):
    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@final
class CheapAgain(Keeping):
    """All but the outputs of some modules, which are computed again.

    Args:
        places: which; the modules get hooks that do something only inside of `over`.
    """

    def __init__(self, places: Places) -> None:
        self._recipes: dict[StorageWeakRef, _Recipe] = {}
        self._inputs: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}
        self._last: tuple[_Recipe, Tensor] | None = None
        self._on = False
        multiplied = {product.cheap for product in places.products}
        for module in places.modules:
            module.register_forward_hook(self._cheap(keeps=module in multiplied))
        for product in places.products:
            product.other.register_forward_hook(self._seen)
            product.taker.register_forward_pre_hook(self._multiplied(product))

    @contextmanager
    def over(self) -> Iterator[None]:
        self._last = None
        self._on = True
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._on = False
            for held in (self._recipes, self._inputs, self._outputs):
                held.clear()

    def _cheap(self, *, keeps: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._on and isinstance(output, Tensor) and output.requires_grad and _whole(output):
                source = args[0].detach()
                self._add(output, lambda: module(source))
                if keeps:
                    self._inputs[module] = source

        return hook

    def _seen(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._on and isinstance(output, Tensor) and output.requires_grad:
            self._outputs[module] = output.detach()

    def _multiplied(self, product: Product) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            source, other = self._inputs.pop(product.cheap, None), self._outputs.pop(product.other, None)
            if self._on and source is not None and other is not None and _whole(args[0]):
                self._add(args[0], lambda: product.cheap(source) * other)

        return hook

    def _add(self, output: Tensor, make: Callable[[], Tensor]) -> None:
        recipe = _Recipe(output, make)
        self._recipes[recipe.memory] = recipe

    def _pack(self, saved: Tensor) -> Tensor | _Packed:
        if isinstance(saved, nn.Parameter) or not self._recipes:
            return saved
        recipe = self._recipes.get(StorageWeakRef(saved.untyped_storage()))  # type: ignore[no-untyped-call]
        if recipe is None or recipe.dtype != saved.dtype:
            return saved
        return _Packed(recipe, saved.size(), saved.stride(), int(saved.storage_offset()))

    def _unpack(self, packed: Tensor | _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        # Layers that share an input (query, key, value) ask for it one after the other.
        if self._last is None or self._last[0] is not packed.recipe:
            self._last = None
            self._last = (packed.recipe, packed.recipe.made())
        return self._last[1].as_strided(packed.size, packed.stride, packed.offset)


def _whole(output: Tensor) -> bool:
    """Whether a tensor is all of its memory, in order."""
    return output.is_contiguous() and output.untyped_storage().nbytes() == output.numel() * output.element_size()


def _autocast(kind: str) -> Callable[[], AbstractContextManager[None]]:
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def make_cheap(
    model: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch, device: torch.device
) -> tuple[Keeping, str]:
    """Finds what is cheap in this model, and tries whether loss and gradients stay the same bit for bit.

    Args:
        model: with the adapter attached, on its device; it is left as it was, but for hooks that sleep.
        loss: of a batch, as in training.
        batch: a small one of the training data.
        device: of the model.

    Returns:
        How to run, and a sentence for the user.
    """
    with undisturbed(model, device):
        places = find_places(model, lambda: loss(batch))
        if not places.modules:
            return KeepsAll(), "recompute has no effect: this model has no norms or activations of the known kind"
        keeping = CheapAgain(places)
        plain, again = Ran.of(model, loss, batch), Ran.of(model, loss, batch)
        with keeping.over():
            torch.manual_seed(0)
            value = loss(batch)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ran = Ran(value.detach(), torch.autograd.grad(value, parameters, allow_unused=True))
    if ran.same(plain) or (not again.same(plain) and ran.near(plain, COARSE)):
        count = len(places.modules) + len(places.products)
        return keeping, f"{count} outputs of norms and activations are computed again in the backward pass"
    return KeepsAll(), "recompute is off: gradients of this model would not stay the same"


def find_places(model: nn.Module, run: Callable[[], object]) -> Places:
    """The modules whose output follows cheaply from their input, and the products, seen in one forward pass."""
    leaves = [module for _, module, _ in walk(model) if _may_be_cheap(module)]
    siblings = {child: tuple(parent.children()) for _, parent, _ in walk(model) for child in parent.children()}
    cheap: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    products: dict[nn.Module, Product] = {}

    def leaf(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if len(args) == 1 and not kwargs and _follows(module, args[0], output):
            cheap[module] = output.detach()

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[module] = output.detach()

    def taken(module: nn.Module, args: Any) -> None:
        around = siblings.get(module, ())
        pairs = [(one, other) for one in around if one in cheap for other in around if other in outputs]
        for one, other in pairs:
            if one is not other and args and _is_product(args[0], cheap[one], outputs[other]):
                products[module] = Product(one, other, module)
        for one in around:  # what a layer put out is of no more use behind its last sibling
            outputs.pop(one, None) if module is around[-1] else None

    with ExitStack() as hooks, torch.no_grad():
        for module in leaves:
            hooks.callback(module.register_forward_hook(leaf, with_kwargs=True).remove)
        beside = {child for one in leaves for child in siblings.get(one, ()) if child not in leaves}
        for module in beside:
            hooks.callback(module.register_forward_pre_hook(taken).remove)
            hooks.callback(module.register_forward_hook(seen).remove)
        torch.manual_seed(0)
        run()
    return Places(tuple(cheap), tuple(products.values()))


def _may_be_cheap(module: nn.Module) -> bool:
    """Whether a module has no parts, no matrix, and nothing that is trained."""
    if bank_of(module) is not None or next(module.children(), None) is not None or isinstance(module, nn.Dropout):
        return False
    return all(one.dim() < 2 and not one.requires_grad for one in module.parameters(recurse=False))


def _follows(module: nn.Module, source: Any, output: Any) -> bool:
    """Whether a tensor of the same shape, in memory of its own, comes out bit for bit when it is computed again."""
    if not (isinstance(source, Tensor) and isinstance(output, Tensor) and source.is_floating_point()):
        return False
    if source.shape != output.shape or source.dim() < 2 or not _whole(output):
        return False
    if source.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
        return False
    again = module.forward(source)
    return isinstance(again, Tensor) and again.stride() == output.stride() and torch.equal(again, output)


def _is_product(taken: Any, one: Tensor, other: Tensor) -> bool:
    return isinstance(taken, Tensor) and taken.shape == one.shape == other.shape and torch.equal(one * other, taken)
