"""How small and how large a subspace of a model can be, told without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch

from lorafit.errors import ConfigError
from lorafit.layers import Shape
from lorafit.methods import build
from lorafit.methods.intrinsic import IntrinsicDimension, layer_of
from lorafit.plan import Modules, choose, saved_paths
from lorafit.training.config import Settings
from lorafit.training.models import Notify, classifier_shape, default_rate, head_paths, locate
from lorafit.training.planning_shades import shades
from lorafit.training.pooling import pooling_of


@final
@dataclass(frozen=True)
class Limits:
    """What the subspaces of a model lie in.

    Attributes:
        shapes: of the adapted layers' weights.
        layers: of these, counted as SAID counts them: one λ each.
        width: of the model's hidden states.
        head: whether there is one, which is trained in full beside the subspace.
    """

    shapes: tuple[Shape, ...]
    layers: int
    width: int
    head: bool

    @property
    def size(self) -> int:
        """D: the numbers in the adapted layers."""
        return sum(shape.out * shape.inn for shape in self.shapes)

    def least(self, layerwise: bool) -> int:
        """The smallest d: λ of each layer is counted in d, and one more is left for the subspace."""
        return self.layers + 1 if layerwise else 1

    def rate(self, d: int, layerwise: bool) -> float:
        """The learning rate of the method at this d, by default."""
        return default_rate(self.width) * IntrinsicDimension(d=d, layerwise=layerwise).rate(self.shapes)

    @property
    def head_rate(self) -> float:
        """The learning rate of what is trained in full beside a subspace: LoRA's, whatever that of the d numbers."""
        return default_rate(self.width)

    def reference_rate(self, settings: Settings) -> float:
        """The learning rate of the method of `settings`, by default."""
        return default_rate(self.width) * build(settings.method, settings.method_options).rate(self.shapes)


def limits(settings: Settings, labelled: bool, notify: Notify) -> Limits:
    """Those of the model and the targets of these settings; nothing but the config is read.

    Raises:
        ConfigError: there is no such model.
        TargetError: the targets match nothing.
    """
    model, head = _shape(settings, labelled, notify)
    shades(model)  # layers on the meta device are refused
    modules = Modules.of(model)
    saved = saved_paths(modules, list(dict.fromkeys([*settings.modules_to_save, *head])))
    paths = choose(model, modules, settings.targets, settings.exclude, saved)
    return Limits(
        tuple(site.shape for site in modules.sites(paths)),
        len({layer_of(path) for path in paths}),
        model.config.get_text_config().hidden_size,
        bool(head),
    )


def _shape(settings: Settings, labelled: bool, notify: Notify) -> tuple[Any, list[str]]:
    """The model without weights, and the modules of its head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    located = locate(settings.model, notify)
    pooling = pooling_of(located.path, settings.pooling).kind if labelled else None
    try:
        config = AutoConfig.from_pretrained(located.path)
        with torch.device("meta"):
            if not labelled:
                return AutoModelForCausalLM.from_config(config), []
            model = classifier_shape(config, ("no", "yes"), 0, pooling)  # how many there are plays no part
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model's config cannot be read: {str(error).strip().splitlines()[0]}",
            where=f"model: {located.path}",
            expected="a model directory, or a hub name that can be reached",
            fix="mend the name, or leave model out for the embedded default",
        ) from error
    return model, head_paths(model)
