"""Train a tokenizer in a process of its own, which can be stopped at any time and may run out of memory alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from job import console
from job.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from job.errors import UserError, disk_error
from job.stop_signals import start_process, stop_signals_held

BYTES_PER_BYTE = 60
"""Memory that training takes, per byte of text: 59 bytes at 50 MiB, 51 at 200 MiB (benchmarks/README.md).

The trainer keeps 32 bytes for each byte of each different piece of text, and where each pair of bytes occurs. Most
pieces of Chinese text, which lie between two punctuation marks, occur once."""


def train_in_process(texts: Iterable[str], vocab_size: int, folder: Path, train_bytes: int) -> TextTokenizer:
    """Do `train_tokenizer` in another process; if this process is interrupted, the other one is killed.

    In the same process, a request to stop would wait for the end of the training, which takes minutes.

    Args:
        texts: the texts, in any order.
        vocab_size: the largest number of tokens.
        folder: local folder for the tokenizer's files.
        train_bytes: the setting `tokenizer.train_bytes`, for the error message.

    Raises:
        UserError: there is no room for the files in `folder`, or the process was killed, probably for its memory.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_train, args=(theirs, vocab_size, folder), daemon=True)
    try:
        with stop_signals_held():  # Ctrl-C reaches both processes, but this one ends the other.
            start_process(process)
        theirs.close()  # Only the other process holds it now, so reading from `ours` ends when that process ends.
        with suppress(BrokenPipeError, ConnectionResetError):
            for text in filter(None, texts):
                ours.send_bytes(text.encode())
            ours.send_bytes(b"")  # The end: no text that is sent is empty.
        outcome: UserError | None = ours.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise _death_of(process.exitcode, train_bytes) from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        ours.close()
    if outcome is not None:
        raise outcome
    return load_tokenizer(str(folder), folder)


def _death_of(exit_code: int | None, train_bytes: int) -> Exception:
    if exit_code != -signal.SIGKILL:
        return RuntimeError(f"the process that trained the tokenizer ended with exit code {exit_code}")
    expected = (
        f"training was killed, probably for lack of memory: it takes about {BYTES_PER_BYTE} bytes per byte of text"
    )
    return UserError("tokenizer.train_bytes", train_bytes, expected, "lower it, or use a machine with more memory")


def _train(parent: Connection, vocab_size: int, folder: Path) -> None:
    """Train on the texts that arrive, in this process; send None or the error at the end."""
    console.install()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # More threads make this trainer slower, and each adds memory: see benchmarks/README.md.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    outcome: UserError | None = None
    try:
        train_tokenizer(_received(parent), vocab_size, folder)
    except Exception as error:
        if (outcome := disk_error(error)) is None:
            raise
    parent.send(outcome)


def _received(parent: Connection) -> Iterator[str]:
    while content := parent.recv_bytes():
        yield content.decode()


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, also if that one was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
