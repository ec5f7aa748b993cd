"""What the `skypilot` package makes of a task and of the commands in its header; runs in that package's environment.

    read_task.py TASK < JSON list of commands, each a list of words     prints JSON, one object for each command

No account is needed: nothing is asked of a cloud. As on SkyPilot's server, fields that nobody knows are refused. A list
of one accelerator stands for the one that SkyPilot downloads; HOME takes it, and has to be a folder of the test.
"""

import asyncio
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["IS_SKYPILOT_SERVER"] = "true"  # the client lets unknown fields of job_recovery pass

import click
from sky import backends, resources, task
from sky.catalog import common as catalog
from sky.client.cli import command as cli
from sky.jobs import recovery_strategy
from sky.server import plugins
from sky.skylet import constants
from sky.utils import common_utils, dag_utils

CODES = [[0, 75], [75, 137], [137, 75], [75], [78], [70], [78, 137], [70, 137], [1], [137]]
"""Exit codes of a task's nodes; SkyPilot kills what is left when one has failed, and writes 137 for it."""


def parse(words: list[str]) -> tuple[click.Command, dict[str, Any]]:
    """The command that `words` call, and its options, as the command line reads them."""
    found: click.Command = cli.cli
    assert words[0] == "sky"
    words = words[1:]
    while isinstance(found, click.Group):
        found = found.commands[words[0]]
        words = words[1:]
    return found, found.make_context(found.name, words).params


def make_task(options: dict[str, Any]) -> task.Task:
    """The task of `sky launch` and `sky jobs launch`, made and checked as they do it."""
    make = cli._make_task_or_dag_from_entrypoint_with_overrides
    known = inspect.signature(make).parameters
    options |= {"cloud": None, "region": None, "zone": None}
    made = make(**{name: value for name, value in options.items() if name in known})
    made.validate()
    return made


def decisions(options: dict[str, Any]) -> list[bool]:
    """Whether the jobs controller starts the task again, by `CODES`; each three times, for a limit would show."""
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
    [one] = made.resources
    assert isinstance(one, resources.Resources)
    return {
        "config": made.to_yaml_config(),
        "image": one.extract_docker_image(),
        "spot": one.use_spot,
        "accelerators": one.accelerators,
        "nodes": made.num_nodes,
        "overrides": one.cluster_config_overrides,
    }


def main() -> None:
    plugins.load_plugins(plugins.ExtensionContext())
    accelerators = Path(catalog.get_catalog_path("common/accelerators.csv"))
    accelerators.parent.mkdir(parents=True)
    accelerators.write_text("AcceleratorName,Clouds\nA100,\"['AWS', 'GCP']\"\n")
    told: list[dict[str, Any]] = []
    for words in json.load(sys.stdin):
        command, options = parse(words)
        if command.name != "launch":
            told.append({})
            continue
        try:
            told.append(describe(make_task(dict(options))))
        except ValueError as error:
            told.append({"error": str(error)})
            continue
        if words[1] == "jobs":
            told[-1]["decisions"] = decisions(options)
    names = [constants.SKYPILOT_NODE_RANK, constants.SKYPILOT_NUM_NODES, constants.SKYPILOT_NODE_IPS]
    names += [constants.SKYPILOT_NUM_GPUS_PER_NODE, constants.TASK_ID_ENV_VAR]
    job = common_utils.get_global_job_id("sky-2026-11-28-10-15-20-123456", "wikillm", "17", 0, is_managed_job=True)
    print(json.dumps({"commands": told, "codes": CODES, "variables": names, "job": job}))


main()
