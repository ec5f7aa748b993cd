"""Preparing on several processes of one machine: each is one worker of the array, as if it were on its own machine."""

import multiprocessing
import os
import queue
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from typing import Any

from job import storage
from job.data.corpus import BadRecord
from job.data.manifest import Manifest
from job.data.shards import Recipe, prepare
from job.data.tokenizer import TextTokenizer

OnProgress = Callable[[int, int], None]
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

    A process is started afresh, not forked: a connection to the store does not survive a fork.

    Raises:
        UserError: as `prepare`; the other processes finish the batch at hand and end.
    """
    if processes == 1:
        return prepare(recipe, tokenizer, shards_url, worker, on_progress, on_bad_record)
    index, workers = worker
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        events: Any = manager.Queue()
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(store,)) as pool:
            parts: list[Future[Manifest | None]] = [
                pool.submit(
                    _prepare_part, recipe, tokenizer, shards_url, (index * processes + i, workers * processes), events
                )
                for i in range(processes)
            ]
            pending = set(parts)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                _hand_on(events, on_progress, on_bad_record)
                for part in done:
                    part.result()
        found = [part.result() for part in parts]
    return next((manifest for manifest in found if manifest is not None), None)


def _start(store: storage.StoreOptions) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    storage.configure(store)


def _prepare_part(
    recipe: Recipe, tokenizer: TextTokenizer, shards_url: str, worker: tuple[int, int], events: Any
) -> Manifest | None:
    return prepare(
        recipe,
        tokenizer,
        shards_url,
        worker,
        lambda documents, utf8_bytes: events.put((documents, utf8_bytes)),
        events.put,
    )


def _hand_on(events: Any, on_progress: OnProgress, on_bad_record: OnBadRecord) -> None:
    while True:
        try:
            event = events.get_nowait()
        except queue.Empty:
            return
        if isinstance(event, BadRecord):
            on_bad_record(event)
        else:
            on_progress(*event)
