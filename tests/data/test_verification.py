"""Shards on this machine are verified before first use: once a node, and again when they have changed."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_shard_cache import ROOMY, content, stored
from toy_data import LENGTH, DataSet, loader_of, rows, write_data_set

from job import config as settings
from job import storage
from job.data.loader import BatchLoader, EvaluationLoader
from job.data.order import EvaluationOrder
from job.data.shard_cache import ShardCache
from job.data.verification_notes import hash_file, signature, write_note
from job.errors import UserError
from job.preflight.data_set import check_data
from job.preflight.findings import Finding, Findings
from job.runs.world import World
from job.training.distributed import Lockstep
from job.training.hang_detector import Watchdog

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="gives files to another user")
ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


class Verifications:
    """Names of the files that were read to be verified, and what the test wants done at the beginning of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.before: Callable[[], object] = lambda: None
        monkeypatch.setattr("job.data.shard_files.hash_file", self._counted)

    def _counted(self, descriptor: int, on_bytes: Callable[[int], None]) -> Any:
        self.names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        self.before()
        return hash_file(descriptor, on_bytes)


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> Verifications:
    return Verifications(monkeypatch)


def use(data: DataSet, cache_dir: Path) -> int:
    """Has a new cache give every shard, compares each with what was prepared, and returns how many were fetched."""
    cache = ShardCache(data.url, data.manifest.train, cache_dir, ROOMY)
    try:
        cache.use(range(len(data.manifest.train)))
        for index, tokens in enumerate(data.train):
            assert content(cache, index)[: 4 * len(tokens)] == b"".join(token.to_bytes(4, "little") for token in tokens)
    finally:
        cache.close()
    return cache.downloads


@pytest.fixture
def cached(bucket: str, tmp_path: Path) -> tuple[DataSet, Path, Path]:
    """A data set in a store, a cache that holds it, and the cache's file of its first shard."""
    data = write_data_set(bucket, [500, 400])
    assert use(data, tmp_path / "cache") == 2
    (path,) = (tmp_path / "cache").glob("*train-00000.bin.shard")
    return data, tmp_path / "cache", path


# ---- In the cache ----


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def long(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 8)


def one_other_bit_at_the_same_time(path: Path) -> None:
    found, changed = path.stat(), bytearray(path.read_bytes())
    changed[100] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(path: Path) -> None:
    found = path.stat()
    new = path.with_suffix(".new")
    new.write_bytes(bytes(found.st_size))
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
    new.rename(path)


