"""Makes a command crash with a URL and a token in the message. Python imports this if the folder is in PYTHONPATH."""

import os
from typing import Any


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError(f"cannot read {os.environ['LEAKED_URL']} with the token {os.environ['HF_TOKEN']}")


if "RANK" in os.environ:
    from job.training import schedule

    schedule.learning_rate = fail
elif os.environ.get("LEAKS_IN") == "prepare":
    from job.data import prepare

    prepare.identify = fail  # type: ignore[assignment]
