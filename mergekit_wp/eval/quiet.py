"""Silence what the libraries say about themselves."""

from __future__ import annotations

import logging
import os


def quieten(bars: bool) -> None:
    """No bars (unless `bars`), no advice of the libraries' own; must run before they are first imported."""
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    for name in ("lm_eval.api.task", "lm_eval.evaluator_utils"):
        logging.getLogger(name).addFilter(_says_something)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _says_something(record: logging.LogRecord) -> bool:
    """Not lm-eval's advice on its own command, nor, for every model, that a metric counts for some items only."""
    text = record.getMessage()
    return "Custom kwargs can be passed" not in text and "not scored on the same number" not in text
