"""Print how the `skypilot` package reads launch commands and their task; this runs in that package's environment.

    read_task.py < JSON list of commands, each a list of words     prints JSON with one object for each command

It calls no cloud, so no account is needed. As on SkyPilot's server, unknown fields are refused. A catalog with one
accelerator replaces the one that SkyPilot downloads. It is written to HOME, which must be a temporary folder.
"""

import asyncio
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["IS_SKYPILOT_SERVER"] = "true"  # The client does not refuse unknown fields of job_recovery.

import click
from sky import backends, resources, task
from sky.catalog import common as catalog
from sky.client.cli import command as cli
from sky.jobs import recovery_strategy
from sky.server import plugins
from sky.skylet import constants
from sky.utils import common_utils, dag_utils

CODES = [[0, 75], [75, 137], [137, 75], [75], [78], [70], [78, 137], [70, 137], [1], [137]]
"""Exit codes of a task's nodes. When one node fails, SkyPilot kills the others and records 137 for them."""


def parse(words: list[str]) -> tuple[click.Command, dict[str, Any]]:
    """Return the command that `words` call and its options, as SkyPilot's command line reads them."""
    command: click.Command = cli.cli
    assert words[0] == "sky"
    words = words[1:]
    while isinstance(command, click.Group):
        command = command.commands[words[0]]
        words = words[1:]
    return command, command.make_context(command.name, words).params


def make_task(options: dict[str, Any]) -> task.Task:
    """Create and validate the task as `sky launch` and `sky jobs launch` do."""
    make = cli._make_task_or_dag_from_entrypoint_with_overrides
    known = inspect.signature(make).parameters
    options |= {"cloud": None, "region": None, "zone": None}
    made = make(**{name: value for name, value in options.items() if name in known})
    made.validate()
    return made


def decisions(options: dict[str, Any]) -> list[bool]:
    """Return for each entry of CODES whether the jobs controller restarts the task.

    Each is asked three times, because a limit of restarts would change the answer.
    """
    answers = []
    for codes in CODES:
        job = dag_utils.convert_entrypoint_to_dag(make_task(dict(options)))
        dag_utils.fill_default_config_in_dag_for_job_launch(job)
        nothing = (set(), asyncio.Lock(), asyncio.Condition())
        strategy = recovery_strategy.StrategyExecutor.make(
            "cluster", backends.CloudVmRayBackend(), job.tasks[0], 1, 0, None, *nothing
        )
        [answer] = {strategy.should_restart_on_failure(codes) for _ in range(3)}
        answers.append(answer)
    return answers


def describe(made: task.Task) -> dict[str, Any]:
    [resource] = made.resources
    assert isinstance(resource, resources.Resources)
    return {
        "config": made.to_yaml_config(),
        "image": resource.extract_docker_image(),
        "spot": resource.use_spot,
        "accelerators": resource.accelerators,
        "nodes": made.num_nodes,
        "overrides": resource.cluster_config_overrides,
    }


def main() -> None:
    plugins.load_plugins(plugins.ExtensionContext())
    accelerators = Path(catalog.get_catalog_path("common/accelerators.csv"))
    accelerators.parent.mkdir(parents=True)
    accelerators.write_text("AcceleratorName,Clouds\nA100,\"['AWS', 'GCP']\"\n")
    answers_by_command: list[dict[str, Any]] = []
    for words in json.load(sys.stdin):
        command, options = parse(words)
        if command.name != "launch":
            answers_by_command.append({})
            continue
        try:
            answers_by_command.append(describe(make_task(dict(options))))
        except ValueError as error:
            answers_by_command.append({"error": str(error)})
            continue
        if words[1] == "jobs":
            answers_by_command[-1]["decisions"] = decisions(options)
    names = [constants.SKYPILOT_NODE_RANK, constants.SKYPILOT_NUM_NODES, constants.SKYPILOT_NODE_IPS]
    names += [constants.SKYPILOT_NUM_GPUS_PER_NODE, constants.TASK_ID_ENV_VAR]
    job = common_utils.get_global_job_id("sky-2026-11-28-10-15-20-123456", "wikillm", "17", 0, is_managed_job=True)
    print(json.dumps({"commands": answers_by_command, "codes": CODES, "variables": names, "job": job}))


main()
