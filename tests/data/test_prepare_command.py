"""Preparation on a real S3 server: the same bytes with any workers, complete shards, and no document lost."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from corpus_files import json_array, json_lines, parquet
from preparation import SAMPLE, KiB, job, objects, parts, prepare_command, recipe, rows_of

from job import storage
from job.cli import main
from job.data.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest
from job.data.prepare import describe, prepare
from job.data.prepare_processes import prepare_in_processes
from job.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, load_tokenizer
from job.errors import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED, UserError

HARD = [
    *(
        END_OF_DOCUMENT,
        f"前{END_OF_DOCUMENT}后",
        "e\u0301\u0302",
        "\x00\x07",
        "𠀀",
        "👩\u200d👩\u200d👧",
        " ",
        "\r\n\n",
    ),
    *("\ufeff", "\U0010ffff", "same text", "same text", "长" * 5000),
]


def documents(url: str, shard: Shard, manifest: Manifest, tokenizer: TextTokenizer) -> list[str]:
    """Return the texts of a shard, split at its end-of-document tokens."""
    content = storage.read_bytes(f"{url}/{shard.name}")
    assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.size, shard.sha256)
    tokens = np.frombuffer(content, np.dtype(manifest.dtype), shard.tokens)
    ends = np.flatnonzero(tokens == manifest.eod_id) + 1
    assert ends.tolist() == np.frombuffer(content[-8 * shard.documents :], "<u8").tolist()
    assert ends[-1] == shard.tokens
    return [tokenizer.decode(one[:-1].tolist()) for one in np.split(tokens, ends[:-1])]


# ── the same bytes ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def every_format(bucket: str) -> str:
    """Return the URL of a corpus of JSON lines, gzip, a JSON array, Parquet, and small files that share slices."""
    fifths = [SAMPLE[start::5] for start in range(5)]
    files = {
        "a.jsonl": json_lines(fifths[0]),
        "b.jsonl.gz": gzip.compress(json_lines(fifths[1])),
        "c.json": json_array(fifths[2], indent=2),
        "d.parquet": parquet(fifths[3], rows_per_group=4),
        **{f"e/{number}": json_lines(fifths[4][number::6]) for number in range(6)},
    }
    for name, content in files.items():
        storage.write_bytes(f"{bucket}/corpus/{name}", content)
    return f"{bucket}/corpus/"


def test_processes_and_workers_in_any_order_write_the_same_bytes(
    every_format: str, bucket: str, tokenizer: TextTokenizer
) -> None:
    made = recipe(every_format, slice_bytes=8 * KiB)
    assert prepare(made, tokenizer, f"{bucket}/one") is not None
    expected = objects(f"{bucket}/one")
    assert len({name for name in expected if name.startswith("/parts/")}) >= 12

    options = storage.StoreOptions()
    seen: list[int] = []
    arguments = (options, (0, 1), 2, lambda documents, utf8_bytes: seen.append(documents), lambda record: None)
    assert prepare_in_processes(made, tokenizer, f"{bucket}/two", *arguments) == load_manifest(f"{bucket}/one")
    assert objects(f"{bucket}/two") == expected
    assert sum(seen) == len(SAMPLE)

    for order in random.Random(5).sample(range(5), 5), [4, 3, 2, 1, 0]:
        url = f"{bucket}/{''.join(map(str, order))}"
        for worker in order[:-1]:
            assert prepare(made, tokenizer, url, (worker, 5)) is None
            assert not storage.exists(f"{url}/{MANIFEST_NAME}")
        assert prepare(made, tokenizer, url, (order[-1], 5)) is not None
        assert objects(url) == expected


def test_two_runs_at_once_do_no_harm_and_both_print_the_table(
    sample: str, bucket: str, tokenizer: TextTokenizer
) -> None:
    prepare(recipe(sample, slice_bytes=4 * KiB), tokenizer, f"{bucket}/alone")
    runs = [job(*prepare_command(sample, f"{bucket}/both", tokenizer, slice_bytes=4 * KiB)) for _ in range(2)]
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [EXIT_DONE, EXIT_DONE], said
    assert objects(f"{bucket}/both") == objects(f"{bucket}/alone")
    characters = sum(len(one["text"]) for one in SAMPLE)
    utf8_bytes = sum(len(one["text"].encode()) for one in SAMPLE)
    tokens = sum(len(ids) for ids in tokenizer.encode([one["text"] for one in SAMPLE]))
    for table in (rows_of(out) for out, _ in said):
        assert table["documents"] == "88"
        assert table["empty, left out"] == table["bad, left out"] == "0"
        train, validation = map(int, table["train / validation"].split(" / "))
        assert (train + validation, validation > 0) == (88, True)
        assert table["UTF-8 bytes of text"] == f"{utf8_bytes:,}"
        assert table["tokens"] == f"{tokens + 88:,}"
        assert table["tokens per character"] == f"{tokens / characters:.3f}"
        assert table["bytes per token"] == f"{utf8_bytes / tokens:.3f}"
        assert table["tokens dropped"] == "0"


def test_array_worker_makes_its_part_from_the_command_line(
    sample: str, bucket: str, tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(prepare_command(sample, f"{bucket}/shards", tokenizer, worker="1/2")) == EXIT_DONE
    assert "other workers are still at work" in capsys.readouterr().out
    assert not storage.exists(f"{bucket}/shards/{MANIFEST_NAME}")
    assert main(prepare_command(sample, f"{bucket}/shards", tokenizer, worker="0/2")) == EXIT_DONE
    assert rows_of(capsys.readouterr().out)["documents"] == "88"
    assert load_manifest(f"{bucket}/shards").statistics["documents"] == 88


# ── killed, and run again ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("victim", ["the run", "one of its processes"])
def test_killed_run_continues_after_its_finished_slices(
    victim: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = f"{bucket}/corpus.jsonl", f"{bucket}/killed"
    storage.write_bytes(source, json_lines(SAMPLE[:40]))
    many = recipe(source, slice_bytes=KiB)
    run = job(*prepare_command(source, url, tokenizer, slice_bytes=KiB, processes=2))
    deadline = time.monotonic() + 240
    while len(parts(url)) < 3:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
    processes = psutil.Process(run.pid).children(recursive=True)
    workers = [one for one in processes if "spawn_main" in " ".join(one.cmdline())]
    assert len(workers) == 2
    (run if victim == "the run" else workers[0]).kill()
    run.communicate(timeout=240)
    assert run.returncode not in (EXIT_DONE, EXIT_REFUSED)
    ended(processes)

    before, finished = objects(url), parts(url)
    assert f"/{MANIFEST_NAME}" not in before
    whole = prepare(many, tokenizer, f"{bucket}/whole")
    assert 3 <= len(finished) < len(parts(f"{bucket}/whole"))

    written: list[str] = []
    for function in ("write_bytes", "create_bytes"):
        monkeypatch.setattr(storage, function, recorded(getattr(storage, function), written))
    assert prepare(many, tokenizer, url) == whole
    assert objects(url) == objects(f"{bucket}/whole")
    slices = [name.rpartition("/")[2][:11] for name in written if "/parts/" in name or ".bin" in name]
    assert set(slices).isdisjoint({one.removesuffix("-last") for one in finished})
    assert len(slices) > 0
    assert written[-1] == f"{url}/{MANIFEST_NAME}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_all_processes_ends_the_run_with_exit_code_75(
    number: signal.Signals, bucket: str, tokenizer: TextTokenizer
) -> None:
    source, url = f"{bucket}/corpus.jsonl", f"{bucket}/stopped"
    storage.write_bytes(source, json_lines(SAMPLE * 80))  # Far more slices than can be made before the signal comes.
    words = prepare_command(source, url, tokenizer, slice_bytes=KiB, processes=2)
    run = job(*words, start_new_session=True, env=os.environ | {"PYTHONFAULTHANDLER": "1"})
    deadline = time.monotonic() + 120
    while len(parts(url)) < 3:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
    processes = psutil.Process(run.pid).children(recursive=True)
    os.killpg(run.pid, number)  # A terminal and a Slurm step do the same.
    try:
        out, err = run.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGABRT)  # Each process prints where it stands.
        out, err = run.communicate()
    assert (run.returncode, err) == (EXIT_STOPPED, ""), f"{out}\n{err}"
    assert [line for line in out.splitlines() if not line.startswith("corpus")] == [
        "stopped; run `prepare` again to continue with the slices that are not done"
    ]
    ended(processes)
    assert not storage.exists(f"{url}/{MANIFEST_NAME}")


def ended(processes: Sequence[psutil.Process]) -> None:
    """Wait until none of the processes runs; a zombie counts as ended."""
    deadline = time.monotonic() + 30
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.01)


def recorded(function: Callable[..., Any], urls: list[str]) -> Callable[..., Any]:
    def record(url: str, data: bytes) -> Any:
        urls.append(url)
        return function(url, data)

    return record


def test_shards_are_written_before_their_record_and_the_manifest(
    sample: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run that is stopped in between never has a record or a manifest without its shards."""
    written: list[str] = []
    for function in ("write_bytes", "create_bytes"):
        monkeypatch.setattr(storage, function, recorded(getattr(storage, function), written))
    manifest = prepare(recipe(sample), tokenizer, f"{bucket}/shards")
    assert manifest is not None
    for shard in manifest.train + manifest.validation:
        slice_name, _, label = shard.name.rpartition("/")[2].removesuffix(".bin").rpartition("-")
        (part,) = (i for i, url in enumerate(written) if f"/parts/{label}/{slice_name}" in url)
        assert written.index(f"{bucket}/shards/{shard.name}") < part
    assert written[-1] == f"{bucket}/shards/{MANIFEST_NAME}"


