"""Checkpoints: plain files that give back every bit, and that exist only when whole."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from job import storage
from job.errors import UserError
from job.training.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    TrainingState,
    check_identity,
    delete_old_checkpoints,
    download_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from job.training.run import open_run

IDENTITY = {"model": {"hidden_size": 32, "num_hidden_layers": 2}, "data": "d1", "global_batch_size": 8}
STATE = TrainingState(
    run_id="a-run",
    step=10,
    windows_consumed=80,
    tokens_seen=2_500,
    identity=IDENTITY,
    config={"train": {"seed": 1}},
)
FILES = ["exp_avg.safetensors", "exp_avg_sq.safetensors", "model.safetensors", "state.json"]


def parameters() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """As `Engine.full_state` gives them; awkward values among them."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (4,)}.items():
        tensors = {key: torch.randn(shape, generator=generator) for key in ("param", "exp_avg", "exp_avg_sq")}
        tensors["param"].view(-1)[:3] = torch.tensor([-0.0, 1e-42, float("inf")])
        yield name, tensors


def save(output: str, scratch: Path, step: int = 10, run_id: str = "a-run") -> Checkpoint:
    return save_checkpoint(output, replace(STATE, step=step, run_id=run_id), parameters(), scratch)


def steps(output: str) -> list[int]:
    return [int(url.rpartition("-")[2]) for url in list_checkpoints(output)]


# ---- What is in one ----


def test_a_checkpoint_gives_back_every_bit(bucket: str, tmp_path: Path) -> None:
    saved = save(bucket, tmp_path)
    opened = open_checkpoint(f"{bucket}/checkpoints/step-00000010")
    assert opened == saved
    assert opened.state == STATE
    download_checkpoint(opened, tmp_path)
    found = CheckpointFiles(tmp_path)
    assert list(found) == [name for name, _ in parameters()]
    for name, tensors in parameters():
        assert found[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[name][key].numpy().tobytes() == tensor.numpy().tobytes()


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(bucket: str, tmp_path: Path) -> None:
    url = save(bucket, tmp_path).url
    stored = {entry.url.rpartition("/")[2]: storage.read_bytes(entry.url) for entry in storage.list_files(url)}
    assert sorted(stored) == sorted([*FILES, "manifest.json"])
    for name in FILES[:3]:
        assert safetensors.torch.load(stored[name])["model.norm.weight"].shape == (4,)
    assert storage.read_json(f"{url}/state.json") == {"format_version": 1, **asdict(STATE)}
    assert storage.read_json(f"{url}/manifest.json")["files"].keys() == set(FILES)
    assert list(tmp_path.iterdir()) == [], "the local copy is gone"


# ---- Whole or not there ----


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize("attempt", ["first", "second"])
def test_an_upload_that_breaks_off_leaves_no_checkpoint(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, attempt: str
) -> None:
    if attempt == "second":
        save(bucket, tmp_path)
    upload = storage.upload_file

    def break_off(path: str, url: str) -> None:
        if url.endswith(f"/{failing}"):
            raise storage.StoreError("the connection is gone")
        upload(path, url)

    monkeypatch.setattr(storage, "upload_file", break_off)
    with pytest.raises(storage.StoreError):
        save(bucket, tmp_path)
    assert list_checkpoints(bucket) == []
    with pytest.raises(UserError, match="no complete checkpoint there"):
        open_checkpoint(f"{bucket}/checkpoints/step-00000010")


def test_a_file_that_arrives_short_leaves_no_checkpoint(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        storage, "upload_file", lambda path, url: storage.write_bytes(url, Path(path).read_bytes()[:-1])
    )
    with pytest.raises(storage.StoreError, match="bytes in the store"):
        save(bucket, tmp_path)
    assert list_checkpoints(bucket) == []


@pytest.mark.parametrize("name", FILES[:3])
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
    checkpoint = save(bucket, tmp_path)
    spoil(f"{checkpoint.url}/{name}")
    with pytest.raises(UserError, match=f"{name} {said}") as refused:
        download_checkpoint(open_checkpoint(checkpoint.url), tmp_path)
    assert refused.value.setting == "train.resume"
    assert refused.value.value == checkpoint.url


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"format_version": 1}', b'{"format_version": 1, "files": {"step": 3}}']
)
def test_damaged_json_is_refused_in_a_line(bucket: str, tmp_path: Path, name: str, content: bytes) -> None:
    url = save(bucket, tmp_path).url
    storage.write_bytes(f"{url}/{name}", content)
    with pytest.raises(UserError, match="is damaged"):
        open_checkpoint(url)


