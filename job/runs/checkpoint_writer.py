"""Writing a checkpoint: upload the files from memory, confirm that they arrived, and write the manifest last."""

import bisect
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import orjson

from job import storage
from job.json_record import record_bytes
from job.model.optimizer_state import WEIGHT
from job.runs.checkpoint import (
    MANIFEST,
    METRICS,
    STATE,
    Checkpoint,
    CheckpointName,
    File,
    Manifest,
    TrainingState,
    file_of,
)

if TYPE_CHECKING:
    from torch import Tensor


class _SafetensorsFile:
    """The bytes of a safetensors file made from tensors in memory, without copying the tensors.

    The format is an 8-byte length, a JSON header with each tensor's dtype, shape and offsets, and the tensors' bytes:
    https://huggingface.co/docs/safetensors#format
    """

    def __init__(self, tensors: Mapping[str, "Tensor"]) -> None:
        ends = list(accumulate(tensor.nbytes for tensor in tensors.values()))
        header = {"__metadata__": {"format": "pt"}} | {
            name: {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
            for (name, tensor), end in zip(tensors.items(), ends, strict=True)
        }
        text = orjson.dumps(header)
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self._pieces = [
            memoryview(head),
            *(tensor.numpy().reshape(-1).view(np.uint8).data for tensor in tensors.values()),
        ]
        self._starts = [0, *(len(head) + end for end in (0, *ends))]
        self.size = self._starts.pop()
        """Size of the file in bytes."""

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from offset `start` up to `end`."""
        content = bytearray()
        index = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            piece = self._pieces[index][start - self._starts[index] : end - self._starts[index]]
            content += piece
            start, index = start + len(piece), index + 1
        return bytes(content)

    def sha256(self) -> str:
        """Return the hexadecimal sha256 of the file."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(piece)
        return digest.hexdigest()


def save_checkpoint(
    output: str,
    state: TrainingState,
    snapshot: Mapping[str, Mapping[str, "Tensor"]],
    metrics: bytes,
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Checkpoint:
    """Upload a checkpoint from memory; write its manifest when the store has confirmed the size of every other file.

    Args:
        output: folder or URL of the run.
        state: the content of state.json.
        snapshot: by parameter name: the weight (``param``) and the optimizer's state, fp32 on the CPU. The tensors must
            not change until this function returns.
        metrics: the content of metrics.jsonl up to this step.
        check: called before the manifest is written; raises if this attempt does not own the run any more.
        clock: returns the seconds since the save began.

    Raises:
        StoreError: the store failed, or confirmed another size than was sent.
    """
    url = CheckpointName(state.step, state.attempt).url(output)
    files: dict[str, File] = {}
    # An earlier try of this attempt may have left files. Without a manifest they do not count as a checkpoint while
    # they are replaced.
    storage.delete([storage.join(url, MANIFEST)])
    for key in (WEIGHT, *state.optimizer.tensors):
        name = file_of(key)
        file = _SafetensorsFile({parameter: tensors[key] for parameter, tensors in snapshot.items() if key in tensors})
        files[name] = File(file.size, file.sha256())
        storage.write_from(storage.join(url, name), file.size, file.read)
    version = state.format_version
    state_bytes = record_bytes({"format_version": version, **asdict(state)})
    for name, content in ((STATE, state_bytes), (METRICS, metrics)):
        files[name] = File(len(content), hashlib.sha256(content).hexdigest())
        storage.write_bytes(storage.join(url, name), content)
    for name, sent in files.items():
        if (stored_bytes := storage.size(storage.join(url, name))) != sent.size:
            raise storage.StoreError(f"{url}/{name} has {stored_bytes} bytes in the store, but {sent.size} were sent")
    check()
    checkpoint = Checkpoint(url, files, state, clock())
    storage.write_json(storage.join(url, MANIFEST), asdict(Manifest(version, files, checkpoint.save_seconds)))
    return checkpoint
