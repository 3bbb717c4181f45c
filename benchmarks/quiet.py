"""Silence: what PEFT, TRL and transformers say of their own is not what is measured."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("transformers", "peft", "trl", "accelerate", "datasets")


@contextmanager
def quiet() -> Iterator[None]:
    """Within it no warning is shown, and libraries log errors alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
