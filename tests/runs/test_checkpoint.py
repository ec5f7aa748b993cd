"""Checkpoints: saving, loading, damage, which ones a run can use, and which ones are kept."""

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
from job.model.optimizer_state import optimizer_state
from job.runs.attempts import Attempts
from job.runs.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    CheckpointName,
    DamagedCheckpoint,
    TrainingState,
    check_compatibility,
    download_checkpoint,
    open_checkpoint,
)
from job.runs.checkpoint_list import good_checkpoints, list_checkpoints
from job.runs.checkpoint_writer import save_checkpoint
from job.runs.retention import delete_old_checkpoints, kept_checkpoints

COMPATIBILITY_KEY = {"model": {"hidden_size": 32, "num_hidden_layers": 2}, "data": "d1", "global_batch_size": 8}
STATE = TrainingState(
    run_id="a-run",
    attempt=1,
    step=10,
    windows_consumed=80,
    tokens_seen=2_500,
    identity=COMPATIBILITY_KEY,
    config={"train": {"seed": 1}},
    guard={"norms": [0.1, 1e-30], "skipped_steps": 2, "skipped_in_a_row": 0},
    interval={"nats": 0.1, "targets": 3.0},
)
METRICS = '{"step": 10, "样本": 1}\n'.encode()
FILES = ["exp_avg.safetensors", "exp_avg_sq.safetensors", "metrics.jsonl", "model.safetensors", "state.json"]
TENSOR_FILES = [name for name in FILES if name.endswith(".safetensors")]


def parameters() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Parameters as `Engine.full_state` yields them, with negative zero, a denormal and infinity among the values."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (4,)}.items():
        tensors = {key: torch.randn(shape, generator=generator) for key in ("param", "exp_avg", "exp_avg_sq")}
        tensors["param"].view(-1)[:3] = torch.tensor([-0.0, 1e-42, float("inf")])
        yield name, tensors


def save(output: str, step: int = 10, attempt: int = 1, run_id: str = "a-run") -> Checkpoint:
    state = replace(STATE, step=step, attempt=attempt, run_id=run_id)
    return save_checkpoint(output, state, dict(parameters()), METRICS)


def start(output: str, from_step: int | None, run_id: str = "a-run") -> int:
    """Begin an attempt that continued from a step, and return its number."""
    attempts = Attempts(output)
    attempt = attempts.claim(run_id, "a-start", None, "auto")
    return attempts.update(replace(attempt, from_step=from_step)).number


def steps(output: str) -> list[int]:
    return [name.step for name in list_checkpoints(output)]


def good(output: str, run_id: str = "a-run") -> tuple[list[CheckpointName], list[str]]:
    """The checkpoints that a run can continue from, and the reasons why others are skipped."""
    refused: list[str] = []
    usable = list(good_checkpoints(output, lambda error: refused.append(str(error)), run_id=run_id))
    return [CheckpointName(each.state.step, each.state.attempt) for each in usable], refused


# ---- Content ----