def test_finished_data_set_is_not_changed(sample: str, bucket: str, tokenizer: TextTokenizer) -> None:
    manifest = prepare(recipe(sample), tokenizer, f"{bucket}/shards")
    assert manifest is not None
    storage.delete_tree(f"{bucket}/shards/parts")  # A finished data set does not need them.
    before = objects(f"{bucket}/shards")
    assert prepare(recipe(sample), tokenizer, f"{bucket}/shards") == manifest
    assert objects(f"{bucket}/shards") == before


# ── nothing left out ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hard(bucket: str) -> tuple[str, list[str]]:
    """Return the URL of a corpus of hard, empty and repeated texts without ids, and the texts."""
    texts = ["", *HARD, "", *(one["text"] for one in SAMPLE[:30])]
    storage.write_bytes(f"{bucket}/corpus/hard.jsonl", json_lines([{"text": text} for text in texts]))
    return f"{bucket}/corpus/hard.jsonl", texts


def test_every_document_is_in_the_shards_and_counted_correctly(
    hard: tuple[str, list[str]], bucket: str, tokenizer: TextTokenizer
) -> None:
    source, texts = hard
    url = f"{bucket}/shards"
    manifest = prepare(recipe(source, slice_bytes=2 * KiB, validation_fraction=0.3), tokenizer, url)
    assert manifest is not None
    assert manifest.train and manifest.validation
    found: Counter[str] = Counter()
    for shard in manifest.train + manifest.validation:
        inside = documents(url, shard, manifest, tokenizer)
        assert len(inside) == shard.documents
        assert sum(len(text.encode()) for text in inside) == shard.utf8_bytes
        assert sum(len(text) for text in inside) == shard.characters
        assert sum(len(ids) + 1 for ids in tokenizer.encode(inside)) == shard.tokens
        found.update(inside)
    assert found == Counter(text for text in texts if text)
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode([text for text in texts if text]))
    expected = {"documents": len(texts), "empty": 2, "bad": 0, "normalized": 0, "encoded_tokens": tokens}
    assert manifest.statistics == expected
    rows = dict(describe(manifest))
    assert (rows["documents"], rows["  empty, left out"], rows["tokens dropped"]) == (str(len(texts)), "2", "0")
    listed = {shard.name for shard in manifest.train + manifest.validation}
    assert {name.removeprefix("/") for name in objects(url) if name.endswith(".bin")} == listed


