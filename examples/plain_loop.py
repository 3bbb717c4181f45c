"""LoRA in a loop of your own, on any PyTorch model: here a small network of convolutions on images of shapes.

Run it with `python examples/plain_loop.py`: a few seconds. The model first learns to say where a bar
is, is then adapted to say where a blob is, counted from the other end, and afterwards both tasks are there: one with
the adapter on, one with it off.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafit as lf


def network() -> nn.Sequential:
    """Two convolutions and a linear layer, for 1 × 12 × 12 images and 5 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 6 * 6, 5),
    )


def shapes(task: int, count: int) -> tuple[Tensor, Tensor]:
    """Noisy images of bars (task 0) or blobs (task 1) at five positions; blobs are counted from the other end."""
    labels = torch.randint(0, 5, (count,))
    images = torch.randn(count, 1, 12, 12) * 0.5
    for image, label in zip(images, labels.tolist(), strict=True):
        if task == 0:
            image[0, :, 2 * label : 2 * label + 2] += 1.5
        else:
            start = 2 * (4 - label)
            image[0, start : start + 3, start : start + 3] += 1.5
    return images, labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: int, steps: int = 150) -> None:
    """An ordinary training loop: nothing in it knows of adapters."""
    model.train()
    for _ in range(steps):
        images, labels = shapes(task, 64)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, task: int) -> float:
    """Share of 1,000 new images that are recognised."""
    model.eval()
    images, labels = shapes(task, 1000)
    return (model(images).argmax(1) == labels).float().mean().item()


def main() -> dict[str, float]:
    """Runs the example and returns its figures."""
    torch.manual_seed(0)
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), task=0)
    figures = {"bars, base": accuracy(model, 0), "blobs, base": accuracy(model, 1)}

    handle = lf.attach(model, lf.LoRA(r=2), targets=r"\d", seed=0)  # a regular expression: every numbered layer
    print(handle.summary())
    train(model, handle.optimizer(torch.optim.AdamW, lr=1e-2), task=1)
    figures["blobs, adapted"] = accuracy(model, 1)
    with handle.disabled():
        figures["bars, adapter off"] = accuracy(model, 0)

    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)
        handle.detach()
        lf.load(model, folder).merge_and_detach()  # a plain network again, with the adapter in its weights
    figures["blobs, merged"] = accuracy(model, 1)
    for name, value in figures.items():
        print(f"{name:20}{value:7.1%}")
    return figures


if __name__ == "__main__":
    main()
