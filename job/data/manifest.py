"""The format of a prepared data set: the shard files, byte by byte, and the manifest that lists them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from job import storage
from job.errors import UserError
from job.invocation import command
from job.json_record import Versioned, parse_record

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

TokenType = Literal["uint16", "uint32"]
Count = Annotated[int, Field(ge=0, lt=2**48)]
"""A count in a manifest. The limit is below that of any array: a larger number cannot be a real count."""


def _checked_path(path: str) -> str:
    """Return `path`; raise a ValueError if it could lead out of the data set's folder, or of a cache's."""
    if "\\" in path or not path.isprintable() or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("expected a path below the data set's folder")
    return path


RelativePath = Annotated[str, AfterValidator(_checked_path)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of whole documents, each closed by the end-of-document token."""

    name: RelativePath
    """Path of the file relative to the manifest's folder."""
    tokens: Count
    """Tokens in the file, end-of-document tokens included."""
    documents: Count
    utf8_bytes: Count
    """Bytes of the documents' text in UTF-8: the denominator of bits per byte."""
    characters: Count
    """Unicode code points of the documents' text."""
    size: Count
    """Bytes of the file, always `shard_size(tokens, documents, dtype)`."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The description of a data set. It is written after all of its shards: if it exists, the data set is complete."""

    format_version: int = FORMAT_VERSION
    fingerprint: str
    """Identity of the data set: a sha256 over its tokenizer and the sha256 of every shard, in order."""
    plan: str | None = None
    """Digest of the plan.json that the data set was made by; None in a data set of an earlier version."""
    tokenizer_fingerprint: str
    tokenizer: RelativePath = "tokenizer"
    """Folder of the tokenizer, relative to the manifest's folder."""
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    dtype: TokenType
    """Type of the stored tokens."""
    eod_id: Count
    """Id of the end-of-document token."""
    seed: int
    validation_fraction: Annotated[float, Field(ge=0, le=1)]
    split_rule: str
    """Rule that chose the validation documents, in words (see `job.data.split`)."""
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    statistics: dict[str, Any]
    """Counts of `prepare` (see `job.data.parts.Counts`)."""


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return `manifest` as JSON; equal manifests give equal bytes."""
    return orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def load_manifest(shards_url: str) -> Manifest:
    """Read the manifest of the data set at `shards_url`.

    Raises:
        UserError: the manifest is missing or damaged, contradicts itself, or is of another program or a newer version.
    """
    prepare = f"run `{command('prepare')}` first"
    try:
        content = storage.read_bytes(storage.join(shards_url, MANIFEST_NAME))
    except FileNotFoundError:
        expected = f"there is no {MANIFEST_NAME}, so no finished data set"
        raise UserError("data.shards", shards_url, expected, prepare) from None
    except storage.IntegrityError as error:
        raise _damaged(shards_url, f"is damaged: {error}") from None
    try:
        version = parse_record(content, Versioned).format_version
    except ValueError as error:
        raise _damaged(shards_url, f"is damaged, or was not written by this program: {error}") from None
    if version != FORMAT_VERSION:
        expected = f"the data set has format version {version!r}, this program reads {FORMAT_VERSION}"
        raise UserError("data.shards", shards_url, expected, "use the version of the program that prepared it")
    try:
        manifest = parse_record(content, Manifest)
    except ValueError as error:
        raise _damaged(shards_url, f"is damaged at {error}") from None
    for shard in manifest.train + manifest.validation:
        if shard.size != (size := shard_size(shard.tokens, shard.documents, manifest.dtype)):
            raise _damaged(shards_url, f"is damaged: {shard.name} has {shard.size} bytes, but its tokens need {size}")
    if manifest.vocab_size - 1 > np.iinfo(manifest.dtype).max or manifest.eod_id >= manifest.vocab_size:
        raise _damaged(shards_url, f"is damaged: eod_id, vocab_size and {manifest.dtype} contradict each other")
    return manifest


def _damaged(shards_url: str, problem: str) -> UserError:
    remedy = f"restore the right file, or delete it and run `{command('prepare')}`: it keeps the finished slices"
    return UserError("data.shards", shards_url, f"its {MANIFEST_NAME} {problem}", remedy)


# ---- The shard file: tokens, zeros up to a multiple of 8 bytes, then the end of each document ----


def shard_size(tokens: int, documents: int, dtype: TokenType) -> int:
    """Return the size of a shard file in bytes."""
    return _ends_offset(tokens, dtype) + 8 * documents


class ShardBuilder:
    """The content of a shard file in memory, to which whole documents are added.

    It takes little more memory than the file, because a shard may be large.

    Args:
        dtype: type of the stored tokens; they are stored little-endian.
    """

    def __init__(self, dtype: TokenType) -> None:
        self._stored = np.dtype(dtype).newbyteorder("<")
        self._content = bytearray()
        self._lengths: list[NDArray[np.integer]] = []
        self.tokens = self.documents = 0

    def add(self, tokens: NDArray[np.unsignedinteger], lengths: NDArray[np.integer]) -> None:
        """Add documents.

        Args:
            tokens: the tokens of the documents, each closed by its end-of-document token (`[tokens]`).
            lengths: tokens of each document, its end-of-document token included (`[documents]`).
        """
        self._content += np.ascontiguousarray(tokens, self._stored).data.cast("B")
        self._lengths.append(lengths)
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def finish(self) -> bytearray:
        """Return the content of the file, and release it here.

        The ends of the documents are stored as uint64: document d is `tokens[ends[d - 1] : ends[d]]`.
        """
        ends = np.cumsum(np.concatenate([np.empty(0, np.int64), *self._lengths]), dtype="<u8")
        content, self._content = self._content, bytearray()
        content += bytes(-len(content) % 8)
        content += ends.data.cast("B")
        return content


def open_shard(
    path: str | Path, shard: Shard, dtype: TokenType
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint64]]:
    """Verify the shard file at `path` and map it into memory, read-only.

    Returns:
        The tokens (`[tokens]`) and the ends of the documents (`[documents]`).

    Raises:
        UserError: the file does not have the size or the sha256 of the manifest.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.size:
            expected = f"it has {size} bytes, the manifest says {shard.size}"
            raise UserError("data.shards", str(path), expected, "delete it and prepare again")
        content = np.memmap(file, np.uint8, mode="r") if shard.size else np.empty(0, np.uint8)
    if (sha256 := hashlib.sha256(content.data).hexdigest()) != shard.sha256:
        expected = f"its sha256 is {sha256}, the manifest says {shard.sha256}"
        raise UserError("data.shards", str(path), expected, "delete it and prepare again")
    stored = np.dtype(dtype).newbyteorder("<")
    tokens = content[: shard.tokens * stored.itemsize].view(stored)
    ends = content[_ends_offset(shard.tokens, dtype) :].view("<u8")
    return tokens, ends


def _ends_offset(tokens: int, dtype: TokenType) -> int:
    return -(-tokens * np.dtype(dtype).itemsize // 8) * 8
