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
from lorafit.training.models import Notify, default_rate, locate
from lorafit.training.planning_shades import shades


@final
@dataclass(frozen=True)
class Limits:
    """What the subspaces of a model lie in.

    Attributes:
        shapes: of the adapted layers' weights.
        layers: of these, counted as SAID counts them: one λ each.
        width: of the model's hidden states.
        head: whether a classifier's head is new, and trained in full beside the subspace.
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


def limits(settings: Settings, classifies: bool, notify: Notify) -> Limits:
    """Those of the model and the targets of these settings; nothing but the config is read.

    Raises:
        ConfigError: there is no such model.
        TargetError: the targets match nothing.
    """
    model, head = _shape(settings, classifies, notify)
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


def _shape(settings: Settings, classifies: bool, notify: Notify) -> tuple[Any, list[str]]:
    """The model without weights, and the modules that its checkpoint does not hold."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    located = locate(settings.model, notify)
    try:
        config = AutoConfig.from_pretrained(located.path)
        with torch.device("meta"):
            if not classifies:
                return AutoModelForCausalLM.from_config(config), []
            known = any("SequenceClassification" in name for name in config.architectures or ())
            model = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model's config cannot be read: {str(error).strip().splitlines()[0]}",
            where=f"model: {located.path}",
            expected="a model directory, or a hub name that can be reached",
            fix="mend the name, or leave model out for the embedded default",
        ) from error
    inside = f"{model.base_model_prefix}."
    outside = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(inside)}
    return model, [] if known else sorted(outside)
