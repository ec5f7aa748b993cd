"""Keeps what libraries tell their developers out of a user's log."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Turns off progress bars and notices of the libraries; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.raiseExceptions = False  # a log file that cannot be written would fill the console with tracebacks
    for name in ("DeepSpeed", "deepspeed", "torch", "accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
