"""Checkpoints: plain files that give back every bit, and that exist only when whole."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_run import read_json
from torch import Tensor

from job import storage
from job.demo.server import S3Server
from job.errors import UserError
from job.runs.attempts import Attempts
from job.runs.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    DamagedCheckpoint,
    Name,
    TrainingState,
    check_identity,
    delete_old_checkpoints,
    download_checkpoint,
    good_checkpoints,
    kept_checkpoints,
    list_checkpoints,
    open_checkpoint,
    save_checkpoint,
)

IDENTITY = {"model": {"hidden_size": 32, "num_hidden_layers": 2}, "data": "d1", "global_batch_size": 8}
STATE = TrainingState(
    run_id="a-run",
    attempt=1,
    step=10,
    windows_consumed=80,
    tokens_seen=2_500,
    identity=IDENTITY,
    config={"train": {"seed": 1}},
    guard={"norms": [0.1, 1e-30], "skipped_steps": 2, "skipped_in_a_row": 0},
    interval={"nats": 0.1, "targets": 3.0},
)
METRICS = '{"step": 10, "样本": 1}\n'.encode()
FILES = ["exp_avg.safetensors", "exp_avg_sq.safetensors", "metrics.jsonl", "model.safetensors", "state.json"]
TENSOR_FILES = [name for name in FILES if name.endswith(".safetensors")]


def parameters() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """As `Engine.full_state` gives them; awkward values among them."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (4,)}.items():
        tensors = {key: torch.randn(shape, generator=generator) for key in ("param", "exp_avg", "exp_avg_sq")}
        tensors["param"].view(-1)[:3] = torch.tensor([-0.0, 1e-42, float("inf")])
        yield name, tensors


def save(output: str, step: int = 10, attempt: int = 1, run_id: str = "a-run") -> Checkpoint:
    state = replace(STATE, step=step, attempt=attempt, run_id=run_id)
    return save_checkpoint(output, state, dict(parameters()), METRICS)


def start(output: str, from_step: int | None, run_id: str = "a-run") -> int:
    """An attempt that went on from a step; its number."""
    attempts = Attempts(output)
    attempt = attempts.claim(run_id, "a-start", None, "auto")
    return attempts.update(replace(attempt, from_step=from_step)).number


def steps(output: str) -> list[int]:
    return [name.step for name in list_checkpoints(output)]


def good(output: str, run_id: str = "a-run") -> tuple[list[Name], list[str]]:
    """Those that a run can go on from, and the reasons why the others are passed by."""
    refused: list[str] = []
    found = list(good_checkpoints(output, lambda error: refused.append(str(error)), run_id=run_id))
    return [Name(one.state.step, one.state.attempt) for one in found], refused


# ---- What is in one ----


