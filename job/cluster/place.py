"""Where this process is, from the environment alone: by itself, or one of those that torchrun started."""

import os
from collections.abc import Mapping

from job.errors import UserError
from job.training.world import World

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
_JOB_IDS = ("WIKILLM_JOB_ID", "SLURM_JOB_ID")


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World | None:
    """This process' place as torchrun tells it; None where no launcher has set one.

    Half of it is never taken for none of it: a job that should be many would train many times alone.

    Raises:
        UserError: a variable is missing, is not a number, or contradicts another; it is named.
    """
    if not any(name in environment for name in ("RANK", "WORLD_SIZE")):
        return None
    remedy = "start it with torchrun, which sets all of them, or unset them all to start it alone"
    for name in (*_VARIABLES, *_RENDEZVOUS):
        if not environment.get(name):
            raise UserError(name, None, "is not set, but other variables of a launcher are", remedy)
    numbers: dict[str, int] = {}
    for name in (*_VARIABLES, "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise UserError(name, environment[name], "expected a whole number", remedy)
        numbers[name] = int(environment[name])
    for name, below in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[name] >= numbers[below]:
            raise UserError(name, numbers[name], f"expected less than {below}, which is {numbers[below]}", remedy)
    if numbers["LOCAL_WORLD_SIZE"] > numbers["WORLD_SIZE"]:
        expected = f"expected at most WORLD_SIZE, which is {numbers['WORLD_SIZE']}"
        raise UserError("LOCAL_WORLD_SIZE", numbers["LOCAL_WORLD_SIZE"], expected, remedy)
    return World(*(numbers[name] for name in _VARIABLES))


def job_id_from_environment(environment: Mapping[str, str] = os.environ) -> str | None:
    """The name of the job that its scheduler keeps when it starts the job again; None without a scheduler.

    Slurm sets one; elsewhere WIKILLM_JOB_ID can.
    """
    return next((environment[name] for name in _JOB_IDS if environment.get(name)), None)