def test_loaded_tensors_and_state_equal_the_saved_ones(bucket: str, tmp_path: Path) -> None:
    saved = save(bucket)
    opened = open_checkpoint(f"{bucket}/checkpoints/step-00000010-a1")
    assert opened == saved
    assert opened.state == STATE
    assert opened.metrics() == METRICS
    download_checkpoint(opened, tmp_path)
    loaded = CheckpointFiles(tmp_path)
    assert list(loaded) == [name for name, _ in parameters()]
    for name, tensors in parameters():
        assert loaded[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert loaded[name][key].numpy().tobytes() == tensor.numpy().tobytes()


def test_checkpoint_holds_only_safetensors_and_json(bucket: str) -> None:
    url = save(bucket).url
    stored = {entry.url.rpartition("/")[2]: storage.read_bytes(entry.url) for entry in storage.list_files(url)}
    assert sorted(stored) == sorted([*FILES, "manifest.json"])
    for name in TENSOR_FILES:
        assert safetensors.torch.load(stored[name])["model.norm.weight"].shape == (4,)
    assert read_json(f"{url}/state.json") == {"format_version": 1, **asdict(STATE)}
    assert read_json(f"{url}/manifest.json")["files"].keys() == set(FILES)


def test_safetensors_reads_files_of_tensors_of_any_size(bucket: str, tmp_path: Path) -> None:
    big = storage.PART_BYTES // 4  # makes parts of the upload end in the middle of tensors
    sizes = [1, 3, big - 1, big + 5, 2, big * 2]
    snapshot = {
        f"p{i}": {key: torch.randn(size) for key in ("param", "exp_avg", "exp_avg_sq")} for i, size in enumerate(sizes)
    }
    checkpoint = save_checkpoint(bucket, STATE, snapshot, b"")
    download_checkpoint(checkpoint, tmp_path)
    for key, name in (("param", "model"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        loaded = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        assert list(loaded) == list(snapshot)
        assert all(torch.equal(loaded[parameter], snapshot[parameter][key]) for parameter in snapshot)


# ---- Interrupted and damaged ----


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize("attempt", ["first", "second"])
def test_interrupted_upload_leaves_no_checkpoint(
    bucket: str, monkeypatch: pytest.MonkeyPatch, failing: str, attempt: str
) -> None:
    if attempt == "second":
        save(bucket)

    def failing_at(write: Callable[..., None]) -> Callable[..., None]:
        def write_or_fail(url: str, *content: object) -> None:
            if url.endswith(f"/{failing}"):
                raise storage.StoreError("the connection is lost")
            write(url, *content)

        return write_or_fail

    monkeypatch.setattr(storage, "write_from", failing_at(storage.write_from))
    with pytest.raises(storage.StoreError):
        save(bucket)
    assert list_checkpoints(bucket) == []
    with pytest.raises(UserError, match="there is no complete checkpoint"):
        open_checkpoint(f"{bucket}/checkpoints/step-00000010-a1")


def test_truncated_upload_leaves_no_checkpoint(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = storage.write_from
    monkeypatch.setattr(storage, "write_from", lambda url, size, read: write(url, size - 1, read))
    with pytest.raises(storage.StoreError, match="bytes in the store"):
        save(bucket)
    assert list_checkpoints(bucket) == []


def test_superseded_attempt_publishes_no_checkpoint(bucket: str) -> None:
    attempts = Attempts(bucket)
    older = attempts.claim("a-run", "one", None, "auto")
    newer = attempts.claim("a-run", "two", "job-7", "auto")
    with pytest.raises(UserError) as refused:
        save_checkpoint(bucket, STATE, dict(parameters()), METRICS, lambda: Attempts(bucket).raise_if_superseded(older))
    assert refused.value.setting == "run.output"
    assert f"attempt 2 (process {os.getpid()} on" in str(refused.value)
    assert "job job-7" in str(refused.value)
    assert list_checkpoints(bucket) == []
    save_checkpoint(bucket, STATE, dict(parameters()), METRICS, lambda: Attempts(bucket).raise_if_superseded(newer))
    assert steps(bucket) == [10]


@pytest.mark.parametrize("name", TENSOR_FILES)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda url: storage.write_bytes(url, storage.read_bytes(url)[:-1]), "does not match the size"),
        (
            lambda url: storage.write_bytes(url, storage.read_bytes(url)[:-1] + b"\x7f"),
            "does not match the size",
        ),
        (lambda url: storage.delete([url]), "is missing"),
    ],
    ids=["truncated", "changed", "missing"],
)
def test_damaged_tensor_file_is_refused_by_name(
    bucket: str, tmp_path: Path, name: str, damage: Callable[[str], None], reason: str
) -> None:
    checkpoint = save(bucket)
    damage(f"{checkpoint.url}/{name}")
    with pytest.raises(UserError, match=f"{name} {reason}") as refused:
        download_checkpoint(open_checkpoint(checkpoint.url), tmp_path)
    assert refused.value.setting == "train.resume"
    assert refused.value.value == checkpoint.url


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"format_version": 1}', b'{"format_version": 1, "files": {"step": 3}}']
)
def test_damaged_json_is_refused_by_name(bucket: str, name: str, content: bytes) -> None:
    url = save(bucket).url
    storage.write_bytes(f"{url}/{name}", content)
    with pytest.raises(UserError, match=f"{name} (is damaged|does not match the size)"):
        open_checkpoint(url)


def test_changed_state_is_refused(bucket: str) -> None:
    url = save(bucket).url
    storage.write_json(f"{url}/state.json", read_json(f"{url}/state.json") | {"windows_consumed": 88})
    with pytest.raises(UserError, match=r"state.json does not match the size"):
        open_checkpoint(url)


def test_changed_metrics_are_refused(bucket: str) -> None:
    url = save(bucket).url
    storage.write_bytes(f"{url}/metrics.jsonl", METRICS + METRICS)
    with pytest.raises(UserError, match=r"metrics.jsonl does not match the size"):
        open_checkpoint(url).metrics()


def test_missing_metrics_are_refused(bucket: str) -> None:
    url = save(bucket).url
    storage.delete([f"{url}/metrics.jsonl"])
    with pytest.raises(UserError, match=r"metrics.jsonl is missing"):
        open_checkpoint(url).metrics()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "metrics.jsonl"])
