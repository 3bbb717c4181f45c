"""What a member of the household is: the abstract classes, and nothing else.

A `Method` is a frozen set of hyperparameters that makes one `Adapter` for each `Spot`. An `Adapter` turns its
parameters into an `Update` of its site's weight. A `Schedule` is what a method does around the optimizer step, if
anything, and `Evidence` is what it looks at before the first one. `Around` is a method that is put around another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafit.delta import Update
from lorafit.errors import ConfigError, some
from lorafit.layers import Shape, Site

Batch = Any
"""What a data loader yields."""


class Adapter(nn.Module, ABC):
    """One method at one site. What is trained is a parameter, what is kept and not trained is a buffer.

    Attributes:
        dropout: probability with which the adapter's own input is dropped in training.
    """

    dropout: float = 0.0

    @abstractmethod
    def update(self, weight: Callable[[], Tensor]) -> Update:
        """The update of the site's weight, given a way to get that weight as a matrix (out, in).

        `weight` is called only by methods that need the weight: a quantised one is expensive to form.
        """

    def resize(self, shapes: Mapping[str, torch.Size]) -> None:
        """Gives the tensors of these names these shapes, before values of another rank are loaded into them.

        Raises:
            ValueError: the adapter's tensors have the shapes they have.
        """
        raise ValueError("tensors of this adapter cannot change their shape")


class Sharing(Adapter):
    """An adapter that uses a module together with others.

    The owner registers the module, so that it is moved, saved and counted once; the others only refer to it.
    """

    def __init__(self, module: nn.Module, *, owner: bool) -> None:
        super().__init__()
        if owner:
            self.shared = module
        self._reference = (module,)  # a tuple: not registered

    @property
    def common(self) -> nn.Module:
        """The module that is shared."""
        return self._reference[0]


class Schedule(ABC):
    """What a method does around the optimizer step. Steps that a gradient scaler skips are not seen here.

    With `optimizer.step(closure)` the gradients come inside the step: `before_step` then runs before they exist, and is
    not asked to if the schedule `needs_gradients`: such a step is refused.
    """

    needs_gradients: ClassVar[bool] = False

    def begin(self, total_steps: int | None) -> None:  # noqa: B027 (most schedules need no length)
        """An optimizer was bound for a run of so many optimizer steps; None when nobody said how many."""

    @abstractmethod
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs after backward, clipping and unscaling, before the optimizer changes a parameter."""

    @abstractmethod
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs after the optimizer changed the parameters."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue exactly: tensors, numbers, texts, lists and dicts of them.

        It is kept inside of the optimizer's own `state_dict`, so that whoever saves the one saves the other.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""

    def facts(self) -> dict[str, Any]:
        """What a run's records say of the schedule as it stands, in JSON's types; empty for nothing."""
        return {}

    def told(self) -> str | None:
        """The schedule's plan in one line, once an optimizer is bound; None if there is nothing to tell."""
        return None


@dataclass(frozen=True)
class Spot:
    """One place for an adapter, as a method sees it.

    Attributes:
        path: the module's path.
        shape: the matrix that the layer's weight is.
        weight: gives that matrix, (out, in).
        method: the method as it is here, with the rank and alpha that a pattern gave it.
        device, dtype: where the adapter will be, and the type of its tensors.
        shared: names of other parameters that are the same memory as this weight.
        evidence: what an initialiser was promised by its `Evidence`, or None.
    """

    path: str
    shape: Shape
    weight: Callable[[], Tensor]
    method: Method
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    shared: tuple[str, ...] = ()
    evidence: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """A part of the data that a method looks at before training.

    Args:
        batches: what is run through the model, a few dozen batches at most; each is a mapping of keyword arguments, a
            tuple of arguments, or one tensor.
        loss: runs the model on one batch and returns the loss. None: the output itself if it is a scalar, else its
            `loss` (as models of transformers have it).

    Raises:
        ConfigError: `batches` is no iterable of batches.
    """

    batches: Iterable[Batch]
    loss: Callable[[nn.Module, Batch], Tensor] | None = None

    def __post_init__(self) -> None:
        check_batches(self.batches, "Sample.batches", "Sample([batch])")


def check_batches(batches: object, where: str, fix: str) -> None:
    """Raises `ConfigError` for what is no iterable of batches; a mapping is one batch."""
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise ConfigError(
            "one batch stands where an iterable of batches belongs"
            if isinstance(batches, Mapping)
            else "this is no iterable of batches",
            where=where,
            found=f"{type(batches).__name__} with the keys {some(map(str, batches), 3)}"
            if isinstance(batches, Mapping)
            else repr(batches),
            expected="an iterable of batches, such as a list or a data loader",
            fix=fix,
        )


class Evidence(ABC):
    """What a method has to learn from data before its adapters can be made."""

    @abstractmethod
    def gather(self, model: nn.Module, sites: Mapping[str, Site], spots: Sequence[Spot], sample: Sample) -> list[Spot]:
        """The spots with `evidence`, and with the ranks that the data ask for; the model is left as it was.

        Args:
            model: the base model.
            sites: module path → site, one for each spot.
            spots: where adapters will be.
            sample: the data.
        """


