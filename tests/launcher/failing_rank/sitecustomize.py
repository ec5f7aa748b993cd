"""Python reads this first where a test names this folder in PYTHONPATH: rank 1 fails at its third step."""

import os

if os.environ.get("RANK") == "1":
    from job.training import schedule

    learning_rate = schedule.learning_rate

    def fail_at_the_third(step: int, **settings: float) -> float:
        if step == 2:
            raise ValueError("rank 1 has had enough")
        return learning_rate(step, **settings)

    schedule.learning_rate = fail_at_the_third