def a_link(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.symlink_to(path.with_suffix(".old"))


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another_users(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize(
    "damage",
    [
        *(zeros, short, empty, long, one_other_bit_at_the_same_time, replaced, a_link, a_pipe),
        pytest.param(another_users, marks=AS_ROOT),
    ],
)
def test_bad_file_in_the_cache_is_fetched_again_and_said(
    damage: Callable[[Path], None], cached: tuple[DataSet, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, cache_dir, path = cached
    damage(path)
    assert use(data, cache_dir) == 1
    assert [message.startswith(f"{path}: this ") for message in caplog.messages] == [True]
    assert caplog.messages[0].endswith("; it is fetched again")
    assert use(data, cache_dir) == 0


def test_unchanged_file_is_read_once_for_all_starts(
    cached: tuple[DataSet, Path, Path], verifications: Verifications
) -> None:
    data, cache_dir, path = cached
    assert [use(data, cache_dir), use(data, cache_dir)] == [0, 0]
    assert verifications.names == [], "a copy was verified when it was made"
    path.touch()
    assert [use(data, cache_dir), use(data, cache_dir)] == [0, 0]
    assert verifications.names == [path.name]
    path.chmod(0o400)  # the time of change alone
    assert [use(data, cache_dir), use(data, cache_dir)] == [0, 0]
    assert verifications.names == [path.name] * 2


def no_note(note: Path, path: Path) -> None:
    note.unlink()


def empty_note(note: Path, path: Path) -> None:
    os.truncate(note, 0)


def cut_note(note: Path, path: Path) -> None:
    os.truncate(note, note.stat().st_size - 1)


def another_users_note(note: Path, path: Path) -> None:
    os.chown(note, NOBODY, NOBODY)


def note_that_all_can_write(note: Path, path: Path) -> None:
    note.chmod(0o666)


def linked_note(note: Path, path: Path) -> None:
    note.rename(note.with_suffix(".old"))
    note.symlink_to(note.with_suffix(".old"))


@pytest.mark.parametrize(
    "forge",
    [
        *(no_note, empty_note, cut_note, note_that_all_can_write, linked_note),
        pytest.param(another_users_note, marks=AS_ROOT),
    ],
)
def test_note_of_nobody_known_is_not_trusted(
    forge: Callable[[Path, Path], None], cached: tuple[DataSet, Path, Path], verifications: Verifications
) -> None:
    data, cache_dir, path = cached
    zeros(path)
    note = path.with_suffix(".verified")
    write_note(note, data.manifest.train[0].sha256, signature(path.stat()))
    forge(note, path)
    assert use(data, cache_dir) == 1
    assert verifications.names == [path.name]


def test_file_changed_while_the_cache_is_open_is_fetched_again(cached: tuple[DataSet, Path, Path]) -> None:
    data, cache_dir, path = cached
    cache = ShardCache(data.url, data.manifest.train, cache_dir, ROOMY)
    cache.use([0, 1])
    assert content(cache, 0) == stored(data, 0)
    zeros(path)
    assert content(cache, 0) == stored(data, 0)
    assert cache.downloads == 1
    cache.close()


def test_shard_that_is_bad_in_the_cache_and_in_the_store_is_refused_by_name(cached: tuple[DataSet, Path, Path]) -> None:
    data, cache_dir, path = cached
    zeros(path)
    storage.write_bytes(storage.join(data.url, "train-00000.bin"), bytes(path.stat().st_size))
    with pytest.raises(UserError, match=rf"^data\.shards: '{data.url}/train-00000\.bin': this shard is damaged"):
        use(data, cache_dir)
    assert not path.exists()


def test_shard_in_the_store_that_is_too_long_is_not_copied_to_its_end(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(bucket, [100])
    storage.write_bytes(storage.join(data.url, "train-00000.bin"), bytes(10 * 2**20))
    open_read, counts = storage.open_read, list[int]()

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            counts.append(len(content := super().read(size)))
            return content

    monkeypatch.setattr(storage, "open_read", lambda url: Counted(open_read(url).detach()))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"train-00000\.bin': this shard is damaged"):
        use(data, tmp_path)
    assert sum(counts) == 2 * 2**20, "the first piece of each of two copies"
    assert not list(tmp_path.glob("*.partial"))


def test_held_out_shards_are_verified_too(bucket: str, tmp_path: Path, verifications: Verifications) -> None:
    data = write_data_set(bucket, [10], [200])
    order = EvaluationOrder([200], LENGTH, seed=1)

    def labels() -> list[int]:
        place: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": ROOMY}
        with EvaluationLoader(data.url, data.manifest, order, batch_size=8, rank=0, world_size=1, **place) as loader:
            return [label for batch in loader for label in batch.labels.flatten().tolist() if label > 0]

    expected = labels()
    (path,) = tmp_path.glob("*validation-00000.bin.shard")
    zeros(path)
    assert labels() == expected == data.validation[0][1:]
    assert verifications.names == [path.name]


# ---- Where they are ----


@pytest.mark.parametrize("damage", [zeros, short, empty, long, one_other_bit_at_the_same_time, replaced])
def test_damaged_local_shard_is_refused_by_name(
    damage: Callable[[Path], None], tmp_path: Path, verifications: Verifications
) -> None:
    data = write_data_set(str(tmp_path / "data"), [500, 400])
    assert [use(data, tmp_path / "cache"), use(data, tmp_path / "cache")] == [0, 0]
    assert sorted(verifications.names) == ["train-00000.bin", "train-00001.bin"]
    path = tmp_path / "data" / "train-00000.bin"
    damage(path)
    same_size = path.stat().st_size == data.manifest.train[0].size
    wrong = "its sha256 is" if same_size else f"it has {path.stat().st_size} bytes, the manifest says"
    with pytest.raises(UserError, match=rf"^data\.shards: '{path}': this shard is damaged: {wrong}") as caught:
        use(data, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_touched_local_shard_is_verified_again(tmp_path: Path, verifications: Verifications) -> None:
    data = write_data_set(str(tmp_path / "data"), [500, 400])
    use(data, tmp_path / "cache")
    verifications.names.clear()
    (tmp_path / "data" / "train-00001.bin").touch()
    assert [use(data, tmp_path / "cache"), use(data, tmp_path / "cache")] == [0, 0]
    assert verifications.names == ["train-00001.bin"]
    assert not list((tmp_path / "cache").glob("*.shard"))


def test_notes_on_equal_shards_in_two_folders_do_not_replace_each_other(
    tmp_path: Path, verifications: Verifications
) -> None:
    one, other = (write_data_set(str(tmp_path / name), [500]) for name in ("one", "other"))
    for data in (one, other, one, other):
        use(data, tmp_path / "cache")
    assert len(verifications.names) == 2


@pytest.mark.parametrize("damage", [zeros, short])
def test_local_shard_that_is_changed_in_training_never_gives_other_tokens(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    data = write_data_set(str(tmp_path / "data"), [2000])
    with loader_of(data, tmp_path / "plain") as loader:
        expected = rows(list(loader))
    got = []
    with loader_of(data, tmp_path / "cache") as loader, pytest.raises(UserError, match=r"^data\.shards: .*train-00000"):
        for batch in loader:
            got.append(batch)
            if len(got) == 5:
                damage(tmp_path / "data" / "train-00000.bin")
    assert rows(got) == expected[: len(got)] and len(got) < len(expected)


def test_bytes_that_change_between_opening_and_reading_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(str(tmp_path / "data"), [50])
    path = tmp_path / "data" / "train-00000.bin"
    read, contents = BatchLoader._read, [bytes(path.stat().st_size), path.read_bytes()]

    def changed(*arguments: Any) -> bool:
        if contents:  # zeros are read at first, and then they are gone
            path.write_bytes(contents.pop(0))
        return read(*arguments)

    monkeypatch.setattr(BatchLoader, "_read", changed)
    with loader_of(data, tmp_path / "cache", prefetch_steps=1) as loader, pytest.raises(UserError, match="damaged"):
        next(loader)


def checked_deeply(data: DataSet, cache_dir: Path) -> dict[str, Finding]:
    overrides = [("data.shards", data.url), ("data.cache_dir", str(cache_dir))]
    findings = Findings()
    check_data(findings, settings.load(None, overrides), deep=True)
    return {row.name: row for row in findings.rows}


def test_deep_check_reads_shards_that_a_note_says_are_verified(tmp_path: Path) -> None:
    data = write_data_set(str(tmp_path / "data"), [500])
    use(data, tmp_path / "cache")
    path = tmp_path / "data" / "train-00000.bin"
    zeros(path)
    (note,) = (tmp_path / "cache").glob("*.verified")
    write_note(note, data.manifest.train[0].sha256, signature(path.stat()))
    row = checked_deeply(data, tmp_path / "cache")["shards"]
    assert (row.mark, row.found) == ("✗", "1 of 1 are damaged: train-00000.bin")


def test_deep_check_reads_the_copies_in_the_cache(cached: tuple[DataSet, Path, Path]) -> None:
    data, cache_dir, path = cached
    row = checked_deeply(data, cache_dir)["copies of shards"]
    assert (row.mark, row.found) == ("✓", f"2 files in {cache_dir}, every sha256 is right")
    zeros(path)
    write_note(path.with_suffix(".verified"), data.manifest.train[0].sha256, signature(path.stat()))
    row = checked_deeply(data, cache_dir)["copies of shards"]
    assert (row.mark, row.found) == ("!", f"1 of 2 files in {cache_dir} are damaged: {path.name}")


# ---- Once a node, on several threads, without standing still ----

PROCESS = """
import os, sys
from job.data import shard_files
from job.data.shard_cache import ShardCache
from job.data.manifest import load_manifest
from job.data.verification_notes import hash_file
read = []
def counted(descriptor, on_bytes):
    read.append(descriptor)
    return hash_file(descriptor, on_bytes)
shard_files.hash_file = counted
url, cache_dir = sys.argv[1:]
manifest = load_manifest(url)
cache = ShardCache(url, manifest.train, cache_dir, 10**9)
print("ready", flush=True)
sys.stdin.readline()
cache.use(range(len(manifest.train)))
for index in range(len(manifest.train)):
    cache.open(index).close()
cache.close()
print(len(read), cache.downloads, flush=True)
"""


def test_processes_of_a_node_verify_each_file_once_between_them(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [20_000] * 12)
    use(data, tmp_path)
    for note in tmp_path.glob("*.verified"):
        note.unlink()
    command, pipe = [sys.executable, "-c", PROCESS, data.url, str(tmp_path)], subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:  # both, before either is waited for
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sum(int(read) for read, _ in found) == 12
    assert [downloads for _, downloads in found] == ["0", "0"]


def test_files_are_verified_on_several_threads(tmp_path: Path, verifications: Verifications) -> None:
    data = write_data_set(str(tmp_path / "data"), [100] * 8)
    meeting = threading.Barrier(4)
    verifications.before = lambda: meeting.wait(60)
    use(data, tmp_path / "cache")
    assert len(verifications.names) == 8


@pytest.fixture
def held(verifications: Verifications) -> Iterator[threading.Event]:
    """Set by the test, to have verification go on."""
    event = threading.Event()
    verifications.before = lambda: event.wait(120)
    yield event
    event.set()


def test_long_verification_is_shown_and_is_no_hang(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.data.loader._VERIFYING_SECONDS", 0.5)
    data = write_data_set(str(tmp_path / "data"), [50])
    said: list[str] = []
    hangs: list[str] = []
    watchdog = Watchdog(ALONE, 2.0, hangs.append)
    rounds = 0

    def beat() -> None:
        nonlocal rounds
        rounds += 1
        watchdog.beat()
        if rounds == 25:  # of 0.2 s each
            held.set()

    with loader_of(data, tmp_path / "cache", say=said.append) as loader:
        assert Lockstep(ALONE, lambda: False, beat).go_on(loader.poll)
        next(loader)
    watchdog.close()
    assert hangs == [] and rounds >= 25
    assert set(said) == {"verifying shards 0.0/0.0 GB"} and 2 <= len(said) <= rounds


def test_run_stops_when_asked_in_the_middle_of_a_verification(tmp_path: Path, held: threading.Event) -> None:
    data = write_data_set(str(tmp_path / "data"), [50])
    asked = iter([False, False])
    with loader_of(data, tmp_path / "cache") as loader:
        lockstep = Lockstep(ALONE, lambda: next(asked, True), lambda: None)
        assert not lockstep.go_on(loader.poll)
        held.set()


def test_progress_counts_the_bytes_of_all_files_that_have_to_be_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(str(tmp_path / "data"), [1000, 1000])
    sizes = [shard.size for shard in data.manifest.train]
    halfway, go_on = threading.Semaphore(0), threading.Event()

    def read_half(descriptor: int, on_bytes: Callable[[int], None]) -> Any:
        on_bytes(sizes[0] // 2)
        halfway.release()
        go_on.wait(60)
        return hash_file(descriptor, lambda count: None)

    monkeypatch.setattr("job.data.shard_files.hash_file", read_half)
    cache = ShardCache(data.url, data.manifest.train, tmp_path / "cache", ROOMY)
    cache.use([0, 1])
    assert halfway.acquire(timeout=60) and halfway.acquire(timeout=60)
    verifying = cache.verifying
    assert verifying is not None
    assert (verifying.done_bytes, verifying.total_bytes) == (2 * (sizes[0] // 2), sum(sizes))
    assert str(verifying._replace(done_bytes=3_210_000_000, total_bytes=16 * 10**9)) == "verifying shards 3.2/16.0 GB"
    go_on.set()
    content(cache, 0)
    content(cache, 1)
    assert cache.verifying is None
    cache.close()
