"""plan.json keeps two recipes from being mixed in one place, and does not stop a corrected command."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from corpus_files import json_lines
from test_prepare_command import REPOSITORY, SAMPLE, KiB
from test_prepare_command import recipe as recipe_of

from job import storage
from job.data import prepare as shards
from job.data.corpus import CorpusFile, Listing, list_corpus
from job.data.fingerprint import BLOCK_BYTES, BLOCKS, blocks, identify
from job.data.manifest import MANIFEST_NAME, load_manifest
from job.data.prepare import prepare
from job.data.tokenizer import TextTokenizer, train_tokenizer
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError

recipe = partial(recipe_of, slice_bytes=4 * KiB)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer([one["text"] for one in SAMPLE], 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def corpus(bucket: str) -> str:
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines(SAMPLE[:20]))
    return f"{bucket}/corpus.jsonl"


def check_whole(url: str) -> None:
    """Every shard of the data set is what its manifest says, and no shard of it is of another plan."""
    manifest = load_manifest(url)
    plan = storage.read_bytes(f"{url}/plan.json")
    assert manifest.plan == hashlib.sha256(plan).hexdigest()
    for shard in manifest.train + manifest.validation:
        assert hashlib.sha256(storage.read_bytes(f"{url}/{shard.name}")).hexdigest() == shard.sha256
    for entry in storage.list_files(f"{url}/parts"):
        assert json.loads(storage.read_bytes(entry.url))["plan"] == manifest.plan


# ---- Two recipes ----


def while_it_makes_its_first_slice(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have `act` called once, when the next `prepare` has chosen its slices and none is finished."""
    make = shards._prepare_group
    is_first = [True]

    def interrupted(*arguments: Any) -> None:
        if is_first:
            is_first.clear()
            act()
        make(*arguments)

    monkeypatch.setattr(shards, "_prepare_group", interrupted)