@dataclass(frozen=True)
class Method(ABC):
    """One member of the household: its hyperparameters, validated when constructed.

    Attributes:
        name: on the command line and in files.
        paper: authors, year, arXiv number.
        trains: what is trained, in the paper's symbols.
        merges: whether the adapter can be folded into the weights, to rounding.
        in_peft: as what PEFT reads its files.
        in_vllm: how vLLM serves it.
        in_rows: whether its change is small enough that rows of one batch can have different ones at little cost.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    trains: ClassVar[str]
    merges: ClassVar[str] = "exactly"
    in_peft: ClassVar[str] = "LoRA"
    in_vllm: ClassVar[str] = "yes"
    in_rows: ClassVar[bool] = True

    @abstractmethod
    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> Adapter:
        """A new adapter for one spot, on the CPU or on its device, drawn from `generator` (torch's own when None)."""

    def adapters(self, spots: Sequence[Spot], *, generator: torch.Generator | None = None) -> dict[str, Adapter]:
        """Module path → new adapter. Spots that are left out stay as they are. Methods that share tensors override it.

        `spot.method` is this method as it is at that spot.
        """
        return {spot.path: spot.method.adapter(spot, generator=generator) for spot in spots}

    @abstractmethod
    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        """The paper's count of trained numbers for sites of these shapes, (out, in) or `Shape`."""

    @abstractmethod
    def at(self, *, r: int | None = None, alpha: float | None = None) -> Method:
        """The same method with another rank or alpha, for one site. Raises `ConfigError` where it has no such thing."""

    def impossible(self, spot: Spot) -> str | None:
        """Why a spot cannot take this method at all; None when it can."""
        return None

    def wasteful(self, spot: Spot) -> str | None:
        """Why a new adapter of this method makes no sense at a spot; None when it does."""
        return None

    @abstractmethod
    def adapter_settings(self) -> tuple[object, ...]:
        """What two adapters at one site must share for one to take the other's values: rank, scale and the like."""

    def settings(self) -> dict[str, object]:
        """The resolved figures that a run announces, in the order in which they are read."""
        return {}

    def ups(self) -> tuple[str, ...]:
        """Names of the trained matrices that end in the layer's output, LoRA's B; empty where there are none."""
        return ()

    def rate(self, shapes: Iterable[Shape | tuple[int, int]]) -> float:
        """A good learning rate for sites of these shapes, relative to LoRA's; where it was measured is said there."""
        return 1.0

    def evidence(self) -> Evidence | None:
        """What has to be learnt from data before adapters can be made; None for nothing."""
        return None

    def param_groups(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """Optimizer parameter groups for these trained parameters at base learning rate `lr`."""
        return [{"params": [parameter for _, parameter in named], "lr": lr}]

    def schedule(self, adapters: Mapping[str, Adapter]) -> Schedule | None:
        """What this method does around each optimizer step, for one handle's adapters by path; None for nothing."""
        return None


class Around(Method):
    """A method that is put around another one, and leaves to that one what it does not change."""

    @property
    @abstractmethod
    def within(self) -> Method:
        """The method inside."""

    @abstractmethod
    def around(self, inner: Method) -> Method:
        """This method around another one."""

    def unwrapped(self, adapter: Adapter) -> Adapter:
        """The inner method's adapter in one of this method's."""
        return adapter

    def inside(self, spot: Spot) -> Spot:
        """The spot as the inner method sees it."""
        assert isinstance(spot.method, Around)
        return replace(spot, method=spot.method.within)

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> Adapter:
        return self.within.adapter(self.inside(spot), generator=generator)

    def adapters(self, spots: Sequence[Spot], *, generator: torch.Generator | None = None) -> dict[str, Adapter]:
        return self.within.adapters([self.inside(spot) for spot in spots], generator=generator)

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        return self.within.num_trainable(shapes)

    def at(self, *, r: int | None = None, alpha: float | None = None) -> Method:
        return self.around(self.within.at(r=r, alpha=alpha))

    def impossible(self, spot: Spot) -> str | None:
        return self.within.impossible(self.inside(spot))

    def wasteful(self, spot: Spot) -> str | None:
        return self.within.wasteful(self.inside(spot))

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name, *self.within.adapter_settings())

    def settings(self) -> dict[str, object]:
        within = self.within.settings()
        names = [self.within.name, *([str(within.pop("inner"))] if "inner" in within else [])]
        return {"inner": " around ".join(names), **within}

    def ups(self) -> tuple[str, ...]:
        return self.within.ups()

    def rate(self, shapes: Iterable[Shape | tuple[int, int]]) -> float:
        return self.within.rate(shapes)

    def evidence(self) -> Evidence | None:
        return self.within.evidence()

    def param_groups(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        return self.within.param_groups(named, lr)

    def schedule(self, adapters: Mapping[str, Adapter]) -> Schedule | None:
        return self.within.schedule({path: self.unwrapped(adapter) for path, adapter in adapters.items()})
