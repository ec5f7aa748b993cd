"""Sequences read from the shard files of a split into tensors of input ids and labels."""

import os
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from job import storage
from job.data.manifest import Manifest, Shard
from job.data.order import Integers
from job.data.shard_cache import ShardCache
from job.errors import UserError
from job.model.spec import IGNORE_INDEX

_MOST_READS = 3
"""Attempts to read sequences from a file that another program writes to at the same time."""


class SequenceReader:
    """Reads sequences of one split's shards; several threads may use it at the same time.

    Args:
        shards_url: folder or URL of the data set.
        shards: the shards of the split, in the order in which `cache` has them.
        manifest: the manifest of the data set.
        context_length: most predictions of a sequence.
        cache: gives the files of the shards.
        pin_memory: page-lock the tensors, so that a GPU can copy them while it computes; needs CUDA.
    """

    def __init__(
        self,
        shards_url: str,
        shards: tuple[Shard, ...],
        manifest: Manifest,
        context_length: int,
        cache: ShardCache,
        pin_memory: bool,
    ) -> None:
        self._shards_url, self._shards, self._cache = shards_url, shards, cache
        self._context_length, self._eod_id = context_length, manifest.eod_id
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._pin_memory = pin_memory

    def empty(self, rows: int) -> Tensor:
        """Return input ids and labels with nothing to predict, in one piece of memory.

        The tensor is int64 `[2, rows, context_length]`: first the input ids, then the labels.
        """
        pair = torch.empty((2, rows, self._context_length), dtype=torch.int64, pin_memory=self._pin_memory)
        # numpy fills them, because torch would start its own threads for each of the loader's threads.
        inputs, labels = pair.numpy()
        inputs.fill(self._eod_id)
        labels.fill(IGNORE_INDEX)
        return pair

    def read(self, shard: int, sequences: Integers, rows: Integers, pair: Tensor) -> None:
        """Write these `sequences` of a shard into these `rows` of `pair`; wait until the shard is here.

        Raises:
            UserError: the shard is missing or damaged, or another program writes to it.
        """
        for _ in range(_MOST_READS):
            with self._cache.open(shard) as file:
                is_complete = self._read_once(file, shard, sequences, rows, pair)
                if is_complete and self._cache.is_unchanged(shard, file):
                    return
        url = storage.join(self._shards_url, self._shards[shard].name)
        expected = "another program writes to this shard while it is used"
        raise UserError("data.shards", url, expected, "prepare each data set in a folder of its own")

    def _read_once(self, file: BinaryIO, shard: int, sequences: Integers, rows: Integers, pair: Tensor) -> bool:
        """Read sequences of an open shard into rows of `pair`; return False if the file has become shorter."""
        length, token_bytes = self._context_length, self._dtype.itemsize
        inputs, labels = pair.numpy()
        for sequence, row in zip(sequences.tolist(), rows.tolist(), strict=True):
            first = sequence * length
            count = min(length + 1, self._shards[shard].tokens - first)
            content = os.pread(file.fileno(), count * token_bytes, first * token_bytes)
            if len(content) < count * token_bytes:
                return False
            tokens = np.frombuffer(content, self._dtype)
            inputs[row, : count - 1] = tokens[:-1]
            labels[row, : count - 1] = tokens[1:]
        return True