def test_tokenizer_is_stored_beside_the_shards(
    sample: str, bucket: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    manifest = prepare(recipe(sample), tokenizer, f"{bucket}/shards")
    assert manifest is not None
    beside = load_tokenizer(f"{bucket}/shards/{manifest.tokenizer}", tmp_path)
    assert (beside.fingerprint, beside.eod_id) == (manifest.tokenizer_fingerprint, manifest.eod_id)
    assert beside.vocab_size == manifest.vocab_size


def test_fingerprint_of_a_data_set_depends_on_its_content(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Another text in a file of the same name and size gives another fingerprint; the same text gives the same."""
    fingerprints = []
    for number, texts in enumerate((["一", "二"], ["一", "三"], ["一", "二"])):
        (tmp_path / "corpus.jsonl").write_bytes(json_lines([{"text": text} for text in texts]))
        made = recipe(f"{tmp_path}/corpus.jsonl", validation_fraction=0)
        manifest = prepare(made, tokenizer, f"{tmp_path}/{number}")
        assert manifest is not None
        fingerprints.append(manifest.fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


@pytest.mark.parametrize(("entries", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_take_two_bytes_if_the_vocabulary_allows(
    entries: int, dtype: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    for path in tokenizer.files():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    model = described["model"]
    model["vocab"] |= {f"never {index}": index for index in range(len(model["vocab"]), entries - 1)}
    model["vocab"]["a"] = entries - 1
    model["merges"] = [pair for pair in model["merges"] if "a" not in "".join(pair)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    large = load_tokenizer(str(tmp_path), tmp_path)
    (tmp_path / "corpus.jsonl").write_bytes(json_lines([{"text": "aaa"}]))
    manifest = prepare(recipe(f"{tmp_path}/corpus.jsonl", validation_fraction=0), large, f"{tmp_path}/shards")
    assert manifest is not None
    assert (manifest.vocab_size, manifest.dtype) == (entries, dtype)
    tokens = np.fromfile(tmp_path / "shards" / manifest.train[0].name, dtype, manifest.train[0].tokens)
    assert tokens.tolist() == [entries - 1] * 3 + [large.eod_id]


def test_validation_fraction_of_0_gives_only_training_documents(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE))
    made = recipe(f"{tmp_path}/corpus.jsonl", validation_fraction=0)
    manifest = prepare(made, tokenizer, f"{tmp_path}/shards")
    assert manifest is not None
    assert manifest.validation == ()
    assert sum(shard.documents for shard in manifest.train) == len(SAMPLE)


@pytest.mark.parametrize("content", [b"", b"[]", json_lines([{"text": ""}, {"text": ""}])])
def test_corpus_with_nothing_to_train_on_is_refused(content: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.source.*no text to train on"):
        prepare(recipe(f"{tmp_path}/corpus.json"), tokenizer, f"{tmp_path}/shards")
    assert not (tmp_path / "shards" / MANIFEST_NAME).exists()