def test_a_checkpoint_gives_back_every_bit(bucket: str, tmp_path: Path) -> None:
    saved = save(bucket)
    opened = open_checkpoint(f"{bucket}/checkpoints/step-00000010-a1")
    assert opened == saved
    assert opened.state == STATE
    assert opened.metrics() == METRICS
    download_checkpoint(opened, tmp_path)
    found = CheckpointFiles(tmp_path)
    assert list(found) == [name for name, _ in parameters()]
    for name, tensors in parameters():
        assert found[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[name][key].numpy().tobytes() == tensor.numpy().tobytes()


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(bucket: str) -> None:
    url = save(bucket).url
    stored = {entry.url.rpartition("/")[2]: storage.read_bytes(entry.url) for entry in storage.list_files(url)}
    assert sorted(stored) == sorted([*FILES, "manifest.json"])
    for name in TENSOR_FILES:
        assert safetensors.torch.load(stored[name])["model.norm.weight"].shape == (4,)
    assert read_json(f"{url}/state.json") == {"format_version": 1, **asdict(STATE)}
    assert read_json(f"{url}/manifest.json")["files"].keys() == set(FILES)


def test_tensors_of_any_sizes_make_one_file_that_safetensors_reads(bucket: str, tmp_path: Path) -> None:
    big = storage.PART_BYTES // 4  # so that parts of the upload end in the middle of tensors
    sizes = [1, 3, big - 1, big + 5, 2, big * 2]
    snapshot = {
        f"p{i}": {key: torch.randn(size) for key in ("param", "exp_avg", "exp_avg_sq")} for i, size in enumerate(sizes)
    }
    checkpoint = save_checkpoint(bucket, STATE, snapshot, b"")
    download_checkpoint(checkpoint, tmp_path)
    for key, name in (("param", "model"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        found = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        assert list(found) == list(snapshot)
        assert all(torch.equal(found[parameter], snapshot[parameter][key]) for parameter in snapshot)


# ---- Whole or not there ----


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize("attempt", ["first", "second"])
def test_an_upload_that_breaks_off_leaves_no_checkpoint(
    bucket: str, monkeypatch: pytest.MonkeyPatch, failing: str, attempt: str
) -> None:
    if attempt == "second":
        save(bucket)

    def breaking_off(write: Callable[..., None]) -> Callable[..., None]:
        def write_or_fail(url: str, *content: object) -> None:
            if url.endswith(f"/{failing}"):
                raise storage.StoreError("the connection is gone")
            write(url, *content)

        return write_or_fail

    monkeypatch.setattr(storage, "write_from", breaking_off(storage.write_from))
    with pytest.raises(storage.StoreError):
        save(bucket)
    assert list_checkpoints(bucket) == []
    with pytest.raises(UserError, match="no complete checkpoint there"):
        open_checkpoint(f"{bucket}/checkpoints/step-00000010-a1")


def test_a_file_that_arrives_short_leaves_no_checkpoint(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = storage.write_from
    monkeypatch.setattr(storage, "write_from", lambda url, size, read: write(url, size - 1, read))
    with pytest.raises(storage.StoreError, match="bytes in the store"):
        save(bucket)
    assert list_checkpoints(bucket) == []


def test_one_that_has_lost_the_run_publishes_nothing(bucket: str) -> None:
    attempts = Attempts(bucket)
    older = attempts.claim("a-run", "one", None, "auto")
    newer = attempts.claim("a-run", "two", "job-7", "auto")
    with pytest.raises(UserError) as refused:
        save_checkpoint(bucket, STATE, dict(parameters()), METRICS, lambda: Attempts(bucket).check_is_ours(older))
    assert refused.value.setting == "run.output"
    assert f"attempt 2 (process {os.getpid()} on" in str(refused.value)
    assert "job job-7" in str(refused.value)
    assert list_checkpoints(bucket) == []
    save_checkpoint(bucket, STATE, dict(parameters()), METRICS, lambda: Attempts(bucket).check_is_ours(newer))
    assert steps(bucket) == [10]


@pytest.mark.parametrize("name", TENSOR_FILES)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda url: storage.write_bytes(url, storage.read_bytes(url)[:-1]), "is not what its manifest says"),
        (
            lambda url: storage.write_bytes(url, storage.read_bytes(url)[:-1] + b"\x7f"),
            "is not what its manifest says",
        ),
        (lambda url: storage.delete([url]), "is missing"),
    ],
    ids=["truncated", "tampered with", "missing"],
)
def test_a_damaged_file_is_refused_by_name(
    bucket: str, tmp_path: Path, name: str, spoil: Callable[[str], None], said: str
) -> None:
    checkpoint = save(bucket)
    spoil(f"{checkpoint.url}/{name}")
    with pytest.raises(UserError, match=f"{name} {said}") as refused:
        download_checkpoint(open_checkpoint(checkpoint.url), tmp_path)
    assert refused.value.setting == "train.resume"
    assert refused.value.value == checkpoint.url


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"format_version": 1}', b'{"format_version": 1, "files": {"step": 3}}']
)
def test_damaged_json_is_refused_in_a_line(bucket: str, name: str, content: bytes) -> None:
    url = save(bucket).url
    storage.write_bytes(f"{url}/{name}", content)
    with pytest.raises(UserError, match=f"{name} is (damaged|not what its manifest says)"):
        open_checkpoint(url)


def test_a_state_that_was_tampered_with_is_refused(bucket: str) -> None:
    url = save(bucket).url
    storage.write_json(f"{url}/state.json", read_json(f"{url}/state.json") | {"windows_consumed": 88})
    with pytest.raises(UserError, match=r"state.json is not what its manifest says"):
        open_checkpoint(url)


