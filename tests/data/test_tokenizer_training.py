"""`job tokenizer`: what it prints, and that it leaves nothing behind when it fails or is stopped."""

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from corpus_files import json_lines
from preparation import SAMPLE, job

from job import commands, storage
from job import config as job_settings
from job.data.split import is_validation
from job.data.tokenizer import TextTokenizer, load_tokenizer, store_new_tokenizer, train_tokenizer
from job.data.tokenizer_training import train_in_process
from job.errors import EXIT_DONE, EXIT_STOPPED, UserError

TEXTS = [record["text"] for record in SAMPLE]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE))
    return tmp_path / "corpus.jsonl"


def train(corpus: Path, **settings: Any) -> int:
    tree = {"source": str(corpus.parent / "tokenizer"), "vocab_size": 400, **settings}
    data = {"source": str(corpus), "validation_fraction": tree.pop("validation_fraction", 0.1)}
    return commands.tokenizer(job_settings.build({"data": data, "tokenizer": tree}))


# ---- What it prints ----


def test_command_tells_the_sample_and_bytes_per_token(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(corpus, train_bytes=20_000) == EXIT_DONE
    said = capsys.readouterr().out
    split: dict[bool, list[str]] = {True: [], False: []}
    for record in SAMPLE:
        split[is_validation(record["id"], record["text"], 2333, 0.1)].append(record["text"])
    train_bytes = sum(len(text.encode()) for text in split[False])
    found = re.search(
        r"sample: (\d+) of (\d+) training documents, [\d.]+ kB of ([\d.]+) kB of text \(([\d.]+)%\)", said
    )
    assert found is not None, said
    assert 1 < int(found[1]) < int(found[2]) == len(split[False])
    assert (found[3], found[4]) == (f"{train_bytes / 1e3:.1f}", f"{2_000_000 / train_bytes:.1f}")
    tokenizer = load_tokenizer(str(corpus.parent / "tokenizer"), corpus.parent)
    tokens = sum(map(len, tokenizer.encode(split[True])))
    validation_bytes = sum(len(text.encode()) for text in split[True])
    assert f"  {validation_bytes / tokens:.3f} bytes per token on " in said


def test_corpus_without_validation_documents_is_not_measured(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(corpus, validation_fraction=0.0) == EXIT_DONE
    said = capsys.readouterr().out
    assert "88 of 88 training documents" in said and "(100.0%)" in said
    assert "there are no validation documents" in said and "bytes per token on" not in said


def test_order_and_number_of_files_give_the_same_tokenizer(corpus: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(3):
        (parts / f"{number}.jsonl").write_bytes(json_lines(SAMPLE[::-1][number::3]))
    assert train(corpus, train_bytes=30_000) == EXIT_DONE
    assert train(parts, train_bytes=30_000, source=str(tmp_path / "other")) == EXIT_DONE
    first, second = (tmp_path / name / "tokenizer.json" for name in ("tokenizer", "other"))
    assert first.read_bytes() == second.read_bytes()


def test_sample_that_needs_more_memory_gives_a_warning(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.preflight.machine.memory_bytes", lambda: 2**20)
    assert train(corpus) == EXIT_DONE
    assert re.search(
        r"warning: .* but only 0\.0 GiB are free; .* lower tokenizer\.train_bytes", capsys.readouterr().out
    )


def test_existing_tokenizer_is_announced_before_training(
    corpus: Path, trained: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    store_new_tokenizer(trained, str(corpus.parent / "tokenizer"))
    with pytest.raises(UserError, match=r"tokenizer\.source.*another tokenizer"):
        train(corpus)
    said = capsys.readouterr().out
    assert said.index("has a tokenizer already; if the new one differs, it is refused") < said.index("sample: ")


# ---- Failures ----


def test_wrong_destination_is_refused_before_reading(
    corpus: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no-such-bucket-here"):
        train(corpus, source="s3://no-such-bucket-here/tokenizer")
    assert "sample: " not in capsys.readouterr().out


def test_corpus_without_training_text_is_refused(corpus: Path) -> None:
    corpus.write_bytes(b'{"id": "1", "text": ""}\n')
    with pytest.raises(UserError, match=r"data\.source: .*its training split has no text"):
        train(corpus)
    assert not (corpus.parent / "tokenizer").exists()


def test_unreadable_end_of_the_corpus_leaves_no_tokenizer(corpus: Path) -> None:
    corpus.write_bytes(json_lines(SAMPLE) + b'{"id": "9", "te')
    with pytest.raises(UserError, match=r"data\.source: .*bad record at line 89"):
        train(corpus)
    assert not (corpus.parent / "tokenizer").exists()


def test_stop_during_training_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = ["--data.source", str(corpus), "--tokenizer.source", str(tmp_path / "tokenizer")]
    running = job("tokenizer", *words, env=os.environ | {"TMPDIR": str(temporary)}, start_new_session=True)
    assert running.stdout is not None
    while not (line := running.stdout.readline()).startswith("sample: "):
        assert line
    while not psutil.Process(running.pid).children():
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)  # As Ctrl-C does, to all processes at once.
    said, errors = running.communicate()
    assert (running.returncode, said, errors) == (EXIT_STOPPED, "stopped; no tokenizer was written\n", "")
    assert not (tmp_path / "tokenizer").exists()
    assert not list(temporary.iterdir())


def test_killed_training_process_is_one_error_about_memory(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "文章"
        (child,) = multiprocessing.active_children()
        child.kill()
        child.join()
        yield "文章" * 10**6

    with pytest.raises(UserError, match=r"tokenizer\.train_bytes: 7: training was killed, probably for lack of memory"):
        train_in_process(texts(), 300, tmp_path / "tokenizer", 7)
    assert not multiprocessing.active_children()


def test_interrupted_reading_ends_the_training_process(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "文章"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_process(texts(), 300, tmp_path / "tokenizer", 7)
    assert not multiprocessing.active_children()


def test_stop_signals_are_blocked_in_the_training_process(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes; in this one it would print a traceback."""
    blocked: list[int] = []

    def texts() -> Iterator[str]:
        (child,) = multiprocessing.active_children()
        status = Path(f"/proc/{child.pid}/status").read_text()
        blocked.extend(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:"))
        yield from TEXTS

    train_in_process(texts(), 300, tmp_path / "tokenizer", 7)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        assert blocked[0] >> (number - 1) & 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_training_process_gives_the_same_as_this_process(tmp_path: Path) -> None:
    here = train_tokenizer(TEXTS, 400, tmp_path / "here")
    assert train_in_process(["", *TEXTS], 400, tmp_path / "there", 1).fingerprint == here.fingerprint


@pytest.mark.parametrize("failing", ["tokenizer.json", "tokenizer_config.json"])
def test_failed_write_deletes_the_files_it_created(
    failing: str, trained: TextTokenizer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = storage.create_bytes

    def fail(url: str, data: bytes) -> bool:
        if url.endswith(failing):
            raise KeyboardInterrupt
        return create(url, data)

    monkeypatch.setattr(storage, "create_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        store_new_tokenizer(trained, bucket)
    assert not storage.list_files(bucket)


def test_refused_write_keeps_the_other_tokenizer(trained: TextTokenizer, bucket: str, tmp_path: Path) -> None:
    store_new_tokenizer(train_tokenizer([], 257, tmp_path), bucket)
    before = {entry.url: storage.read_bytes(entry.url) for entry in storage.list_files(bucket)}
    with pytest.raises(UserError, match=r"tokenizer\.source.*another tokenizer"):
        store_new_tokenizer(trained, bucket)
    assert {entry.url: storage.read_bytes(entry.url) for entry in storage.list_files(bucket)} == before
    assert json.loads(before[f"{bucket}/tokenizer.json"])
