"""Keeps progress bars and developers' notices of libraries out of the user's log."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Turn off the progress bars, warnings and notices of the libraries. Their errors are still shown."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.raiseExceptions = False  # A log file that cannot be written would fill the console with tracebacks.
    for name in ("DeepSpeed", "deepspeed", "torch", "accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