def test_file_damaged_in_the_store_is_refused_without_retries(s3_server: S3Server, bucket: str, name: str) -> None:
    url = save(bucket).url
    location = {"Bucket": bucket.removeprefix("s3://"), "Key": f"{url}/{name}".removeprefix(f"{bucket}/")}
    stored = s3_server.client().get_object(**location)
    content = stored["Body"].read().replace(b"1", b"2")
    # The metadata holds the checksum of the original content.
    s3_server.client().put_object(**location, Body=content, Metadata=stored["Metadata"])
    with (
        storage.limits(deadline_seconds=20),
        pytest.raises(DamagedCheckpoint, match=f"{name} (is damaged|does not match)"),
    ):
        open_checkpoint(url).metrics()


def test_newer_format_version_is_refused(bucket: str) -> None:
    url = save(bucket).url
    manifest = read_json(f"{url}/manifest.json")
    storage.write_json(f"{url}/manifest.json", manifest | {"format_version": 3})
    with pytest.raises(UserError, match="format version 3, this program reads 1 and 2"):
        open_checkpoint(url)


@pytest.mark.parametrize(("optimizer", "version"), [("adamw", 1), ("muon", 2)])
def test_checkpoint_with_other_states_has_another_version(bucket: str, optimizer: str, version: int) -> None:
    """A program that knows only AdamW's two states of every parameter reads version 1 alone."""
    tensors = dict(parameters())
    tensors["model.layers.0.mlp.up_proj.weight"] = {"param": torch.ones(3, 4)}
    matrix = tensors["model.layers.0.mlp.up_proj.weight"]
    matrix |= {key: torch.ones(3, 4) for key in optimizer_state(optimizer).tensors_of("layers.0", (3, 4))}
    state = replace(STATE, identity=COMPATIBILITY_KEY | {"optimizer": optimizer})
    url = save_checkpoint(bucket, state, tensors, METRICS).url
    assert read_json(f"{url}/manifest.json")["format_version"] == version
    assert read_json(f"{url}/state.json")["format_version"] == version
    assert open_checkpoint(url).state.optimizer == optimizer_state(optimizer)


@pytest.mark.parametrize(("was", "now"), [("muon", "adamw"), (None, "muon")])
def test_checkpoint_of_another_optimizer_is_refused(bucket: str, was: str | None, now: str) -> None:
    state = replace(STATE, identity=COMPATIBILITY_KEY | ({} if was is None else {"optimizer": was}))
    with pytest.raises(UserError, match=rf"of another run: train\.optimizer was {was or 'adamw'}, is {now}"):
        check_compatibility(state, COMPATIBILITY_KEY | {"optimizer": now}, bucket)


# ---- Which checkpoint a run continues from ----


def test_checkpoints_are_sorted_by_step(bucket: str) -> None:
    for step in (100_000_000, 9, 99_999_999, 10):
        save(bucket, step)
    assert steps(bucket) == [9, 10, 99_999_999, 100_000_000]


def test_newest_good_checkpoint_comes_first_with_reasons_for_others(bucket: str) -> None:
    assert good(bucket) == ([], [])
    for step in (10, 20, 30, 40, 50):
        save(bucket, step, run_id="another-run" if step == 30 else "a-run")
    storage.write_bytes(f"{bucket}/checkpoints/step-00000050-a1/manifest.json", b"{")
    storage.delete([f"{bucket}/checkpoints/step-00000020-a1/state.json"])
    usable, refused = good(bucket)
    assert usable == [CheckpointName(40, 1), CheckpointName(10, 1)]
    assert [name in line for name, line in zip(("50-a1", "30-a1", "20-a1"), refused, strict=True)] == [True] * 3
    assert "manifest.json is damaged" in refused[0]
    assert "it belongs to another run, another-run" in refused[1]
    assert "state.json is missing" in refused[2]


def test_steps_that_a_later_attempt_went_back_from_do_not_count(bucket: str) -> None:
    first = start(bucket, 0)
    for step in (10, 20, 30):
        save(bucket, step, first)
    second = start(bucket, 20)  # 30 was damaged, or train.resume named 20
    assert good(bucket)[0] == [CheckpointName(20, 1), CheckpointName(10, 1)]
    save(bucket, 25, second)
    save(bucket, 40, first)  # the superseded attempt was still writing
    assert good(bucket)[0] == [CheckpointName(25, 2), CheckpointName(20, 1), CheckpointName(10, 1)]
    start(bucket, None)  # an attempt that ended before its start step was decided
    assert good(bucket)[0] == [CheckpointName(25, 2), CheckpointName(20, 1), CheckpointName(10, 1)]
    start(bucket, 0, "a-run")  # starts over
    assert good(bucket)[0] == []


def test_later_attempt_wins_if_two_saved_the_same_step(bucket: str) -> None:
    for attempt in (start(bucket, 0), start(bucket, 10)):
        save(bucket, 10, attempt)
    assert good(bucket)[0] == [CheckpointName(10, 2), CheckpointName(10, 1)]


