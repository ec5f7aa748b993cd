"""Shards on a real S3 server: the same bytes whoever makes them, whole or not there, and nothing left out."""

import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from corpus_files import json_array, json_lines, parquet

from job import storage
from job.cli import main
from job.data.corpus import BadRecord
from job.data.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest
from job.data.prepare import Recipe, describe, prepare
from job.data.prepare_processes import prepare_in_processes
from job.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, load_tokenizer, store_tokenizer, train_tokenizer
from job.errors import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED, UserError

REPOSITORY = Path(__file__).parents[2]
SAMPLE = [json.loads(line) for line in (REPOSITORY / "job/demo/sample.jsonl").read_text(encoding="utf-8").splitlines()]
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
KiB = 1024


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer([one["text"] for one in SAMPLE], 600, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def sample(bucket: str) -> str:
    """URL of the sample, all of it, in the bucket."""
    storage.write_bytes(f"{bucket}/corpus/sample.jsonl", json_lines(SAMPLE))
    return f"{bucket}/corpus/sample.jsonl"


def recipe(source: str, **changes: Any) -> Recipe:
    return replace(Recipe(source, "text", "id", "stop", 16 * KiB, 0.1, 2333), **changes)


def objects(url: str) -> dict[str, str]:
    """Name and sha256 of everything below `url`."""

    def digest(entry: storage.Entry) -> tuple[str, str]:
        return entry.url.removeprefix(url), hashlib.sha256(storage.read_bytes(entry.url)).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(digest, storage.list_files(url)))


def parts(url: str) -> set[str]:
    """Names of the finished slices."""
    return {entry.url.rpartition("/")[2].removesuffix(".json") for entry in storage.list_files(f"{url}/parts")}


def documents(url: str, shard: Shard, manifest: Manifest, tokenizer: TextTokenizer) -> list[str]:
    """Texts of a shard, cut where its end-of-document tokens are."""
    content = storage.read_bytes(f"{url}/{shard.name}")
    assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.size, shard.sha256)
    tokens = np.frombuffer(content, np.dtype(manifest.dtype), shard.tokens)
    ends = np.flatnonzero(tokens == manifest.eod_id) + 1
    assert ends.tolist() == np.frombuffer(content[-8 * shard.documents :], "<u8").tolist()
    assert ends[-1] == shard.tokens
    return [tokenizer.decode(one[:-1].tolist()) for one in np.split(tokens, ends[:-1])]


def job(*words: str, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "job", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, **pipes, **options)


def prepare_command(source: str, url: str, tokenizer: TextTokenizer, **settings: object) -> list[str]:
    settings = {"source": source, "shards": url, "slice_bytes": 16 * KiB, **settings}
    words = [word for name, value in settings.items() for word in (f"--data.{name}", str(value))]
    return ["prepare", "--tokenizer.source", str(tokenizer.folder), *words]


def rows_of(table: str) -> dict[str, str]:
    return {name.strip(): value.strip() for name, value in re.findall(r"│([^│]+)│([^│]+)│", table)}


# ── the same bytes ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def every_format(bucket: str) -> str:
    """URL of a corpus of JSON lines, the same compressed, a JSON array, Parquet, and small files that share slices."""
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


