"""The data set on disk: it is read as it was written, and an incomplete or damaged one is refused."""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import write_data_set

from job.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardBuilder,
    TokenType,
    load_manifest,
    manifest_bytes,
    open_shard,
    shard_size,
)
from job.errors import UserError


def shard_of(number: int, tokens: int = 10_000_019, documents: int = 7) -> Shard:
    return Shard(
        name=f"train/{number:06d}.bin",
        tokens=tokens,
        documents=documents,
        utf8_bytes=4,
        characters=2,
        size=shard_size(tokens, documents, "uint16"),
        sha256=f"{number:064x}",
    )


def manifest_of(*shards: Shard) -> Manifest:
    return Manifest(
        fingerprint="a",
        tokenizer_fingerprint="b",
        vocab_size=100,
        dtype="uint16",
        eod_id=3,
        seed=1,
        validation_fraction=0.1,
        split_rule="c",
        train=shards,
        validation=(),
        statistics={"texts": {"mean": 1.5}},
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=6), st.sampled_from(["uint16", "uint32"]))
def test_shard_file_gives_back_its_tokens_and_document_ends(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], dtype: TokenType
) -> None:
    path = tmp_path_factory.getbasetemp() / "shard.bin"
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = np.arange(60_000, 60_000 + sum(lengths)).astype(dtype)
    builder, begin = ShardBuilder(dtype), 0
    for batch in (lengths[:2], [], lengths[2:]):
        builder.add(tokens[begin : begin + sum(batch)], np.array(batch, np.int64))
        begin += sum(batch)
    assert (builder.tokens, builder.documents) == (len(tokens), len(lengths))
    content = builder.finish()
    path.write_bytes(content)
    assert len(content) == shard_size(len(tokens), len(lengths), dtype)
    assert content[: tokens.nbytes] == tokens.astype(f"<u{tokens.itemsize}").tobytes()
    shard = Shard(
        name="shard.bin",
        tokens=len(tokens),
        documents=len(lengths),
        utf8_bytes=0,
        characters=0,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    read_tokens, read_ends = open_shard(path, shard, dtype)
    assert read_tokens.tolist() == tokens.tolist() and read_ends.tolist() == ends.tolist()


def test_shard_file_of_another_size_is_refused(tmp_path: Path) -> None:
    data = write_data_set(str(tmp_path), [100])
    path = tmp_path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"data\.shards.*it has 400 bytes, the manifest says 408"):
        open_shard(path, data.manifest.train[0], "uint32")


def test_shard_file_with_other_bytes_is_refused(tmp_path: Path) -> None:
    data = write_data_set(str(tmp_path), [100])
    path = tmp_path / "train-00000.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"data\.shards.*train-00000\.bin.*its sha256 is"):
        open_shard(path, data.manifest.train[0], "uint32")


def test_manifest_of_100_000_shards_is_read_in_two_seconds(tmp_path: Path) -> None:
    manifest = manifest_of(*map(shard_of, range(100_000)))
    content = manifest_bytes(manifest)
    assert content == manifest_bytes(manifest)
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    began = time.process_time()
    assert load_manifest(str(tmp_path)) == manifest
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"{", b""), "damaged, or was not written by this program"),
        ((b'"format_version": 1', b'"format_version": 2'), "format version 2, this program reads 1"),
        ((b'"format_version": 1', b'"other": 1'), "damaged, or was not written by this program"),
        ((b'"eod_id": 3', b'"eod_id": -3'), "damaged at eod_id"),
        ((b'"eod_id": 3', b'"eod_id": "3"'), "damaged at eod_id"),
        ((b'"uint16"', b'"uint8"'), "damaged at dtype"),
        ((b'"tokens": 19', b'"tokens": 26'), "its tokens need 112"),
        ((b'"sha256": "00', b'"sha256": "'), r"damaged at train\.0\.sha256"),
    ],
)
def test_damaged_foreign_or_newer_manifest_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    content = manifest_bytes(manifest_of(shard_of(0, tokens=19)))
    assert change[0] in content
    (tmp_path / MANIFEST_NAME).write_bytes(content.replace(*change, 1))
    with pytest.raises(UserError, match=rf"^data\.shards: '{tmp_path}': .*{message}"):
        load_manifest(str(tmp_path))


def test_folder_without_a_manifest_is_refused(bucket: str, tmp_path: Path) -> None:
    for url in (str(tmp_path / "absent"), f"{bucket}/absent"):
        with pytest.raises(UserError, match=r"^data\.shards: .*run `.*python -m job prepare` first"):
            load_manifest(url)
