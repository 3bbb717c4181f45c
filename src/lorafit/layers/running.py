"""Layers that change themselves in training without being trained: they keep running statistics of what they see."""

from __future__ import annotations

from torch import nn


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a layer moves statistics of its own in every forward pass in training mode, as BatchNorm2d does.

    No adapter holds them: after training they are the model's, and other ones than it came with.
    """
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
