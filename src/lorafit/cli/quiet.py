"""Third parties that would talk in between: told to be quiet through the switches that they have for it."""

from __future__ import annotations

import os
import sys


def quiet() -> None:
    """Leaves the terminal to this program. Called by commands that are about to use transformers anyway."""
    # Workers of a data loader never tokenize, so that the warning about forked tokenizers has no object.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled() and sys.stderr.isatty()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # "Loading weights"; it turns those of downloads off as well
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if downloads:
        enable_progress_bars()  # gigabytes deserve one
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()


def quiet_pipelines() -> None:
    """The same for commands that are about to use diffusers.

    Raises:
        MissingExtraError: it is not installed.
    """
    from lorafit.diffusion.library import library

    quiet()
    logging = library().utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # "Loading pipeline components"
