"""What all tests share: one thread, a fixed seed, and one case per layer type and setting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.delta import LowRank, Update
from lorafit.layers import Shape
from lorafit.method import Around, Spot


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@dataclass(frozen=True)
class Layer:
    """A layer to adapt, and an input for it."""

    id: str
    kind: Callable[..., nn.Module]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return int(self.options.get("groups", 1))

    def rank(self, r: int) -> int:
        """`r`, or the next rank that the layer's groups can share evenly."""
        return -(-r // self.groups) * self.groups

    def model(self) -> nn.Sequential:
        """The layer in a model that has a trainable parameter besides it."""
        model = nn.Sequential(OrderedDict(layer=self.kind(*self.args, **self.options), gate=nn.PReLU()))
        with torch.no_grad():
            model.layer.weight.normal_(std=0.5)  # HF's Conv1D starts so small that differences would drown
        return model

    def input(self, *, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.kind is nn.Embedding:
            return torch.randint(self.args[0], self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


def _convolutions() -> list[Layer]:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    sizes = {1: (2, 4, 9), 2: (2, 4, 7, 6), 3: (2, 4, 5, 4, 6)}
    settings: dict[str, dict[str, Any]] = {
        "stride": {"kernel_size": 3, "stride": 2, "bias": False},
        "padding": {"kernel_size": 3, "padding": 2, "stride": 2},
        "same-dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
        "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
        "replicate-strided": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
        "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
        "circular-same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "bias": False},
        "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
        "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
        "grouped-reflect-dilated": {
            "kernel_size": 2,
            "padding": 1,
            "padding_mode": "reflect",
            "dilation": 2,
            "groups": 2,
        },
    }
    return [
        Layer(f"Conv{dims}d-{name}", kind, (4, 8), sizes[dims], options)
        for dims, kind in kinds.items()
        for name, options in settings.items()
    ]


LAYERS = [
    Layer("Linear", nn.Linear, (6, 8), (3, 5, 6)),
    Layer("Linear-nobias", nn.Linear, (6, 8), (3, 6), {"bias": False}),
    Layer("Embedding", nn.Embedding, (11, 8), (3, 5)),
    Layer("Embedding-padding", nn.Embedding, (11, 8), (4, 9), {"padding_idx": 3, "scale_grad_by_freq": True}),
    Layer("HFConv1D", Conv1D, (8, 6), (3, 5, 6)),
    *_convolutions(),
    Layer("Conv2d-anisotropic", nn.Conv2d, (4, 8), (2, 4, 9, 8), {"kernel_size": (3, 2), "stride": (2, 1)}),
    Layer("Conv2d-pointwise", nn.Conv2d, (4, 8), (2, 4, 3, 3), {"kernel_size": 1}),
]
FEW = [
    layer
    for layer in LAYERS
    if layer.id in {"Linear", "Embedding-padding", "HFConv1D", "Conv1d-circular", "Conv2d-depthwise", "Conv3d-stride"}
]
METHODS = [(r, rslora, dropout) for r in (1, 4) for rslora in (False, True) for dropout in (0.0, 0.1)]


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.id)
def layer(request: pytest.FixtureRequest) -> Layer:
    """Every layer type with every setting that changes what it computes."""
    case: Layer = request.param
    return case


@pytest.fixture(params=FEW, ids=lambda layer: layer.id)
def some_layer(request: pytest.FixtureRequest) -> Layer:
    """One case of each layer type."""
    case: Layer = request.param
    return case


@pytest.fixture(params=METHODS, ids=lambda m: f"{'rslora' if m[1] else 'lora'}-r{m[0]}-dropout{m[2]:g}")
def method(request: pytest.FixtureRequest, layer: Layer) -> lf.LoRA:
    """LoRA and rsLoRA of two ranks, with and without dropout, as `layer` can take them."""
    r, rslora, dropout = request.param
    return lf.LoRA(r=layer.rank(r), alpha=3.0, rslora=rslora, dropout=dropout)


class ScaledAdapter(lf.Adapter):
    """The adapter of `Scaled`: LoRA's A and B, and g."""

    def __init__(self, inner: lf.Adapter) -> None:
        super().__init__()
        self.inner = inner
        self.gate = nn.Parameter(torch.ones(()))

    def update(self, weight: Callable[[], Tensor]) -> Update:
        delta = self.inner.update(weight).delta
        assert isinstance(delta, LowRank)
        mid = self.gate.expand(delta.down.shape[0])
        return Update(LowRank(delta.up, delta.down, mid=mid, scale=delta.scale, groups=delta.groups))


@dataclass(frozen=True)
class Scaled(Around):
    """A tenth method, from outside of the package: CONTRIBUTING's, ΔW = g s B A with one trained number g a site."""

    name = "scaled"
    paper = "none: an example"
    trains = "A, B, g"

    inner: lf.Method = field(default_factory=lf.LoRA)

    @property
    def within(self) -> lf.Method:
        return self.inner

    def around(self, inner: lf.Method) -> Scaled:
        return Scaled(inner)

    def unwrapped(self, adapter: lf.Adapter) -> lf.Adapter:
        assert isinstance(adapter, ScaledAdapter)
        return adapter.inner

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> lf.Adapter:
        return ScaledAdapter(super().adapter(spot, generator=generator))

    def adapters(self, spots: Sequence[Spot], *, generator: torch.Generator | None = None) -> dict[str, lf.Adapter]:
        inner = super().adapters(spots, generator=generator)
        return {path: ScaledAdapter(adapter) for path, adapter in inner.items()}

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        known = list(shapes)
        return super().num_trainable(known) + len(known)


@dataclass(frozen=True)
class Member:
    """One member of the household, made to fit a layer.

    `exact`: a new adapter changes nothing bit for bit (else to rounding). `restored`: a file gives back the method, and
    not a plain LoRA that computes the same.
    """

    id: str
    make: Callable[[Layer], lf.Method]
    exact: bool = True
    restored: bool = True


HOUSEHOLD = [
    Member("lora", lambda layer: lf.LoRA(r=layer.rank(2), alpha=4.0)),
    Member("rslora", lambda layer: lf.LoRA(r=layer.rank(2), alpha=3.0, rslora=True)),
    Member("pissa", lambda layer: lf.LoRA(r=layer.rank(2), init="pissa"), exact=False),
    Member("lora-plus", lambda layer: lf.LoRAPlus(r=layer.rank(2), ratio=8.0)),
    Member("lora-fa", lambda layer: lf.LoRAFA(r=layer.rank(2))),
    Member("vera", lambda layer: lf.VeRA(r=layer.rank(6), d_init=0.5)),
    Member("lora-drop", lambda layer: lf.LoRADrop(lf.LoRA(r=layer.rank(2)))),
    Member("lora-drop-chosen", lambda layer: lf.LoRADrop(lf.LoRA(r=layer.rank(2)), keep=("layer",))),
    Member("adalora", lambda layer: lf.AdaLoRA(init_r=layer.rank(3), target_r=layer.rank(2), total_steps=12)),
    Member("dora", lambda layer: lf.DoRA(lf.LoRA(r=layer.rank(2)))),
    Member("dora-rslora", lambda layer: lf.DoRA(lf.LoRA(r=layer.rank(2), rslora=True))),
    Member("dora-lora-fa", lambda layer: lf.DoRA(lf.LoRAFA(r=layer.rank(2)))),
    Member("dora-vera", lambda layer: lf.DoRA(lf.VeRA(r=layer.rank(6), d_init=0.5))),
    Member(
        "dora-adalora",
        lambda layer: lf.DoRA(lf.AdaLoRA(init_r=layer.rank(3), target_r=layer.rank(2), total_steps=12)),
    ),
    Member("lora-plus-dora", lambda layer: lf.LoRAPlus(inner=lf.DoRA(lf.LoRA(r=layer.rank(2))))),
    Member("delta-lora", lambda layer: lf.DeltaLoRA(r=layer.rank(2), start=2)),
    Member("did", lambda layer: lf.IntrinsicDimension(d=9, layerwise=False)),
    Member("said", lambda layer: lf.IntrinsicDimension(d=9)),
    Member("a-tenth", lambda layer: Scaled(lf.LoRA(r=layer.rank(2))), restored=False),
]


@pytest.fixture(params=HOUSEHOLD, ids=lambda member: member.id)
def member(request: pytest.FixtureRequest) -> Member:
    """Every method and every composition."""
    case: Member = request.param
    return case


@pytest.fixture
def fill() -> Callable[..., None]:
    """Gives all tensors of an adapter values of usual size, as training would have."""

    def fill(handle: lf.Handle, seed: int = 7, std: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in handle.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.mul(std))

    return fill
