"""Preparing on several processes of one machine: each is one worker of the array, as if it were on its own machine."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import cast

from job import storage
from job.data.corpus import BadRecord
from job.data.manifest import Manifest
from job.data.shards import OnProgress, Recipe, prepare
from job.data.tokenizer import TextTokenizer
from job.errors import UserError

OnBadRecord = Callable[[BadRecord], None]


def prepare_in_processes(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    store: storage.StoreOptions,
    worker: tuple[int, int],
    processes: int,
    on_progress: OnProgress,
    on_bad_record: OnBadRecord,
) -> Manifest | None:
    """`prepare` for this worker's part, cut again into one part for each process.

    A process is started afresh, not forked: a connection to the store does not survive a fork. Should this process be
    killed, the others end with the batch at hand, since nobody takes what they report.

    Raises:
        UserError: as `prepare`; the other processes are ended.
    """
    if processes == 1:
        return prepare(recipe, tokenizer, shards_url, worker, on_progress, on_bad_record)
    index, workers = worker
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, SpawnProcess] = {}
    manifest: Manifest | None = None
    try:
        for i in range(processes):
            events, reports = context.Pipe(duplex=False)
            part = (index * processes + i, workers * processes)
            arguments = (recipe, tokenizer, shards_url, store, part, reports)
            process = context.Process(target=_prepare_part, args=arguments, daemon=True)
            process.start()
            running[events] = process
            reports.close()  # the other process holds the only one now, so that its end ends the pipe
        while running:
            for events in cast(list[Connection], wait(list(running))):
                process = running[events]
                try:
                    event = events.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(f"a process that made shards ended, exit code {process.exitcode}") from None
                match event:
                    case BadRecord():
                        on_bad_record(event)
                    case (documents, utf8_bytes):
                        on_progress(documents, utf8_bytes)
                    case UserError():
                        raise event
                    case _:
                        del running[events]
                        process.join()
                        manifest = event or manifest
    finally:
        for process in running.values():
            process.kill()
            process.join()
    return manifest


def _prepare_part(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    store: storage.StoreOptions,
    worker: tuple[int, int],
    reports: Connection,
) -> None:
    """Reports every batch and bad record, and at last what `prepare` returned, or the UserError that it raised."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # who signals all processes reaches the first one, which ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    storage.configure(store)
    outcome: Manifest | UserError | None
    with suppress(BrokenPipeError):  # the process that started this one is gone
        try:
            outcome = prepare(recipe, tokenizer, shards_url, worker, lambda *done: reports.send(done), reports.send)
        except UserError as error:
            outcome = error
        reports.send(outcome)