def test_a_log_that_was_tampered_with_is_refused(bucket: str) -> None:
    url = save(bucket).url
    storage.write_bytes(f"{url}/metrics.jsonl", METRICS + METRICS)
    with pytest.raises(UserError, match=r"metrics.jsonl is not what its manifest says"):
        open_checkpoint(url).metrics()


def test_a_log_that_is_missing_is_refused(bucket: str) -> None:
    url = save(bucket).url
    storage.delete([f"{url}/metrics.jsonl"])
    with pytest.raises(UserError, match=r"metrics.jsonl is missing"):
        open_checkpoint(url).metrics()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "metrics.jsonl"])
def test_a_file_that_the_store_has_damaged_is_refused_at_once(s3_server: S3Server, bucket: str, name: str) -> None:
    url = save(bucket).url
    place = {"Bucket": bucket.removeprefix("s3://"), "Key": f"{url}/{name}".removeprefix(f"{bucket}/")}
    found = s3_server.client().get_object(**place)
    content = found["Body"].read().replace(b"1", b"2")
    s3_server.client().put_object(**place, Body=content, Metadata=found["Metadata"])  # the checksum it was sent with
    with storage.limits(deadline_seconds=20), pytest.raises(DamagedCheckpoint, match=f"{name} is"):
        open_checkpoint(url).metrics()


def test_a_newer_version_is_refused(bucket: str) -> None:
    url = save(bucket).url
    manifest = read_json(f"{url}/manifest.json")
    storage.write_json(f"{url}/manifest.json", manifest | {"format_version": 2})
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        open_checkpoint(url)


# ---- Which one ----


def test_checkpoints_are_in_the_order_of_their_steps(bucket: str) -> None:
    for step in (100_000_000, 9, 99_999_999, 10):
        save(bucket, step)
    assert steps(bucket) == [9, 10, 99_999_999, 100_000_000]


def test_the_newest_good_one_comes_first_and_the_others_are_passed_by_with_the_reason(bucket: str) -> None:
    assert good(bucket) == ([], [])
    for step in (10, 20, 30, 40, 50):
        save(bucket, step, run_id="another-run" if step == 30 else "a-run")
    storage.write_bytes(f"{bucket}/checkpoints/step-00000050-a1/manifest.json", b"{")
    storage.delete([f"{bucket}/checkpoints/step-00000020-a1/state.json"])
    found, refused = good(bucket)
    assert found == [Name(40, 1), Name(10, 1)]
    assert [name in line for name, line in zip(("50-a1", "30-a1", "20-a1"), refused, strict=True)] == [True] * 3
    assert "manifest.json is damaged" in refused[0]
    assert "it is of another run, another-run" in refused[1]
    assert "state.json is missing" in refused[2]


def test_what_a_start_went_back_from_is_not_part_of_the_run_any_more(bucket: str) -> None:
    first = start(bucket, 0)
    for step in (10, 20, 30):
        save(bucket, step, first)
    second = start(bucket, 20)  # 30 was refused, or somebody asked for 20
    assert good(bucket)[0] == [Name(20, 1), Name(10, 1)]
    save(bucket, 25, second)
    save(bucket, 40, first)  # the first still wrote
    assert good(bucket)[0] == [Name(25, 2), Name(20, 1), Name(10, 1)]
    start(bucket, None)  # one that never came so far as to choose changes nothing
    assert good(bucket)[0] == [Name(25, 2), Name(20, 1), Name(10, 1)]
    start(bucket, 0, "a-run")  # begun anew
    assert good(bucket)[0] == []


def test_of_one_step_the_later_attempt_counts(bucket: str) -> None:
    for attempt in (start(bucket, 0), start(bucket, 10)):
        save(bucket, 10, attempt)
    assert good(bucket)[0] == [Name(10, 2), Name(10, 1)]


# ---- Which ones are kept ----


