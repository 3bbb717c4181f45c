"""A model and a loop of your own, from suggestion to report: no transformers, a few lines around an ordinary loop.

Run it with `python examples/any_model.py [FOLDER]`: about ten seconds. A small network with a depthwise convolution and
batch norms has learnt the digits 0 to 4 of a seven-segment display. It is adapted to the digits 5 to 9, which are other
pictures under the same five outputs. Stop it with Ctrl-C and start it again with the same folder: it goes on where it
was.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lorafit as lf

SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")
"""The segments of each digit, named as on a data sheet: a is the top one, then clockwise, g is in the middle."""
EPOCHS = 12


class Network(nn.Module):
    """Two blocks of convolutions, the second one depthwise and pointwise, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.second = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 8 * 6, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the five classes, for 1 × 16 × 12 images."""
        x = F.relu(self.norm(self.stem(images)))
        x = F.relu(self.second(self.pointwise(self.depthwise(x))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


def glyph(digit: int) -> Tensor:
    """A digit, 11 × 6, of bars one pixel wide."""
    image = torch.zeros(11, 6)
    bars = {
        "a": image[0],
        "b": image[:6, 5],
        "c": image[5:, 5],
        "d": image[10],
        "e": image[5:, 0],
        "f": image[:6, 0],
        "g": image[5],
    }
    for name in SEGMENTS[digit]:
        bars[name].fill_(1)
    return image


def pictures(first: int, count: int, seed: int) -> TensorDataset:
    """Noisy pictures of the five digits from `first` on, somewhere in the frame, and which of the five each shows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    images = torch.randn(count, 1, 16, 12, generator=generator) * 0.25
    places = torch.stack([torch.randint(size, (count,), generator=generator) for size in (6, 7)], dim=1)
    glyphs = [glyph(first + label) for label in range(5)]
    for image, label, (top, left) in zip(images, labels.tolist(), places.tolist(), strict=True):
        image[0, top : top + 11, left : left + 6] += glyphs[label]
    return TensorDataset(images, labels)


def pretrain(model: nn.Module, data: TensorDataset) -> None:
    """Stands for whatever the model was trained with: an ordinary loop over all weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(6):
        for images, labels in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of the pictures that are recognised."""
    model.eval()
    images, labels = data.tensors
    return (model(images).argmax(1) == labels).float().mean().item()


def adapt(model: nn.Module, folder: Path) -> lf.Handle:
    """Adapts the model to the other digits: what is asked of you to write."""
    loader = DataLoader(pictures(5, 1000, seed=2), batch_size=32, shuffle=True)
    held_out = DataLoader(pictures(5, 500, seed=3), batch_size=100)

    suggestion = lf.suggest(model, example=torch.zeros(2, 1, 16, 12))
    print(suggestion)
    handle = suggestion.attach(model, seed=0)
    optimizer = suggestion.optimizer(handle, torch.optim.AdamW)

    def losses(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        scores = model(images)
        return F.cross_entropy(scores, labels, reduction="none"), scores.argmax(1) == labels

    data = {"source": "digits 5 to 9 of a seven-segment display", "train_records": 1000}
    with lf.Journal(folder, handle, optimizer, epochs=EPOCHS, data=data) as journal:
        journal.evaluate(losses, held_out)
        for _ in journal:
            suggestion.train(model)
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                journal.step(loss, examples=len(labels))
            journal.evaluate(losses, held_out)
    return handle


def main(folder: Path | None = None) -> dict[str, float]:
    """Runs the example and returns its figures; what it writes goes into `folder`, or away when it is done."""
    torch.manual_seed(0)
    model, old, new = Network(), pictures(0, 500, seed=1), pictures(5, 500, seed=3)
    pretrain(model, pictures(0, 2000, seed=0))
    figures = {"0 to 4, base": accuracy(model, old), "5 to 9, base": accuracy(model, new)}
    with tempfile.TemporaryDirectory() as temporary:
        handle = adapt(model, Path(temporary) / "run" if folder is None else folder)
    if folder is None:
        print("no folder was given: what the run wrote is gone again")
    figures["5 to 9, adapted"] = accuracy(model, new)
    with handle.disabled():
        figures["0 to 4, adapter off"] = accuracy(model, old)
    for name, value in figures.items():
        print(f"{name:20}{value:7.1%}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the run is kept; without one, nothing is")
    main(parser.parse_args().folder)
