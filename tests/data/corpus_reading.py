"""Shared documents in every format, and functions that read a corpus file slice by slice."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from corpus_files import Fields, json_array, json_lines, parquet

from job import storage
from job.data.corpus import BadRecord, CorpusFile, Document, SliceEnd, SliceStart, list_corpus, read_slices

DOCUMENTS: list[Fields] = [
    {"id": str(number), "title": f"标题{number}", "text": f'第{number}段,\n"引号" {{[\\]}} 𝄞 ' * (number % 7)}
    for number in range(300)
]
EXPECTED = [Document(fields["id"], fields["text"]) for fields in DOCUMENTS]
ENDINGS = ["", ".gz", ".zst"]
BYTES_OF: dict[str, Callable[[Sequence[Fields]], bytes]] = {
    ".json": json_array,
    ".jsonl": json_lines,
    ".parquet": parquet,
}


def read(
    file: CorpusFile, slice_bytes: int = 2**20, wanted: Callable[[int], bool] = lambda index: True
) -> dict[int, list[Document | BadRecord]]:
    """Return the items of the wanted slices; check the order, the ends, and that the last slice is marked as such."""
    slices: dict[int, list[Document | BadRecord]] = {}
    asked: list[int] = []
    ends: list[tuple[int, bool]] = []

    def want(index: int) -> bool:
        asked.append(index)
        return wanted(index)

    for item in read_slices(file, slice_bytes, want, "text", "id"):
        match item:
            case SliceStart(index):
                assert len(ends) == len(slices), "a slice begins before the last one has ended"
                slices[index] = []
            case SliceEnd(index, is_last):
                assert list(slices)[-1] == index
                ends.append((index, is_last))
            case _:
                slices[list(slices)[-1]].append(item)
    assert asked == list(range(len(asked)))
    assert ends == [(index, index == asked[-1]) for index in asked if index in slices]
    assert list(slices) == [index for index in asked if wanted(index)]
    return slices


def read_all(file: CorpusFile) -> list[Document | BadRecord]:
    return [item for items in read(file).values() for item in items]


def corpus_file(folder: Path, name: str, data: bytes) -> CorpusFile:
    (folder / name).write_bytes(data)
    [file] = list_corpus(str(folder / name))
    return file


class CountedReader(io.BufferedReader):
    """A file that records at which offsets it was read, and how many bytes."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path))
        self.bytes_read = 0
        self.offsets: set[int] = set()

    def read(self, size: int | None = -1) -> bytes:
        self.offsets.add(self.tell())
        data = super().read(size)
        self.bytes_read += len(data)
        return data


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[CountedReader]:
    """Make `storage.open_read` return a `CountedReader`, and return the list of all that are opened."""
    opened: list[CountedReader] = []

    def open_read(path: str) -> CountedReader:
        opened.append(CountedReader(path))
        return opened[-1]

    monkeypatch.setattr(storage, "open_read", open_read)
    return opened