def test_one_process_two_processes_and_five_workers_in_any_order_write_the_same_bytes(
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


def test_two_runs_at_once_do_no_harm_and_both_end_with_the_table(
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


def test_a_worker_of_an_array_does_its_part_from_the_command_line(
    sample: str, bucket: str, tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(prepare_command(sample, f"{bucket}/shards", tokenizer, worker="1/2")) == EXIT_DONE
    assert "others are still to come" in capsys.readouterr().out
    assert not storage.exists(f"{bucket}/shards/{MANIFEST_NAME}")
    assert main(prepare_command(sample, f"{bucket}/shards", tokenizer, worker="0/2")) == EXIT_DONE
    assert rows_of(capsys.readouterr().out)["documents"] == "88"
    assert load_manifest(f"{bucket}/shards").statistics["documents"] == 88


# ── killed, and run again ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("victim", ["the run", "one of its processes"])
def test_a_killed_run_leaves_no_data_set_and_is_finished_without_doing_a_finished_slice_again(
    victim: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = f"{bucket}/corpus.jsonl", f"{bucket}/killed"
    storage.write_bytes(source, json_lines(SAMPLE[:40]))
    many = recipe(source, slice_bytes=KiB)
    run = job(*prepare_command(source, url, tokenizer, slice_bytes=KiB, processes=2))
    deadline = time.monotonic() + 60
    while len(parts(url)) < 3:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
    processes = psutil.Process(run.pid).children(recursive=True)
    workers = [one for one in processes if "spawn_main" in " ".join(one.cmdline())]
    assert len(workers) == 2
    (run if victim == "the run" else workers[0]).kill()
    run.communicate(timeout=60)
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
def test_a_signal_to_all_its_processes_ends_it_with_the_code_that_starts_it_again(
    number: signal.Signals, bucket: str, tokenizer: TextTokenizer
) -> None:
    source, url = f"{bucket}/corpus.jsonl", f"{bucket}/stopped"
    storage.write_bytes(source, json_lines(SAMPLE * 80))  # far more slices than are made before the signal comes
    words = prepare_command(source, url, tokenizer, slice_bytes=KiB, processes=2)
    run = job(*words, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(parts(url)) < 3:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
    processes = psutil.Process(run.pid).children(recursive=True)
    os.killpg(run.pid, number)  # as a terminal and a Slurm step do
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (EXIT_STOPPED, "")
    assert [line for line in out.splitlines() if not line.startswith("corpus")] == [
        "stopped; started again, it goes on after the slices that are done"
    ]
    ended(processes)
    assert not storage.exists(f"{url}/{MANIFEST_NAME}")


def ended(processes: Sequence[psutil.Process]) -> None:
    """Waits until no process runs (one that nobody has reaped yet does not)."""
    deadline = time.monotonic() + 30
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.01)


def recorded(function: Callable[..., Any], urls: list[str]) -> Callable[..., Any]:
    def record(url: str, data: bytes) -> Any:
        urls.append(url)
        return function(url, data)

    return record


def test_what_is_recorded_as_finished_is_there(
    sample: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, then their record, then the manifest: whoever stops in between leaves no promise unkept."""
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


def test_a_finished_data_set_is_not_touched_again(sample: str, bucket: str, tokenizer: TextTokenizer) -> None:
    manifest = prepare(recipe(sample), tokenizer, f"{bucket}/shards")
    assert manifest is not None
    storage.delete_tree(f"{bucket}/shards/parts")  # they have done their work
    before = objects(f"{bucket}/shards")
    assert prepare(recipe(sample), tokenizer, f"{bucket}/shards") == manifest
    assert objects(f"{bucket}/shards") == before


# ── nothing left out ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hard(bucket: str) -> tuple[str, list[str]]:
    """A corpus with what is hard about text, and its texts: also empty ones, the same twice, and none with an id."""
    texts = ["", *HARD, "", *(one["text"] for one in SAMPLE[:30])]
    storage.write_bytes(f"{bucket}/corpus/hard.jsonl", json_lines([{"text": text} for text in texts]))
    return f"{bucket}/corpus/hard.jsonl", texts


def test_every_document_is_in_the_shards_as_often_as_in_the_corpus_and_the_manifest_counts_right(
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


def test_the_tokenizer_lies_beside_the_shards(
    sample: str, bucket: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    manifest = prepare(recipe(sample), tokenizer, f"{bucket}/shards")
    assert manifest is not None
    beside = load_tokenizer(f"{bucket}/shards/{manifest.tokenizer}", tmp_path)
    assert (beside.fingerprint, beside.eod_id) == (manifest.tokenizer_fingerprint, manifest.eod_id)
    assert beside.vocab_size == manifest.vocab_size


def test_a_data_set_is_known_by_its_content(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Another text in a file of the same name and size makes another data set, the same again the same."""
    fingerprints = []
    for number, texts in enumerate((["一", "二"], ["一", "三"], ["一", "二"])):
        (tmp_path / "corpus.jsonl").write_bytes(json_lines([{"text": text} for text in texts]))
        made = recipe(f"{tmp_path}/corpus.jsonl", validation_fraction=0)
        manifest = prepare(made, tokenizer, f"{tmp_path}/{number}")
        assert manifest is not None
        fingerprints.append(manifest.fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


@pytest.mark.parametrize(("entries", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_take_two_bytes_as_long_as_the_vocabulary_allows(
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


def test_without_a_validation_fraction_everything_is_trained_on(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE))
    made = recipe(f"{tmp_path}/corpus.jsonl", validation_fraction=0)
    manifest = prepare(made, tokenizer, f"{tmp_path}/shards")
    assert manifest is not None
    assert manifest.validation == ()
    assert sum(shard.documents for shard in manifest.train) == len(SAMPLE)


@pytest.mark.parametrize("content", [b"", b"[]", json_lines([{"text": ""}, {"text": ""}])])
def test_a_corpus_with_nothing_to_train_on_is_refused(content: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.source.*no text to train on"):
        prepare(recipe(f"{tmp_path}/corpus.json"), tokenizer, f"{tmp_path}/shards")
    assert not (tmp_path / "shards" / MANIFEST_NAME).exists()


# ── what a person has to mend ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def broken(bucket: str) -> str:
    """URL of a corpus of ten good records, the fourth of which is cut short, and the ninth has no text."""
    lines = json_lines(SAMPLE[:10]).splitlines(keepends=True)
    lines[3] = lines[3][:40] + b"\n"
    lines[8] = b'{"id": 9}\n'
    storage.write_bytes(f"{bucket}/corpus/broken.jsonl", b"".join(lines))
    return f"{bucket}/corpus/broken.jsonl"


def test_a_bad_record_stops_the_run_with_its_place_and_can_be_left_out_and_counted_then(
    broken: str, bucket: str, tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{bucket}/shards"
    assert main(prepare_command(broken, url, tokenizer, slice_bytes=2 * KiB)) == EXIT_REFUSED
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    place = f"byte {len(json_lines(SAMPLE[:3])):,}"
    assert line.startswith(f"data.source: '{broken}': bad record at {place}: broken JSON")
    assert "set data.on_bad_record to skip" in line
    assert "tokens dropped" not in said.out
    assert len(parts(url)) > 0
    assert not storage.exists(f"{url}/{MANIFEST_NAME}")

    bad: list[BadRecord] = []
    skipping = recipe(broken, slice_bytes=2 * KiB, on_bad_record="skip")
    manifest = prepare(skipping, tokenizer, url, on_bad_record=bad.append)
    assert manifest is not None
    assert [one.url for one in bad] == [broken, broken]
    assert (bad[0].position, bad[1].reason) == (place, "no 'text', only 'id'")
    assert manifest.statistics["bad"] == 2
    assert manifest.statistics["documents"] == 8 == sum(one.documents for one in manifest.train + manifest.validation)
    assert dict(describe(manifest))["  bad, left out"] == "2"


def test_an_error_in_one_process_ends_the_others(bucket: str, tokenizer: TextTokenizer) -> None:
    storage.write_bytes(f"{bucket}/corpus.jsonl", b"{\n" + json_lines(SAMPLE * 8))
    shown: list[BadRecord] = []
    made = recipe(f"{bucket}/corpus.jsonl", slice_bytes=KiB)
    arguments = (storage.StoreOptions(), (0, 1), 2, lambda documents, utf8_bytes: None, shown.append)
    with pytest.raises(UserError, match=r"data\.source.*corpus\.jsonl.*bad record at line 1, byte 0.*on_bad_record"):
        prepare_in_processes(made, tokenizer, f"{bucket}/shards", *arguments)
    at_the_end = parts(f"{bucket}/shards")
    assert len(at_the_end) < 500  # of the 1,200 slices the other process had half
    assert not [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("data.seed", {"seed": 1}),
        ("data.validation_fraction", {"validation_fraction": 0.2}),
        ("data.slice_bytes", {"slice_bytes": 64 * KiB}),
        ("data.text_field", {"text_field": "title"}),
        ("data.id_field", {"id_field": "title"}),
        ("data.source", {}),
        ("tokenizer.source", {}),
    ],
)
def test_another_recipe_in_the_same_place_is_refused_by_the_setting_that_differs(
    setting: str, changes: dict[str, Any], half_done: tuple[str, str], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    source, url = half_done
    before = objects(url)
    if setting == "data.source":
        source = f"{source}.jsonl"
        storage.write_bytes(source, json_lines(SAMPLE))
    if setting == "tokenizer.source":
        tokenizer = train_tokenizer([], 257, tmp_path)
    with pytest.raises(UserError, match=f"data\\.shards.*holds a data set in the making that differs: {setting} "):
        prepare(recipe(source, **changes), tokenizer, url)
    assert objects(url) == before


@pytest.fixture(scope="module")
def half_done(s3_server: Any, tokenizer: TextTokenizer) -> Iterator[tuple[str, str]]:
    """URLs of a corpus, and of its data set that one of two workers has made its part of."""
    bucket = s3_server.create_bucket("half-done")
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines(SAMPLE))
    prepare(recipe(f"{bucket}/corpus.jsonl"), tokenizer, f"{bucket}/shards", (0, 2))
    yield f"{bucket}/corpus.jsonl", f"{bucket}/shards"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 2, "source": 1}'])
def test_damaged_plan_is_refused_in_one_line(content: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:3]))
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.shards.*its plan\.json is damaged.*delete that folder"):
        prepare(recipe(f"{tmp_path}/corpus.jsonl"), tokenizer, str(tmp_path))
    assert (tmp_path / "plan.json").read_bytes() == content


def test_plan_of_another_version_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:3]))
    (tmp_path / "plan.json").write_bytes(b'{"version": 99}')
    with pytest.raises(UserError, match=r"data\.shards.*plan\.json has version 99, this program reads 3"):
        prepare(recipe(f"{tmp_path}/corpus.jsonl"), tokenizer, str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b'{"file": 0}', b"another slice"])
def test_damaged_part_record_is_refused_by_name(content: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:9]))
    made = recipe(f"{tmp_path}/corpus.jsonl", slice_bytes=4 * KiB)
    assert prepare(made, tokenizer, f"{tmp_path}/shards", (0, 2)) is None
    first, *_, other = sorted((tmp_path / "shards" / "parts").glob("*/*.json"))
    first.write_bytes(other.read_bytes() if content == b"another slice" else content)
    with pytest.raises(UserError, match=rf"data\.shards: '{first}': this part record is (damaged|of another)"):
        prepare(made, tokenizer, f"{tmp_path}/shards", (1, 2))
    first.unlink()
    assert prepare(made, tokenizer, f"{tmp_path}/shards") is not None


def test_tokenizer_left_by_a_failed_prepare_is_replaced(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:3]))
    store_tokenizer(train_tokenizer([], 257, tmp_path / "other"), f"{tmp_path}/shards/tokenizer")
    (tmp_path / "shards" / "tokenizer" / "added_tokens.json").write_text("{}")
    prepare(recipe(f"{tmp_path}/corpus.jsonl"), tokenizer, f"{tmp_path}/shards")
    left = {path.name: path.read_bytes() for path in (tmp_path / "shards" / "tokenizer").iterdir()}
    assert left == {path.name: path.read_bytes() for path in tokenizer.files()}