# ---- Retention ----


def test_retention_keeps_the_newest_checkpoints(bucket: str) -> None:
    for step in (10, 20, 30, 40):
        newest = save(bucket, step)
        delete_old_checkpoints(bucket, 2, None, CheckpointName(newest.state.step, 1))
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
def test_retention_keeps_one_checkpoint_of_each_interval(keep: int, keep_every: int | None, kept: list[int]) -> None:
    names = [CheckpointName(step, 1) for step in range(10, 101, 10)]
    assert sorted(name.step for name in kept_checkpoints(names, keep, keep_every)) == kept


@pytest.mark.parametrize(
    ("decays_after", "kept"),
    [
        ([], [90, 100]),
        ([60], [60, 90, 100]),
        ([65], [60, 90, 100]),
        ([30, 60], [30, 60, 90, 100]),
        ([100], [90, 100]),
        ([5], [90, 100]),
    ],
)
def test_retention_keeps_the_checkpoint_before_each_decay(decays_after: list[int], kept: list[int]) -> None:
    names = [CheckpointName(step, 1) for step in range(10, 101, 10)]
    assert sorted(name.step for name in kept_checkpoints(names, 2, None, decays_after)) == kept


def test_interval_checkpoints_survive_repeated_retention(bucket: str) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save(bucket, step)
        delete_old_checkpoints(bucket, 1, 25, CheckpointName(step, 1))
    assert steps(bucket) == [30, 50, 60]


def test_retention_deletes_steps_that_the_run_went_back_from(bucket: str) -> None:
    first = start(bucket, 0)
    for step in (10, 20, 30):
        save(bucket, step, first)
    second = start(bucket, 10)
    save(bucket, 15, second)
    delete_old_checkpoints(bucket, 3, None, CheckpointName(15, second))
    assert list_checkpoints(bucket) == [CheckpointName(10, 1), CheckpointName(15, 2)]


def test_retention_deletes_the_rest_of_interrupted_uploads(bucket: str) -> None:
    for step in (10, 20):
        save(bucket, step)
    storage.delete([f"{bucket}/checkpoints/step-00000010-a1/manifest.json"])
    storage.write_bytes(f"{bucket}/checkpoints/step-00000017-a1/model.safetensors", b"half")
    delete_old_checkpoints(bucket, 5, None, CheckpointName(20, 1))
    assert {entry.url.split("/")[-2] for entry in storage.list_files(f"{bucket}/checkpoints")} == {"step-00000020-a1"}


def test_retention_aborts_interrupted_multipart_uploads(s3_server: S3Server, bucket: str) -> None:
    client, bucket_name = s3_server.client(), bucket.removeprefix("s3://")
    # A list of files does not show unfinished multipart uploads.
    for folder in ("step-00000010-a1", "step-00000020-a2", "step-00000030-a3"):
        client.create_multipart_upload(Bucket=bucket_name, Key=f"checkpoints/{folder}/model.safetensors")
    save(bucket, 20, 2)
    delete_old_checkpoints(bucket, 5, None, CheckpointName(20, 2))
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket_name)["Uploads"]]
    assert left == ["checkpoints/step-00000030-a3/model.safetensors"]  # a later attempt may be writing it


def test_superseded_attempt_never_deletes_newer_files(bucket: str) -> None:
    first = start(bucket, 0)
    save(bucket, 10, first)
    second = start(bucket, 10)
    save(bucket, 20, second)
    storage.write_bytes(f"{bucket}/checkpoints/step-00000030-a{second}/model.safetensors", b"being uploaded")
    before = storage.list_files(f"{bucket}/checkpoints")
    delete_old_checkpoints(bucket, 5, None, CheckpointName(10, first))
    assert storage.list_files(f"{bucket}/checkpoints") == before


def test_interrupted_deletion_leaves_no_partial_checkpoint(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        save(bucket, step)

    def fail(url: str) -> None:
        raise storage.StoreError("the connection is lost")

    monkeypatch.setattr(storage, "delete_tree", fail)
    with pytest.raises(storage.StoreError):
        delete_old_checkpoints(bucket, 1, None, CheckpointName(20, 1))
    assert steps(bucket) == [20]


def test_compatibility_error_names_only_the_differences() -> None:
    check_compatibility(STATE, COMPATIBILITY_KEY, "s3://b/step")
    now = COMPATIBILITY_KEY | {"data": "d2", "global_batch_size": 16}
    with pytest.raises(UserError) as refused:
        check_compatibility(STATE, now, "s3://b/step")
    assert "the data set was d1, is d2 (fingerprints), train.global_batch_size was 8, is 16;" in str(refused.value)
    assert "model" not in str(refused.value)