def test_second_command_is_refused_while_the_first_is_at_work(
    corpus: str, bucket: str, tokenizer: TextTokenizer
) -> None:
    """Two real commands; the first one stands still from the moment it has created the plan."""
    words = ("--data.source", corpus, "--data.shards", f"{bucket}/shards", "--tokenizer.source", str(tokenizer.folder))
    command = [sys.executable, "-m", "job", "prepare", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command, "--data.slice_bytes", "2KiB"], cwd=REPOSITORY, **pipes)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 120
        while not storage.exists(f"{bucket}/shards/plan.json"):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run([*command, "--data.seed", "1"], cwd=REPOSITORY, capture_output=True, text=True)
        first.send_signal(signal.SIGCONT)
        said = first.communicate(timeout=120)
    finally:
        first.kill()
    assert second.returncode == EXIT_REFUSED
    (line,) = second.stderr.splitlines()
    assert "data.slice_bytes is 2048 there and 67108864 here; data.seed is 2333 there and 1 here" in line
    assert first.returncode == EXIT_DONE, said
    check_whole(f"{bucket}/shards")


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("data.seed is 2333 there and 1 here", {"seed": 1}),
        ("data.validation_fraction is 0.1 there and 0.3 here", {"validation_fraction": 0.3}),
        ("data.text_field is 'text' there and 'title' here", {"text_field": "title"}),
        ("tokenizer.source is '", {}),
    ],
)
def test_second_recipe_is_refused_while_the_first_makes_its_first_slice(
    setting: str,
    changes: dict[str, Any],
    corpus: str,
    bucket: str,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = train_tokenizer([], 257, tmp_path) if setting.startswith("tokenizer") else tokenizer
    refused: list[str] = []

    def start_another() -> None:
        with pytest.raises(UserError) as error:
            prepare(recipe(corpus, **changes), other, f"{bucket}/shards")
        refused.append(str(error.value))

    while_it_makes_its_first_slice(monkeypatch, start_another)
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None
    assert setting in refused[0] and "data.shards" in refused[0]
    check_whole(f"{bucket}/shards")
    assert load_manifest(f"{bucket}/shards").seed == 2333


def test_worker_whose_plan_was_replaced_stops_and_mixes_nothing(
    corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody deletes the folder and prepares it anew with other settings while an old worker is still at work."""
    url = f"{bucket}/shards"

    def replace_data_set() -> None:
        storage.delete_tree(url)
        assert prepare(recipe(corpus, seed=1), tokenizer, url) is not None

    while_it_makes_its_first_slice(monkeypatch, replace_data_set)
    with pytest.raises(UserError, match=r"holds a data set in the making that differs: data\.seed is 1 there"):
        prepare(recipe(corpus), tokenizer, url)
    check_whole(url)
    assert load_manifest(url).seed == 1


def test_two_plans_never_write_one_file(corpus: str, bucket: str, tokenizer: TextTokenizer) -> None:
    written = []
    for seed in (1, 2):
        assert prepare(recipe(corpus, seed=seed), tokenizer, f"{bucket}/{seed}") is not None
        names = {entry.url.removeprefix(f"{bucket}/{seed}/") for entry in storage.list_files(f"{bucket}/{seed}")}
        written.append({name for name in names if name.startswith(("parts", "train", "validation"))})
    assert len(written[0]) > 10 and written[0].isdisjoint(written[1])


def test_finished_data_set_of_another_recipe_is_refused(corpus: str, bucket: str, tokenizer: TextTokenizer) -> None:
    prepare(recipe(corpus), tokenizer, f"{bucket}/shards")
    before = storage.list_files(f"{bucket}/shards")
    with pytest.raises(UserError, match=r"finished data set that differs: data\.seed is 2333 there and 1 here"):
        prepare(recipe(corpus, seed=1), tokenizer, f"{bucket}/shards")
    storage.delete([f"{bucket}/shards/plan.json"])
    with pytest.raises(UserError, match=r"holds a finished data set that differs: it has no plan\.json"):
        prepare(recipe(corpus, seed=1), tokenizer, f"{bucket}/shards")
    assert [one.url for one in before if "plan.json" not in one.url] == [
        one.url for one in storage.list_files(f"{bucket}/shards")
    ]


# ---- A corrected command ----


@pytest.mark.parametrize("mistake", [{"text_field": "txt"}, {"text_field": "text", "id_field": "text"}])
def test_corrected_command_works_after_one_that_failed_before_its_first_part(
    mistake: dict[str, str], corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = recipe(corpus, **mistake)
    if "id_field" in mistake:  # any other failure, such as a full disk
        monkeypatch.setattr(shards, "_prepare_group", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises((UserError, OSError)):
        prepare(wrong, tokenizer, f"{bucket}/shards")
    monkeypatch.undo()
    assert storage.list_files(f"{bucket}/shards") == []
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None
    check_whole(f"{bucket}/shards")


def test_corpus_without_text_leaves_nothing_behind(bucket: str, tokenizer: TextTokenizer) -> None:
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines([{"text": "", "content": "长江"}] * 3))
    assert prepare(recipe(f"{bucket}/corpus.jsonl", slice_bytes=1024), tokenizer, f"{bucket}/shards", (1, 2)) is None
    with pytest.raises(UserError, match="no text to train on"):
        prepare(recipe(f"{bucket}/corpus.jsonl", slice_bytes=1024), tokenizer, f"{bucket}/shards", (0, 2))
    assert storage.list_files(f"{bucket}/shards") == []
    corrected = recipe(f"{bucket}/corpus.jsonl", text_field="content", validation_fraction=0)
    assert prepare(corrected, tokenizer, f"{bucket}/shards") is not None


def test_plan_stays_after_a_failure_that_left_parts(bucket: str, tokenizer: TextTokenizer) -> None:
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines(SAMPLE[:20]) + b"broken\n")
    with pytest.raises(UserError, match="bad record"):
        prepare(recipe(f"{bucket}/corpus.jsonl"), tokenizer, f"{bucket}/shards")
    assert storage.exists(f"{bucket}/shards/plan.json")
    assert prepare(recipe(f"{bucket}/corpus.jsonl", on_bad_record="skip"), tokenizer, f"{bucket}/shards") is not None


def test_failure_never_removes_the_plan_of_another_start(
    corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second worker of the same plan fails; the plan belongs to the first one, which goes on."""

    def fail_another() -> None:
        with monkeypatch.context() as broken:
            broken.setattr(shards, "Encoder", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(OSError):
                prepare(recipe(corpus), tokenizer, f"{bucket}/shards", (1, 2))
        assert storage.exists(f"{bucket}/shards/plan.json")

    while_it_makes_its_first_slice(monkeypatch, fail_another)
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None


def test_worker_goes_on_when_the_creator_of_its_plan_has_removed_it(
    corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_it_makes_its_first_slice(monkeypatch, lambda: storage.delete([f"{bucket}/shards/plan.json"]))
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None
    check_whole(f"{bucket}/shards")


# ---- What identifies the corpus ----


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, BLOCKS * BLOCK_BYTES - 1])
def test_small_file_is_identified_by_all_of_it(size: int) -> None:
    assert blocks(size) == ([(0, size)] if size else [])


@pytest.mark.parametrize("size", [BLOCKS * BLOCK_BYTES, BLOCKS * BLOCK_BYTES + 1, 2_000_000_000, 10**13 + 7])
def test_large_file_is_identified_by_64_blocks_from_its_first_to_its_last_byte(size: int) -> None:
    ends = blocks(size)
    assert len(ends) == BLOCKS and {end - start for start, end in ends} == {BLOCK_BYTES}
    assert ends[0][0] == 0 and ends[-1][1] == size
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    gaps = {start - end for (_, end), (start, _) in pairwise(ends)}
    assert max(gaps) - min(gaps) <= 1


def fingerprints(source: str) -> Any:
    return identify(list_corpus(source)).fingerprints


def test_fingerprint_is_the_same_wherever_and_whenever_the_same_bytes_lie(bucket: str, tmp_path: Path) -> None:
    """Modification time, ETag and the folder above the corpus do not count."""
    content = json_lines(SAMPLE) * 16
    assert len(content) > BLOCKS * BLOCK_BYTES / 2
    found = []
    for folder in (str(tmp_path / "one"), str(tmp_path / "two"), bucket):
        for name in ("a/x.jsonl", "b/y.jsonl"):
            storage.write_bytes(f"{folder}/corpus/{name}", content)
        found.append(fingerprints(f"{folder}/corpus/"))
    assert found[0] == found[1] == found[2]
    assert [one.name for one in found[0]] == ["a/x.jsonl", "b/y.jsonl"]
    assert found[0][0].sha256 == hashlib.sha256(content).hexdigest()


def test_fingerprint_of_a_large_file_reads_4_mib_and_sees_a_change_in_a_block(bucket: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    before = identify(list_corpus(str(path)))
    assert before.read_bytes == BLOCKS * BLOCK_BYTES
    expected = hashlib.sha256(bytes(BLOCKS * BLOCK_BYTES)).hexdigest()
    assert before.fingerprints[0].sha256 == expected
    storage.upload_file(path, f"{bucket}/corpus.jsonl")
    assert fingerprints(f"{bucket}/corpus.jsonl") == before.fingerprints
    start, _ = blocks(50_000_000)[17]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"x")
    assert fingerprints(str(path)) != before.fingerprints


def test_corpus_replaced_between_two_workers_is_refused(corpus: str, bucket: str, tokenizer: TextTokenizer) -> None:
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards", (0, 2)) is None
    changed = storage.read_bytes(corpus).replace("的".encode(), "地".encode())
    storage.write_bytes(corpus, changed)
    with pytest.raises(UserError, match=r"data\.source has other content in corpus\.jsonl"):
        prepare(recipe(corpus), tokenizer, f"{bucket}/shards", (1, 2))
    assert not storage.exists(f"{bucket}/shards/{MANIFEST_NAME}")


@pytest.mark.parametrize("is_remote", [True, False])
def test_corpus_replaced_while_a_worker_reads_it_is_refused(
    is_remote: bool, bucket: str, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"{bucket if is_remote else tmp_path}/corpus.jsonl"
    storage.write_bytes(source, json_lines(SAMPLE[:20]))
    url = f"{bucket}/shards"
    changed = storage.read_bytes(source).replace("的".encode(), "地".encode())
    while_it_makes_its_first_slice(monkeypatch, lambda: storage.write_bytes(source, changed))
    with pytest.raises(UserError, match=r"data\.source.*was replaced or removed while it was read"):
        prepare(recipe(source), tokenizer, url)
    assert storage.list_files(url) == []


def test_files_that_one_worker_alone_has_are_named(bucket: str, tokenizer: TextTokenizer) -> None:
    for name in ("a", "b"):
        storage.write_bytes(f"{bucket}/corpus/{name}.jsonl", json_lines(SAMPLE[:5]))
    assert prepare(recipe(f"{bucket}/corpus/"), tokenizer, f"{bucket}/shards", (0, 2)) is None
    storage.write_bytes(f"{bucket}/corpus/c.jsonl", json_lines(SAMPLE[:5]))
    with pytest.raises(UserError, match=r"data\.source has c\.jsonl here alone"):
        prepare(recipe(f"{bucket}/corpus/"), tokenizer, f"{bucket}/shards", (1, 2))


class NoRangesHandler(SimpleHTTPRequestHandler):
    """Sends files as a whole, whatever range is asked for; tells size and time, as Python's server does."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def copyfile(self, *arguments: Any) -> None:
        with suppress(ConnectionError):  # who wanted a part of it has closed the connection
            super().copyfile(*arguments)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address on a server without ranges."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(NoRangesHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_server_without_ranges_is_identified_by_size_and_time(web: tuple[Path, str]) -> None:
    folder, address = web
    (folder / "small.jsonl").write_bytes(json_lines(SAMPLE))
    (folder / "large.jsonl").write_bytes(bytes(5_000_000))
    (small,) = fingerprints(f"{address}/small.jsonl?X-Amz-Signature=secret")
    (large,) = fingerprints(f"{address}/large.jsonl")
    assert (small.name, small.sha256) == ("small.jsonl", hashlib.sha256(json_lines(SAMPLE)).hexdigest())
    assert (large.size, large.sha256) == (5_000_000, None)
    assert large.version is not None and large.version.endswith("GMT")
    listings: list[Listing] = []
    list_corpus(f"{address.replace('//', '//bob:secret@')}/small.jsonl?X-Amz-Signature=secret", listings.append)
    assert listings[0].names == ("small.jsonl",) and "secret" not in listings[0].source + str(listings[0].rows())


def test_files_of_a_hub_are_identified_by_its_revision_and_hash(tmp_path: Path) -> None:
    """The layout of Hugging Face's cache: a snapshot of links to files that are named after their hash."""
    snapshot = tmp_path / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5d41402a").write_bytes(b"{}")
    (snapshot / "linked.jsonl").symlink_to("../../blobs/5d41402a")
    (snapshot / "copied.jsonl").write_bytes(b"{}")
    files = [
        CorpusFile(i, f"{prefix}/{name}", str(snapshot / name), 2, "json", None)
        for i, (prefix, name) in enumerate(
            [
                ("hf://datasets/owner/name@0a1b2c", "linked.jsonl"),
                ("hf://datasets/owner/name@0a1b2c", "copied.jsonl"),
            ]
        )
    ]
    linked, copied = identify(files).fingerprints
    assert (linked.revision, linked.hub_hash, linked.sha256) == ("0a1b2c", "5d41402a", None)
    assert (copied.revision, copied.hub_hash) == ("0a1b2c", None)
    assert copied.sha256 == hashlib.sha256(b"{}").hexdigest()
