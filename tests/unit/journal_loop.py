"""A loop with a journal, for the tests of kills: `journal_loop.py FOLDER METHOD [EPOCH BATCH]` kills itself there."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lorafit as lf

EPOCHS, BATCHES = 5, 4
METHODS: dict[str, lf.Method] = {
    "lora": lf.LoRA(r=4, dropout=0.2),
    "adalora": lf.AdaLoRA(init_r=4, target_r=2, interval=2),
    "dora": lf.DoRA(lf.LoRA(r=4)),
    "delta-lora": lf.DeltaLoRA(r=4, start=3),
}


class Network(nn.Module):
    """Two layers to adapt, a norm that keeps statistics, a head to train in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.norm = nn.BatchNorm1d(32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))))


def made(method: lf.Method) -> tuple[lf.Handle, torch.optim.Optimizer]:
    """The model as it comes, adapted, and an optimizer."""
    torch.manual_seed(3)
    handle = lf.attach(Network(), method, targets=["first", "second"], modules_to_save=["head"], seed=0)
    return handle, handle.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=EPOCHS * BATCHES)


def data() -> tuple[TensorDataset, TensorDataset]:
    """Points in three classes: to learn from, and held out."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * BATCHES + 30, 6, generator=generator)
    y = x[:, :3].argmax(1)
    return TensorDataset(x[:-30], y[:-30]), TensorDataset(x[-30:], y[-30:])


def losses(model: nn.Module) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    """What a journal measures."""

    def measure(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        scores = model(batch[0])
        return F.cross_entropy(scores, batch[1], reduction="none"), scores.argmax(1) == batch[1]

    return measure


def loop(
    folder: Path, name: str, stop: Callable[[int, int], None] = lambda epoch, batch: None
) -> tuple[lf.Handle, list[str], lf.Journal]:
    """Trains; random numbers of three libraries, dropout, statistics and a schedule of the rate have a part in it."""
    handle, optimizer = made(METHODS[name])
    model = handle.model
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    learnt, others = data()
    train, held = DataLoader(learnt, batch_size=16, shuffle=True), DataLoader(others, batch_size=16)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    lines: list[str] = []
    with lf.Journal(
        folder, handle, optimizer, epochs=EPOCHS, also={"rate": cosine}, log_every=1, seed=0, say=lines.append
    ) as journal:
        journal.evaluate(losses(model), held)
        for epoch in journal:
            model.train()
            for batch, (x, y) in enumerate(train):
                stop(epoch, batch)
                shifted = x + 0.1 * random.gauss(0, 1) + 0.1 * float(numpy.random.standard_normal())
                loss = F.cross_entropy(model(shifted), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                journal.step(loss, examples=len(y))
            cosine.step()
            journal.evaluate(losses(model), held)
    return handle, lines, journal


def main() -> None:
    """Runs the loop, and kills it where that was asked for."""
    folder, name, *place = sys.argv[1:]

    def stop(epoch: int, batch: int) -> None:
        if place == [str(epoch), str(batch)]:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    loop(Path(folder), name, stop)


if __name__ == "__main__":
    main()
