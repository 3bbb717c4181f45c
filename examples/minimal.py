"""The minimal example: what LoRA is, on one linear layer.

A linear model learns y = X θ. Then the world changes to θ + 1. A change of rank one, 2,001 numbers where the layer has
1,001,000, brings the model there; added to the weight it costs nothing at inference.

Run it with `python examples/minimal.py`: about two minutes on two cores. It prints each figure beside its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafit as lf

IN, OUT, N, BATCH = 1001, 1000, 10_000, 128


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int) -> float:
    """Trains on mean squared error, and returns it over all the data."""
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return loss(model, x, y)


@torch.no_grad()
def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean squared error over all the data."""
    return F.mse_loss(model(x), y).item()


def main(epochs: int = 100) -> dict[str, float]:
    """Runs the example and returns its figures."""
    torch.manual_seed(0)
    x, theta = torch.randn(N, IN), torch.randn(IN, OUT)
    model = nn.Linear(IN, OUT, bias=False)

    base = fit(model, torch.optim.Adam(model.parameters(), lr=1e-3), x, x @ theta, epochs)
    x = torch.randn(N, IN)
    y = x @ (theta + 1)
    shifted = loss(model, x, y)

    handle = lf.attach(model, lf.LoRA(r=1, alpha=1), seed=0)
    adapted = fit(model, handle.optimizer(torch.optim.Adam, lr=1e-3), x, y, epochs)
    delta = handle.delta("")
    handle.merge_and_detach()
    merged = loss(model, x, y)

    figures = {
        "base loss": (base, "≤ 1e-3"),
        "base loss on the shifted data": (shifted, "≈ 993 (1001 ± 14)"),
        "numbers trained": (float(IN + OUT), "2,001 of 1,001,000"),
        "loss with LoRA, r = 1": (adapted, "≤ 5e-3"),
        "largest |Δ - 1|": ((delta - 1).abs().max().item(), "≤ 0.01"),
        "loss of the merged plain layer": (merged, "the same"),
    }
    print(f"{'':34}{'here':>12}   reference")
    for name, (value, reference) in figures.items():
        print(f"{name:34}{value:12.5g}   {reference}")
    return {name: value for name, (value, _) in figures.items()}


if __name__ == "__main__":
    main()
