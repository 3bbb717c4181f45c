"""Exit statuses, and how a command ends with one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorafit.errors import LorafitError

DONE = 0
MEND = 1
"""The user's input, data or surroundings must be mended."""
USAGE = 2
"""The command was written wrongly."""
INTERRUPTED = 130


class WrongUsageError(Exception):
    """Carries an error that is the command's own: a setting that does not exist, a value it cannot have."""

    def __init__(self, error: LorafitError) -> None:
        super().__init__(str(error))
        self.error = error


class StoppedError(Exception):
    """The user stopped the command, and what there is to say of it has been said."""


@contextmanager
def usage() -> Iterator[None]:
    """Within it every error of this library means that the command was written wrongly."""
    try:
        yield
    except LorafitError as error:
        raise WrongUsageError(error) from error
