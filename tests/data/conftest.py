"""A toy data set whose tokens are all different, so that every one of them can be followed to where it is used."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from job import storage
from job.data.manifest import MANIFEST_NAME, Manifest, Shard, TokenType, load_manifest, manifest_bytes, shard_bytes


@dataclass(frozen=True)
class DataSet:
    url: str
    manifest: Manifest
    train: list[list[int]]
    """Tokens of each training shard."""
    validation: list[list[int]]


WriteDataSet = Callable[..., DataSet]


@pytest.fixture(scope="session")
def write_data_set() -> WriteDataSet:
    def write(url: str, train: Sequence[int], validation: Sequence[int] = (), dtype: TokenType = "uint32") -> DataSet:
        """Writes shards of so many tokens, numbered from 1 on, to `url`."""
        numbers = iter(range(1, 10**9))
        splits: dict[str, list[list[int]]] = {
            split: [[next(numbers) for _ in range(count)] for count in counts]
            for split, counts in (("train", train), ("validation", validation))
        }
        shards: dict[str, list[Shard]] = {"train": [], "validation": []}
        for split, contents in splits.items():
            for number, tokens in enumerate(contents):
                ends = np.array([len(tokens)] if tokens else [], np.int64)
                content = shard_bytes(np.array(tokens, dtype), ends)
                name = f"{split}-{number:05d}.bin"
                storage.write_bytes(storage.join(url, name), content)
                sha256 = hashlib.sha256(content).hexdigest()
                shards[split].append(
                    Shard(
                        name=name,
                        tokens=len(tokens),
                        documents=len(ends),
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

    return write
