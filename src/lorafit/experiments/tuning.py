"""The search of a learning rate: a few rates, spread over a range around the method's own, then where it looks best.

What is tried next depends on what was found before and on nothing else, so that a search that was killed goes on as if
it had not been: Optuna's sampler is made anew for each rate, from a seed of the candidate's name and the rate's number.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lorafit.errors import MissingExtraError

STORAGE = "rates.sqlite"
RATE = "learning_rate"
TIMES = 10.0
"""The range: the default rate divided by this up to the default rate times this."""
DESIGN = (1.0, 10**0.5, 10**-0.5)
"""The first rates, relative to the default one; the sampler chooses what comes after them."""


@final
@dataclass(frozen=True)
class Tried:
    """One rate, and the held-out loss that it led to; None where the run diverged."""

    rate: float
    loss: float | None


@final
class Search:
    """The rates of one candidate.

    Args:
        folder: the experiment's, in which the searches of all candidates are kept.
        name: the candidate's.
        default: the rate to begin with.
        count: how many rates to try.

    Raises:
        MissingExtraError: Optuna is not installed.
    """

    def __init__(self, folder: Path, name: str, default: float, count: int) -> None:
        self._optuna: Any = optuna()
        self._name, self._default, self._count = name, default, count
        self._range = self._optuna.distributions.FloatDistribution(default / TIMES, default * TIMES, log=True)
        folder.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{(folder / STORAGE).absolute()}"
        self._study = self._optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )

    @property
    def tried(self) -> tuple[Tried, ...]:
        """What was found so far, in the order in which it was tried."""
        done = self._study.get_trials(deepcopy=False)[: self._count]
        return tuple(Tried(rounded(one.params[RATE]), one.value if math.isfinite(one.value) else None) for one in done)

    def next(self) -> float | None:
        """The rate to try now; None when enough were. It is the same until `tell` says what it led to."""
        done = self._study.get_trials(deepcopy=False)
        number = len(done)
        if number >= self._count:
            return None
        if number < len(DESIGN):
            return rounded(self._default * DESIGN[number])
        sampler = self._optuna.samplers.TPESampler(
            n_startup_trials=len(DESIGN), seed=zlib.crc32(f"{self._name} {number}".encode())
        )
        # Asked of a copy: nothing is kept of a rate before it is known what it led to.
        copy = self._optuna.create_study(direction="minimize", sampler=sampler)
        copy.add_trials(done)
        return rounded(copy.ask({RATE: self._range}).params[RATE])

    def tell(self, rate: float, loss: float | None) -> None:
        """What the rate that `next` gave led to; None for a run that diverged."""
        # That is worse than every loss: the sampler is to keep away from there.
        value = math.inf if loss is None else loss
        kept = min(max(rate, self._range.low), self._range.high)  # three digits of an end may lie beyond it
        trial = self._optuna.trial.create_trial(params={RATE: kept}, distributions={RATE: self._range}, value=value)
        self._study.add_trial(trial)


def rounded(rate: float) -> float:
    """A rate with three digits, as folders are named after it.

    >>> rounded(0.00123456)
    0.00123
    """
    return float(f"{rate:.2e}")


def best(tried: tuple[Tried, ...]) -> Tried | None:
    """The rate with the lowest loss, the first of equals; None where every run diverged."""
    finite = [one for one in tried if one.loss is not None]
    return min(finite, key=lambda one: one.loss or 0.0, default=None)


def optuna() -> Any:
    """The package that searches, told to be quiet. Raises `MissingExtraError` where it is not installed."""
    try:
        import optuna as found
    except ImportError as error:
        raise MissingExtraError(
            "the search of learning rates needs the package optuna",
            found=f"no {error.name}",
            expected="optuna 4.0 or newer",
            fix="pip install 'lorafit[compare]'",
        ) from error
    found.logging.set_verbosity(found.logging.WARNING)
    return found
