"""Preparation by several processes of one machine; each process works like one worker of an array."""

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from time import monotonic
from typing import cast

from job import console, storage
from job.data.corpus import BadRecord, OnListed
from job.data.encoder import Disagreement, Encoder, Engine
from job.data.make_shards import make_slices
from job.data.manifest import Manifest
from job.data.prepare import prepare, prepare_with
from job.data.recipe import OnBadRecord, OnIdentified, OnNotice, OnProgress, Preparation, Recipe
from job.data.tokenizer import TextTokenizer
from job.errors import UserError, disk_error
from job.redaction import learn_urls
from job.stop_signals import start_process, stop_signals_held

_END_SECONDS = 10.0
"""Seconds that processes get to end: many times what a batch takes, but less than a store may need to answer."""


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
    """Do `prepare` for this worker, with its share divided among `processes` processes.

    The processes are spawned, not forked, because a connection to the store does not survive a fork. If this process is
    killed, the others end after the current batch, because nothing reads their reports any more.

    Args:
        store: how the processes connect to the store.
        processes: number of processes.

    The other arguments are those of `prepare`.

    Raises:
        UserError: as `prepare`; the other processes are ended.
    """
    if processes == 1:
        callbacks = (on_progress, on_bad_record, on_notice)
        return prepare(recipe, tokenizer, shards_url, worker, *callbacks, engine, on_identified, on_listed)
    index, workers = worker
    shares, all_shares = range(index * processes, (index + 1) * processes), workers * processes
    notices = set[str]()

    def notice_once(line: str) -> None:
        if line not in notices:
            notices.add(line)
            on_notice(line)

    def make(preparation: Preparation, engine: Engine) -> None:
        numbered = [(share, all_shares) for share in shares]
        _in_processes((preparation, store, engine), numbered, on_progress, on_bad_record, notice_once)

    mine = (shares, all_shares)
    return prepare_with(make, recipe, tokenizer, shards_url, mine, engine, on_notice, on_identified, on_listed)


def _in_processes(
    arguments: tuple[Preparation, storage.StoreOptions, Engine],
    shares: Sequence[tuple[int, int]],
    on_progress: OnProgress,
    on_bad_record: OnBadRecord,
    on_notice: OnNotice,
) -> None:
    """Start a process for each share, a range of slices that it makes; raise here what one of them raises."""
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, SpawnProcess] = {}
    try:
        for share in shares:
            events, reports = context.Pipe(duplex=False)
            process = context.Process(target=_prepare_share, args=(*arguments, share, reports), daemon=True)
            with stop_signals_held():
                start_process(process)
                running[events] = process
            reports.close()  # Only the other process holds it now, so the pipe ends when that process ends.
        while running:
            for events in cast(list[Connection], wait(list(running))):
                process = running[events]
                try:
                    event = events.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(f"a process that made shards ended with exit code {process.exitcode}") from None
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
    """End the processes after their current batch, whose report fails; kill those that do not end in time.

    A killed process may leave a temporary file beside the shard that it was writing.
    """
    for events in running:
        events.close()
    deadline = monotonic() + _END_SECONDS
    for process in running.values():
        process.join(max(0, deadline - monotonic()))
        process.kill()
        process.join()


def _prepare_share(
    preparation: Preparation, store: storage.StoreOptions, engine: Engine, worker: tuple[int, int], reports: Connection
) -> None:
    """Make the slices of one share in this process; report every batch, bad record and notice, and the outcome.

    The outcome is the last report: None, or the error.
    """
    console.install()
    # The processes run in parallel already, so the tokenizers start no threads of their own.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}
    storage.configure(store)
    learn_urls(preparation.recipe.source, preparation.shards_url)
    outcome: UserError | Disagreement | storage.StoreError | None = None
    with suppress(BrokenPipeError):  # The process that started this one has ended.
        try:
            encoder = Encoder(preparation.tokenizer, engine, reports.send)
            make_slices(preparation, worker, encoder, lambda *done: reports.send(done), reports.send)
        except (UserError, Disagreement, storage.StoreError) as error:
            outcome = error
        except Exception as error:
            if (outcome := disk_error(error)) is None:
                raise
        reports.send(outcome)
