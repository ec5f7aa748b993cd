"""Python reads this first where a test names this folder in PYTHONPATH: what fails says a URL and a token."""

import os
from typing import Any


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError(f"cannot read {os.environ['LEAKED_URL']} with the token {os.environ['HF_TOKEN']}")


if "RANK" in os.environ:
    from job.training import schedule

    schedule.learning_rate = fail
elif os.environ.get("LEAKS_IN") == "prepare":
    from job.data import prepare as shards

    shards.identify = fail  # type: ignore[assignment]
