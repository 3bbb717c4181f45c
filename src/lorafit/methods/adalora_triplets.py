"""What AdaLoRA's schedule (see `adalora`) needs of an adapter, and how triplets are taken out of one in mid-run."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorafit.method import Adapter

TRIPLET = ("P", "lam", "Q")
"""The names of a triplet's three parts."""


class Triplets(Adapter, ABC):
    """An adapter made of k triplets, each a column of P, a λ and a row of Q; there may be none.

    Args:
        p: P, (out, k / groups).
        lam: Λ, (k,).
        q: Q, (k, in).
        groups: among how many groups of a convolution the triplets are shared out.
    """

    def __init__(self, p: Tensor, lam: Tensor, q: Tensor, groups: int) -> None:
        super().__init__()
        self.P = nn.Parameter(p)
        self.lam = nn.Parameter(lam)
        self.Q = nn.Parameter(q)
        self.groups = groups

    def resize(self, shapes: Mapping[str, torch.Size]) -> None:
        own = dict(self.named_parameters())
        k = shapes["lam"].numel() if "lam" in shapes else self.lam.shape[0]
        fitting = {"P": (self.P.shape[0], k // self.groups), "lam": (k,), "Q": (k, self.Q.shape[1])}
        wanted = {name: tuple(each.shape) for name, each in own.items()} | {n: tuple(s) for n, s in shapes.items()}
        if wanted != fitting or k % self.groups:
            raise ValueError(f"{k} triplets in {self.groups} groups would be {fitting}, not {wanted}")
        for name, parameter in own.items():
            replace(parameter, parameter.new_zeros(fitting[name]))


def parameter_of(adapter: Triplets, name: str) -> nn.Parameter:
    """P, lam or Q of an adapter, by name; what `get_parameter` does with paths of modules takes ten times as long."""
    parameter = adapter._parameters[name]
    assert parameter is not None
    return parameter


def blocks(tensor: Tensor, groups: int) -> Tensor:
    """A site's P, Λ or Q, seen by group: P (g, out / g, c), Λ (g, c), Q (g, c, in)."""
    return tensor.view(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def survivors(live: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What is left of a site's triplets when as many are removed as every group can spare.

    Args:
        live: (k,), the triplets that are kept.
        groups: among how many groups the triplets are shared out.

    Returns:
        (index, live): which triplets stay of each group, (groups, c'), and which of these are kept ones, (k',). All
        groups have as many as the one that keeps most: they are one tensor.
    """
    blocks = live.view(groups, live.shape[0] // groups)
    most = int(blocks.sum(dim=1).max()) if live.numel() else 0
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    index = order[:, :most].sort(dim=1).values
    return index, blocks.gather(1, index).flatten()


def cut(tensor: Tensor, name: str, index: Tensor) -> Tensor:
    """The part of a site's P, Λ or Q that belongs to the triplets of `index`, (g, c')."""
    parts = blocks(tensor, index.shape[0])
    if name == "P":
        return parts.gather(2, index[:, None].expand(-1, parts.shape[1], -1)).flatten(0, 1)
    if name == "Q":
        index = index[:, :, None].expand(-1, -1, parts.shape[2])
    return parts.gather(1, index).flatten(0, 1)


def alone() -> bool:
    """Whether this process trains by itself: the others' wrappers count on parameters of the size they began with."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def stand_ins(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether these only stand for what an optimizer holds (`lorafit.sharded`): then their shapes are not theirs."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return bool(parameters) and not any(id(parameter) in held for parameter in parameters)


def separable(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Whether all that the optimizer holds for a parameter has the parameter's shape, or is a single number."""
    return all(
        value.shape == parameter.shape or value.numel() == 1
        if isinstance(value, Tensor)
        else value is None or isinstance(value, int | float | str)
        for value in optimizer.state.get(parameter, {}).values()
    )


def shrink(parameter: nn.Parameter, name: str, index: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Leaves of one of a site's parameters, and of what the optimizer holds for it, the triplets of `index`."""
    held = optimizer.state.get(parameter, {})
    for key, value in held.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            held[key] = cut(value, name, index)
    gradient = parameter.grad
    replace(parameter, cut(parameter.detach(), name, index))
    parameter.grad = None if gradient is None else cut(gradient, name, index)


def replace(parameter: nn.Parameter, values: Tensor) -> None:
    """Gives a parameter values of another shape, and no gradient.

    As long as a graph of an earlier forward pass is alive (a loop's variable `loss` is enough), autograd goes on to
    expect gradients of the old shape. It forgets that when the type changes: hence the stop on the way.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = parameter.detach().new_empty(0, dtype=other)
    parameter.data = values
