"""Fixture that trains engines in every world (processes and strategy), launched once for all tests."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
from engine_launch import launch_engines
from engine_worker import LAST_STEP, RESUMES_FROM, SAVED_STEP, Case
from small_run import DataSet

from job.demo.server import S3Server


@pytest.fixture(scope="session")
def seen_in(
    data_set: DataSet, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], dict[str, Any]]:
    """Function that returns the measurements of each case in `engine_worker`, for processes and a strategy."""
    bucket = s3_server.create_bucket("engines")

    def output(world: tuple[int, str], case: str) -> str:
        return f"{bucket}/{world[0]}-{world[1]}-{case.replace(' ', '-')}"

    def resumed_name(case: str, world: tuple[int, str], source: tuple[int, str]) -> str:
        return f"{case} resumed" if source == world else f"{case} resumed from {source[0]} x {source[1]}"

    def resumed(world: tuple[int, str], source: tuple[int, str], precision: str) -> Case:
        name = resumed_name(precision, world, source)
        checkpoint = f"{output(source, precision)}/checkpoints/step-{SAVED_STEP:08d}-a1"
        return Case(name, precision, 1, SAVED_STEP, LAST_STEP, checkpoint, {LAST_STEP: output(world, name)})

    def momentum(world: tuple[int, str], source: tuple[int, str] | None = None) -> Case:
        """Return a case of an optimizer other than AdamW.

        Without `source`, it runs all steps and one of them is bad. With `source`, it resumes from a checkpoint of that
        world and runs the later steps.
        """
        name = "momentum" if source is None else resumed_name("momentum", world, source)
        case = Case(name, optimizer="momentum", faults={1: "loss not a number"})
        if source is None:
            return replace(case, saves=dict.fromkeys((SAVED_STEP, LAST_STEP), output(world, name)))
        checkpoint = f"{output(source, 'momentum')}/checkpoints/step-{SAVED_STEP:08d}-a1"
        saves = {LAST_STEP: output(world, name)}
        return replace(case, first_step=SAVED_STEP, resume=checkpoint, faults={}, saves=saves)

    def muon(world: tuple[int, str], precision: str, source: tuple[int, str] | None = None) -> Case:
        """Return a case of Muon that runs all steps, or that resumes from the checkpoint of the world `source`."""
        name = f"muon {precision}"
        if source is None:
            saves = dict.fromkeys((SAVED_STEP, LAST_STEP), output(world, name))
            return Case(name, precision, optimizer="muon", saves=saves)
        return replace(resumed(world, source, name), precision=precision, optimizer="muon")

    def cases(world: tuple[int, str]) -> Iterator[Case]:
        for precision in ("fp32", "bf16"):
            yield Case(precision, precision, saves=dict.fromkeys((SAVED_STEP, LAST_STEP), output(world, precision)))
            yield Case(f"{precision}, 4 accumulated", precision, accumulation_steps=4)
            yield resumed(world, world, precision)
            yield muon(world, precision)
            yield muon(world, precision, world)
        yield momentum(world)
        yield momentum(world, world)
        bad_step = {1: "loss not a number"}
        yield Case("muon with a bad step", optimizer="muon", last_step=SAVED_STEP, faults=bad_step)
        yield Case("fp32, compiled, 4 accumulated", "fp32", accumulation_steps=4, compiled=True)
        yield Case("fp32, changed to 4 accumulated", "fp32", changed_steps=4)
        if world == (2, "zero2"):
            for gradient_sum, steps in (("fp32", 1), ("fp32", 12), ("bf16", 12)):
                name = f"first gradient, {steps} summed in {gradient_sum}"
                saves = {1: output(world, name)}
                yield Case(name, "bf16", steps, last_step=1, saves=saves, gradient_sum=gradient_sum)
        for documents in ("by a mask", "without a mask"):
            yield Case(f"documents apart {documents}", "bf16", documents=documents, last_step=SAVED_STEP)
        for source in RESUMES_FROM[world]:
            yield resumed(world, source, "fp32")
            yield momentum(world, source)
            yield muon(world, "fp32", source)

    @cache
    def launch(processes: int, strategy: str) -> dict[str, Any]:
        for source in RESUMES_FROM[processes, strategy]:
            launch(*source)
        folder = tmp_path_factory.mktemp("engines")
        orders = {
            "strategy": strategy,
            "shards": data_set.shards,
            "cases": [asdict(case) for case in cases((processes, strategy))],
        }
        return launch_engines(folder, processes, orders)

    return launch
