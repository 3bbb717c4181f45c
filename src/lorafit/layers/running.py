"""Layers that change themselves in training without being trained: they keep running statistics of what they see."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a layer moves statistics of its own in every forward pass in training mode, as BatchNorm2d does.

    No adapter holds them: after training they are the model's, and other ones than it came with. Only torch's own
    layers are known here, its norms and its spectral norms: whether others move their buffers is seen in training.
    """
    if isinstance(module, parametrizations._SpectralNorm):
        return True
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, SpectralNorm) for hook in hooks):
        return True
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
