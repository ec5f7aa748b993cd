"""A toy data set whose tokens are all different, so that a test can follow each token to the batch that uses it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from job import storage
from job.data.loader import Batch, BatchLoader
from job.data.manifest import MANIFEST_NAME, Manifest, Shard, ShardBuilder, TokenType, load_manifest, manifest_bytes
from job.data.order import SequenceOrder

LENGTH = 5
"""The context length of the tests that use this file."""


@dataclass(frozen=True)
class DataSet:
    url: str
    manifest: Manifest
    train: list[list[int]]
    """Tokens of each training shard."""
    validation: list[list[int]]


def write_data_set(
    url: str, train: Sequence[int], validation: Sequence[int] = (), dtype: TokenType = "uint32"
) -> DataSet:
    """Write a data set to `url`; `train` and `validation` are the tokens of each shard. Tokens count up from 1."""
    numbers = iter(range(1, 10**9))
    splits: dict[str, list[list[int]]] = {
        split: [[next(numbers) for _ in range(count)] for count in counts]
        for split, counts in (("train", train), ("validation", validation))
    }
    shards: dict[str, list[Shard]] = {"train": [], "validation": []}
    for split, contents in splits.items():
        for number, tokens in enumerate(contents):
            builder = ShardBuilder(dtype)
            builder.add(np.array(tokens, dtype), np.array([len(tokens)] if tokens else [], np.int64))
            content = builder.finish()
            name = f"{split}-{number:05d}.bin"
            storage.write_bytes(storage.join(url, name), content)
            sha256 = hashlib.sha256(content).hexdigest()
            shards[split].append(
                Shard(
                    name=name,
                    tokens=len(tokens),
                    documents=builder.documents,
                    utf8_bytes=len(tokens),
                    characters=len(tokens),
                    size=len(content),
                    sha256=sha256,
                )
            )
    manifest = Manifest(
        fingerprint="toy",
        tokenizer_fingerprint="toy",
        vocab_size=2**16,
        dtype=dtype,
        eod_id=0,
        seed=1,
        validation_fraction=0.1,
        split_rule="by hand",
        train=tuple(shards["train"]),
        validation=tuple(shards["validation"]),
        statistics={},
    )
    storage.write_bytes(storage.join(url, MANIFEST_NAME), manifest_bytes(manifest))
    return DataSet(url, load_manifest(url), splits["train"], splits["validation"])


def order_of(data: DataSet, **changes: Any) -> SequenceOrder:
    shards = data.manifest.train
    arguments: dict[str, Any] = {"context_length": LENGTH, "seed": 11, "buffer_bytes": 300} | changes
    return SequenceOrder([shard.tokens for shard in shards], [shard.size for shard in shards], **arguments)


def loader_of(data: DataSet, cache_dir: Path | str, order: SequenceOrder | None = None, **changes: Any) -> BatchLoader:
    order = order or order_of(data)
    arguments: dict[str, Any] = {
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "rank": 0,
        "world_size": 1,
        "start_position": 0,
        "end_position": order.position_limit(2),
        "cache_dir": cache_dir,
        "cache_bytes": 10**6,
        "prefetch_steps": 2,
        "workers": 1,
    }
    return BatchLoader(data.url, data.manifest, order, **(arguments | changes))


def rows(batches: list[Batch]) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Return the input ids and labels of each batch, with its micro-batches concatenated."""
    return [
        tuple(torch.cat([pair[side] for pair in batch.micro_batches]).tolist() for side in (0, 1))  # type: ignore[misc]
        for batch in batches
    ]
