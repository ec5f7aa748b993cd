"""Make rank 1 fail at its third step. Python imports this file at start if PYTHONPATH contains this folder."""

import os

if os.environ.get("RANK") == "1":
    from job.training import schedule

    learning_rate = schedule.learning_rate

    def fail_at_third_step(step: int, **settings: float) -> float:
        if step == 2:
            raise ValueError("rank 1 has had enough")
        return learning_rate(step, **settings)

    schedule.learning_rate = fail_at_third_step