def test_the_newest_are_kept(bucket: str) -> None:
    for step in (10, 20, 30, 40):
        newest = save(bucket, step)
        delete_old_checkpoints(bucket, 2, None, Name(newest.state.step, 1))
    assert steps(bucket) == [30, 40]
    assert {entry.url.split("/")[-2] for entry in storage.list_files(f"{bucket}/checkpoints")} == {
        "step-00000030-a1",
        "step-00000040-a1",
    }


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (1, None, [100]),
        (3, None, [80, 90, 100]),
        (100, None, list(range(10, 101, 10))),
        (1, 50, [50, 100]),
        (2, 30, [30, 60, 90, 100]),
        (1, 45, [50, 90, 100]),
        (1, 1000, [100]),
    ],
)
def test_besides_the_newest_the_first_of_every_so_many_steps_is_kept(
    keep: int, keep_every: int | None, kept: list[int]
) -> None:
    names = [Name(step, 1) for step in range(10, 101, 10)]
    assert sorted(name.step for name in kept_checkpoints(names, keep, keep_every)) == kept


def test_what_is_kept_for_ever_stays_whenever_one_looks(bucket: str) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save(bucket, step)
        delete_old_checkpoints(bucket, 1, 25, Name(step, 1))
    assert steps(bucket) == [30, 50, 60]


def test_steps_that_the_run_has_gone_back_from_are_deleted(bucket: str) -> None:
    first = start(bucket, 0)
    for step in (10, 20, 30):
        save(bucket, step, first)
    second = start(bucket, 10)
    save(bucket, 15, second)
    delete_old_checkpoints(bucket, 3, None, Name(15, second))
    assert list_checkpoints(bucket) == [Name(10, 1), Name(15, 2)]


def test_what_uploads_that_broke_off_have_left_is_deleted(bucket: str) -> None:
    for step in (10, 20):
        save(bucket, step)
    storage.delete([f"{bucket}/checkpoints/step-00000010-a1/manifest.json"])
    storage.write_bytes(f"{bucket}/checkpoints/step-00000017-a1/model.safetensors", b"half")
    delete_old_checkpoints(bucket, 5, None, Name(20, 1))
    assert {entry.url.split("/")[-2] for entry in storage.list_files(f"{bucket}/checkpoints")} == {"step-00000020-a1"}


def test_what_uploads_in_parts_that_broke_off_have_left_is_deleted(s3_server: S3Server, bucket: str) -> None:
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for folder in ("step-00000010-a1", "step-00000020-a2", "step-00000030-a3"):  # no list of files shows them
        client.create_multipart_upload(Bucket=name, Key=f"checkpoints/{folder}/model.safetensors")
    save(bucket, 20, 2)
    delete_old_checkpoints(bucket, 5, None, Name(20, 2))
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=name)["Uploads"]]
    assert left == ["checkpoints/step-00000030-a3/model.safetensors"]  # a later attempt may be at it


def test_one_that_has_lost_the_run_deletes_nothing_of_the_one_that_has_it(bucket: str) -> None:
    first = start(bucket, 0)
    save(bucket, 10, first)
    second = start(bucket, 10)
    save(bucket, 20, second)
    storage.write_bytes(f"{bucket}/checkpoints/step-00000030-a{second}/model.safetensors", b"on its way")
    before = storage.list_files(f"{bucket}/checkpoints")
    delete_old_checkpoints(bucket, 5, None, Name(10, first))
    assert storage.list_files(f"{bucket}/checkpoints") == before


def test_a_deletion_that_breaks_off_leaves_no_half_checkpoint(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        save(bucket, step)

    def break_off(url: str) -> None:
        raise storage.StoreError("the connection is gone")

    monkeypatch.setattr(storage, "delete_tree", break_off)
    with pytest.raises(storage.StoreError):
        delete_old_checkpoints(bucket, 1, None, Name(20, 1))
    assert steps(bucket) == [20]


def test_what_differs_is_named_and_nothing_else() -> None:
    check_identity(STATE, IDENTITY, "s3://b/step")
    now = IDENTITY | {"data": "d2", "global_batch_size": 16}
    with pytest.raises(UserError) as refused:
        check_identity(STATE, now, "s3://b/step")
    assert "the data set was d1, is d2 (fingerprints), train.global_batch_size was 8, is 16;" in str(refused.value)
    assert "model" not in str(refused.value)