def test_a_newer_version_is_refused(bucket: str, tmp_path: Path) -> None:
    url = save(bucket, tmp_path).url
    state = storage.read_json(f"{url}/state.json")
    storage.write_json(f"{url}/state.json", state | {"format_version": 2})
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        open_checkpoint(url)


# ---- Which one ----


def test_checkpoints_are_in_the_order_of_their_steps(bucket: str, tmp_path: Path) -> None:
    for step in (100_000_000, 9, 99_999_999, 10):
        save(bucket, tmp_path, step)
    assert steps(bucket) == [9, 10, 99_999_999, 100_000_000]


def test_a_run_goes_on_from_its_own_newest_checkpoint(bucket: str, tmp_path: Path) -> None:
    assert newest_checkpoint(bucket, "a-run") is None
    for step, run_id in ((10, "a-run"), (20, "a-run"), (30, "an-earlier-run")):
        save(bucket, tmp_path, step, run_id)
    found = newest_checkpoint(bucket, "a-run")
    assert found is not None and found.state.step == 20
    assert newest_checkpoint(bucket, "a-new-run") is None


def test_the_newest_are_kept(bucket: str, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        newest = save(bucket, tmp_path, step)
        delete_old_checkpoints(bucket, 2, newest.state)
    assert steps(bucket) == [30, 40]
    assert {entry.url.split("/")[-2] for entry in storage.list_files(bucket)} == {"step-00000030", "step-00000040"}


def test_a_new_run_takes_the_place_of_the_one_before_when_its_first_checkpoint_is_complete(
    bucket: str, tmp_path: Path
) -> None:
    for step in (10, 20):
        save(bucket, tmp_path, step, "an-earlier-run")
    newest = save(bucket, tmp_path, 5, "a-run")
    assert steps(bucket) == [5, 10, 20]
    delete_old_checkpoints(bucket, 3, newest.state)
    assert steps(bucket) == [5]


def test_a_run_that_went_back_leaves_the_steps_that_it_gave_up(bucket: str, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(bucket, tmp_path, step)
    newest = save(bucket, tmp_path, 15)
    delete_old_checkpoints(bucket, 3, newest.state)
    assert steps(bucket) == [10, 15]


def test_a_deletion_that_breaks_off_leaves_no_half_checkpoint(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(bucket, tmp_path, 10)
    newest = save(bucket, tmp_path, 20)

    def break_off(url: str) -> None:
        raise storage.StoreError("the connection is gone")

    monkeypatch.setattr(storage, "delete_tree", break_off)
    with pytest.raises(storage.StoreError):
        delete_old_checkpoints(bucket, 1, newest.state)
    assert steps(bucket) == [20]


def test_what_differs_is_named_and_nothing_else() -> None:
    check_identity(STATE, IDENTITY, "s3://b/step")
    now = IDENTITY | {"data": "d2", "global_batch_size": 16}
    with pytest.raises(UserError) as refused:
        check_identity(STATE, now, "s3://b/step")
    assert "data was 'd1', is 'd2', global_batch_size was 8, is 16;" in str(refused.value)
    assert "model" not in str(refused.value)


# ---- The run they belong to ----


def test_a_run_keeps_its_id_through_every_restart_until_it_is_started_over(bucket: str) -> None:
    first = open_run(bucket, None, {"a": 1}, start_over=False)
    assert open_run(bucket, "renamed", {"a": 2}, start_over=False) == first
    anew = open_run(bucket, None, {"a": 2}, start_over=True)
    assert anew.id != first.id
    assert open_run(bucket, None, {}, start_over=False) == anew
