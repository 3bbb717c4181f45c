"""A loop with a journal in one of two processes: `journal_work.py FOLDER STOP`, where all are killed at epoch STOP.

Started by `test_journal.py`. Each process writes what it ended with beside the loop's folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lorafit as lf
from lorafit.training import ranks

EPOCHS, STEPS = 4, 3


def main(folder: Path, stop: int) -> None:
    """Trains on what each process draws for itself, and evaluates on what all have."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    held = torch.randn(20, 6)
    handle = lf.attach(model, lf.LoRA(r=4, dropout=0.1), targets=["0", "2"], seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2)
    parallel = DistributedDataParallel(model)

    def losses(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), (x.sum(1) > 0).long(), reduction="none")

    torch.manual_seed(10 + rank)  # each process its own data
    with lf.Journal(folder, handle, optimizer, epochs=EPOCHS, log_every=1) as journal:
        journal.evaluate(losses, held.split(10))
        for epoch in journal:
            if epoch == stop:
                sys.stdout.flush()
                os._exit(9)
            for _ in range(STEPS):
                x = torch.randn(8, 6)
                loss = F.cross_entropy(parallel(x), (x.sum(1) > 0).long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                journal.step(loss, examples=8)
            journal.evaluate(losses, held.split(10))
    found = {"parameters": [p.detach() for p in handle.parameters()], "losses": [e.mean for e in journal.evaluations]}
    torch.save(found, folder.parent / f"process-{rank}.pt")
    dist.barrier()
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still run: taking Python down around them has ended a finished process by a signal
