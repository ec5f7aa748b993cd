"""Preparing on several processes of one machine: each is one worker of the array, as if it were on its own machine."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from time import monotonic
from typing import cast

from job import console, storage
from job.data.corpus import BadRecord, OnListed
from job.data.encoder import Disagreement, Encoder, Engine
from job.data.manifest import Manifest
from job.data.prepare import OnIdentified, OnNotice, OnProgress, Recipe, Work, carry_out, make_slices, prepare
from job.data.tokenizer import TextTokenizer
from job.errors import UserError, disk_error
from job.redaction import learn_urls

OnBadRecord = Callable[[BadRecord], None]
_SECONDS_TO_END = 10.0  # many times what a batch takes; a store that does not answer may take longer


def prepare_in_processes(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    store: storage.StoreOptions,
    worker: tuple[int, int],
    processes: int,
    on_progress: OnProgress,
    on_bad_record: OnBadRecord,
    on_notice: OnNotice = lambda line: None,
    engine: Engine = "auto",
    on_identified: OnIdentified = lambda corpus: None,
    on_listed: OnListed = lambda listing: None,
) -> Manifest | None:
    """`prepare` for this worker's part, cut again into one part for each process.

    A process is started afresh, not forked: a connection to the store does not survive a fork. Should this process be
    killed, the others end with the batch at hand, since nobody takes what they report.

    Raises:
        UserError: as `prepare`; the other processes are ended.
    """
    if processes == 1:
        told = (on_progress, on_bad_record, on_notice)
        return prepare(recipe, tokenizer, shards_url, worker, *told, engine, on_identified, on_listed)
    index, workers = worker
    parts = range(index * processes, (index + 1) * processes)
    said = set[str]()

    def say_once(line: str) -> None:
        if line not in said:
            said.add(line)
            on_notice(line)

    def make(work: Work, engine: Engine) -> None:
        numbered = [(part, workers * processes) for part in parts]
        _in_processes((work, store, engine), numbered, on_progress, on_bad_record, say_once)

    mine = (parts, workers * processes)
    return carry_out(recipe, tokenizer, shards_url, mine, engine, make, on_notice, on_identified, on_listed)


def _in_processes(
    arguments: tuple[Work, storage.StoreOptions, Engine],
    parts: Sequence[tuple[int, int]],
    on_progress: OnProgress,
    on_bad_record: OnBadRecord,
    on_notice: OnNotice,
) -> None:
    """Have each part's slices made by a process of its own. What one of them raises is raised here."""
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, SpawnProcess] = {}
    try:
        for part in parts:
            events, reports = context.Pipe(duplex=False)
            process = context.Process(target=_prepare_part, args=(*arguments, part, reports), daemon=True)
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
                    case str():
                        on_notice(event)
                    case UserError() | Disagreement() | storage.StoreError():
                        raise event
                    case _:
                        del running[events]
                        process.join()
    finally:
        _end(running)


def _end(running: dict[Connection, SpawnProcess]) -> None:
    """Ends processes with the batch at hand, whose report nobody takes; kills those that something holds up.

    A killed one may leave a temporary file beside the shard that it was writing.
    """
    for events in running:
        events.close()
    deadline = monotonic() + _SECONDS_TO_END
    for process in running.values():
        process.join(max(0, deadline - monotonic()))
        process.kill()
        process.join()


def _prepare_part(
    work: Work, store: storage.StoreOptions, engine: Engine, worker: tuple[int, int], reports: Connection
) -> None:
    """Report every batch, bad record and notice, and at last None, or what went wrong."""
    console.install()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # who signals all processes reaches the first one, which ends the others
    # The processes are the parallelism, for either tokenizer.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}
    storage.configure(store)
    learn_urls(work.recipe.source, work.shards_url)
    outcome: UserError | Disagreement | storage.StoreError | None = None
    with suppress(BrokenPipeError):  # the process that started this one is gone
        try:
            encoder, on_progress = Encoder(work.tokenizer, engine, reports.send), lambda *done: reports.send(done)
            make_slices(work, worker, encoder, on_progress, reports.send)
        except (UserError, Disagreement, storage.StoreError) as error:
            outcome = error
        except Exception as error:
            if (outcome := disk_error(error)) is None:
                raise
        reports.send(outcome)
