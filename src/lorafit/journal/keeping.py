"""Checkpoints of a loop, its best adapter, and the one that it ends with: written, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from lorafit.errors import CheckpointError, some
from lorafit.handle import Handle
from lorafit.journal import condition
from lorafit.journal.buffers import Buffers
from lorafit.journal.condition import Kept, read, restore, state_of
from lorafit.journal.place import BEST, CHECKPOINT, FINISHED, Place, Say, Whole, complete
from lorafit.state import load_state, save_state
from lorafit.training import ranks
from lorafit.training.owned import ADAPTER

CONDITION = "condition.pt"
BUFFERS = "buffers.pt"
RANDOM = "random-{}.pt"


@final
class Keeping:
    """What a loop keeps on the disk.

    In one of several processes the first one writes what all of them have alike, and each its own random numbers.

    Args:
        place: where.
        handle: the adapter.
        optimizer: trains it; None where the loop does not say.
        also: name → what else goes on with the loop.
        buffers: the model's own.
        say: is told what was found.
    """

    def __init__(
        self,
        place: Place,
        handle: Handle,
        optimizer: torch.optim.Optimizer | None,
        also: Mapping[str, Kept],
        buffers: Buffers,
        say: Say,
    ) -> None:
        self._place = place
        self._handle = handle
        self._optimizer = optimizer
        self._also = dict(also)
        self.buffers = buffers
        self._say = say
        self._proved = False
        self._last: tuple[int, int] | None = None

    def checkpoint(self, step: int, rounds: int, best: int | None) -> bool:
        """Writes all that the loop needs to go on from here; once is enough, which it says.

        Args:
            step: optimizer steps so far.
            rounds: rounds of the loop so far.
            best: the step of the best adapter so far, whose folder stays.
        """
        if self._last == (step, rounds):
            return False
        folder = ranks.first(lambda: self._place.fresh(CHECKPOINT, step))
        ranks.agreed(lambda: condition.write(folder / RANDOM.format(ranks.number()), condition.random_state()))
        ranks.first(lambda: self._write(folder, step, rounds, best))
        self._last = (step, rounds)
        return True

    def _write(self, folder: Path, step: int, rounds: int, best: int | None) -> None:
        state = {
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "also": {name: state_of(kept) for name, kept in self._also.items()},
        }
        condition.write(folder / CONDITION, state)
        if not self._proved:
            read(folder / CONDITION)  # better now than after a kill
            self._proved = True
        self._snapshot(folder)
        complete(folder, {"step": step, "rounds": rounds})
        self._place.tidy(best)

    def _snapshot(self, folder: Path) -> None:
        save_state(self._handle, folder)
        condition.write(folder / BUFFERS, self.buffers.state())

    def _load(self, folder: Path) -> None:
        load_state(self._handle, folder)
        self.buffers.put(read(folder / BUFFERS), self._say)

    def resume(self, whole: Whole) -> tuple[int, Mapping[str, Any]]:
        """Puts everything back as a checkpoint has it; gives the rounds until then, and the random generators' states.

        Raises:
            CheckpointError: it is damaged, or of a loop with something else.
        """
        state, fix = read(whole.path / CONDITION), f"give the journal what it had before, or remove {self._place.path}"
        known, mine = state.get("also", {}), self._also
        if known.keys() != mine.keys() or (state.get("optimizer") is None) != (self._optimizer is None):
            raise CheckpointError(
                "the checkpoint is of a loop that kept other things along",
                where=whole.path,
                found=_along(known, state.get("optimizer")),
                expected=_along(mine, self._optimizer),
                fix=fix,
            )
        self._load(whole.path)
        given: list[str] = []
        stands: list[str] = []
        try:
            if self._optimizer is not None:
                given = _rates(self._optimizer)
                self._optimizer.load_state_dict(state["optimizer"])
                stands = _rates(self._optimizer)
            for name, kept in mine.items():
                restore(kept, known[name])
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                "the checkpoint's optimizer, or what was kept along, does not fit this loop's",
                where=whole.path,
                found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                expected="the classes and settings that the loop began with",
                fix=fix,
            ) from error
        rounds = whole.facts.get("rounds")
        if not isinstance(rounds, int):
            raise CheckpointError(
                "the checkpoint does not say how many rounds it was after",
                where=whole.path,
                found=repr(rounds),
                expected="a whole number",
                fix=f"remove {whole.path.name}: the same program then goes on from the checkpoint before it",
            )
        if given != stands:
            self._say(
                f"the checkpoint's learning rate stands: {some(stands)}, not the {some(given)} of the optimizer as it "
                "was made now; another rate is another loop, in another folder"
            )
        self._last, self._proved = (whole.step, rounds), True
        return rounds, self._random(whole.path)

    def _random(self, folder: Path) -> Mapping[str, Any]:
        own = folder / RANDOM.format(ranks.number())
        if not own.is_file():
            self._say("the loop went on in fewer processes before: new ones draw other random numbers")
            own = folder / RANDOM.format(0)
        return read(own)

    def best(self, step: int) -> None:
        """Keeps the adapter as the best one so far."""

        def write() -> None:
            folder = self._place.fresh(BEST, step)
            self._snapshot(folder)
            complete(folder, {"step": step})

        ranks.first(write)

    def put_back(self, step: int) -> bool:
        """Makes the adapter what it was at the best step; says whether that was still there."""
        found = ranks.first(lambda: next((one for one in self._place.whole(BEST) if one.step == step), None))
        if found is None:
            self._say(f"the adapter of step {step:,}, the best one, is not there any more: the last one is kept")
            return False
        self._load(found.path)
        return True

    def finish(self) -> Path:
        """Writes the adapter that the loop ends with, for others and for this loop; gives its folder."""

        def write() -> Path:
            folder = self._handle.save(self._place.path / ADAPTER)
            self._snapshot(self._place.path / FINISHED)
            return folder

        return ranks.first(write)

    def finished(self) -> None:
        """Makes the adapter what it was when the loop ended."""
        self._load(self._place.path / FINISHED)


def _rates(optimizer: torch.optim.Optimizer) -> list[str]:
    """The learning rates that an optimizer began with, each once: what a schedule made of them since is its own."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return [f"{rate:.2g}" for rate in dict.fromkeys(rates)]


def _along(names: Mapping[str, Any], optimizer: object) -> str:
    return f"{some(sorted(names)) or 'nothing'}, and {'no' if optimizer is None else 'an'} optimizer"
