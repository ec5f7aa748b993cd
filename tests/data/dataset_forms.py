"""The same records in every format that the `datasets` library reads, and functions that read them."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from corpus_files import compressed, json_lines, parquet

from job import storage
from job.data.corpus import BadRecord, CorpusFile, Document, SliceEnd, SliceStart, list_corpus, read_slices
from job.data.dataset_files import Choice
from job.data.manifest import load_manifest
from job.data.prepare import Recipe

KiB = 1024
RECORDS = [
    {"id": f"{number:03d}", "text": f'第{number}篇，“{"长江黄河" * (number % 9)}”\n"quoted", 第二行\t{number}'}
    for number in range(200)
]
SAMPLES = {f"{record['id']}.json": json.dumps(record).encode() for record in RECORDS}
"""The records as members of a WebDataset archive."""
README = b"""---
configs:
- config_name: zh
  data_files:
  - {split: train, path: zh/train-*.csv}
  - {split: test, path: zh/test.csv}
- config_name: lines
  data_files: lines.jsonl
---
"""


@dataclass(frozen=True)
class Form:
    """A format of the records, and the settings to read it."""

    source: str
    text_field: str = "text"
    id_field: str = "id"
    subset: str | None = None
    source_split: str | None = None
    text_documents: Any = None

    def files(self) -> list[CorpusFile]:
        return list_corpus(self.source, choice=Choice(self.subset, self.source_split, self.text_documents))

    def recipe(self, **changes: Any) -> Recipe:
        choice = Choice(self.subset, self.source_split, self.text_documents)
        values = {"on_bad_record": "stop", "slice_bytes": 4 * KiB} | changes
        return Recipe(
            self.source,
            self.text_field,
            self.id_field,
            values["on_bad_record"],
            values["slice_bytes"],
            0.2,
            1,
            choice,
        )


def csv_table(records: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return table.getvalue().encode()


def tar_archive(members: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def arrow_stream(records: list[dict[str, Any]]) -> bytes:
    table, content = pa.Table.from_pylist(records), io.BytesIO()
    with pa.ipc.new_stream(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return content.getvalue()


def put(folder: Path, **files: bytes) -> str:
    """Write files into a folder and return the folder's path."""
    for name, content in files.items():
        storage.write_bytes(str(folder / name), content)
    return str(folder)


def write_forms(top: Path) -> Path:
    """Write the records below a folder in every format, and return the folder."""
    import datasets

    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(top / "saved", num_shards=2)
    # The library must ignore a cache file of `map` and a file that is left over from another save.
    data.map(lambda row: {"text": "not of the corpus"}, cache_file_name=str(top / "saved" / "cache-1.arrow"))
    (top / "saved" / "data-00009-of-00010.arrow").write_bytes(b"left over")
    datasets.DatasetDict({"train": data, "test": data.select([1, 2])}).save_to_disk(top / "splits")
    with pa.OSFile(str(top / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, data.data.table.schema) as writer:
        writer.write_table(data.data.table)
    texts = {f"{record['id']}.txt": record["text"].encode() for record in RECORDS}
    files = {
        "lines.jsonl": json_lines(RECORDS),
        "table.parquet": parquet(RECORDS),
        "table.csv": csv_table([{"number": n if n < 100 else "x", **record} for n, record in enumerate(RECORDS)]),
        "table.csv.gz": compressed(csv_table(RECORDS), ".gz", 3),
        "table.csv.zst": compressed(csv_table(RECORDS), ".zst", 3),
        "marked.tsv": b"\xef\xbb\xbf" + csv_table(RECORDS, "\t"),
        "texts.tar": tar_archive(texts),
        "samples.tar": tar_archive(SAMPLES),
        "samples.tar.gz": compressed(tar_archive(SAMPLES), ".gz"),
        "[1] odd::name #1.csv": csv_table(RECORDS),
        "configured/README.md": README,
        "configured/zh/train-0.csv": csv_table(RECORDS[:90]),
        "configured/zh/train-1.csv": csv_table(RECORDS[90:]),
        "configured/zh/test.csv": csv_table(RECORDS[:2]),
        "configured/lines.jsonl": json_lines(RECORDS),
    }
    for name, content in files.items():
        storage.write_bytes(str(top / name), content)
    return top


FORMS: dict[str, Callable[[str], Form]] = {
    "csv": lambda top: Form(f"{top}/table.csv"),
    "gzip": lambda top: Form(f"{top}/table.csv.gz"),
    "zstd": lambda top: Form(f"{top}/table.csv.zst"),
    "tsv with a byte order mark": lambda top: Form(f"{top}/marked.tsv"),
    "tar of texts": lambda top: Form(f"{top}/texts.tar", "txt", "__key__"),
    "tar of JSON": lambda top: Form(f"{top}/samples.tar", "json.text", "json.id"),
    "tar, compressed": lambda top: Form(f"{top}/samples.tar.gz", "json.text", "json.id"),
    "saved": lambda top: Form(f"{top}/saved"),
    "saved, a split": lambda top: Form(f"{top}/splits", source_split="train"),
    "Arrow file": lambda top: Form(f"{top}/file.arrow"),
    "configuration": lambda top: Form(f"{top}/configured", subset="zh", source_split="train"),
    "configuration of JSON": lambda top: Form(f"{top}/configured", subset="lines"),
}


def read(
    files: list[CorpusFile],
    slice_bytes: int = 4 * KiB,
    wanted: Callable[[int], bool] = lambda index: True,
    text_field: str = "text",
    id_field: str = "id",
) -> tuple[list[Document], list[BadRecord]]:
    """Return the documents and the bad records of all wanted slices; check the order of the slices."""
    documents: list[Document] = []
    bad: list[BadRecord] = []
    for file in files:
        ends: list[bool] = []
        opened = -1
        for item in read_slices(file, slice_bytes, wanted, text_field, id_field):
            match item:
                case SliceStart(index=index):
                    assert wanted(index) and index > opened
                    opened = index
                case SliceEnd(index=index, is_last=is_last):
                    assert index == opened
                    ends.append(is_last)
                case Document():
                    documents.append(item)
                case BadRecord():
                    bad.append(item)
        assert not any(ends[:-1]), "a slice after the last one"
    return documents, bad


def read_form(form: Form, **changes: Any) -> list[Document]:
    """Return the documents of a form; check that there are no bad records."""
    documents, bad = read(form.files(), text_field=form.text_field, id_field=form.id_field, **changes)
    assert not bad
    return documents


def tokens(url: str) -> tuple[bytes, bytes, dict[str, int]]:
    """Return the tokens of all training shards and of all validation shards, and the statistics."""
    manifest = load_manifest(url)
    sizes = {"uint16": 2, "uint32": 4}
    splits = [
        b"".join(
            storage.read_bytes(storage.join(url, shard.name))[: shard.tokens * sizes[manifest.dtype]]
            for shard in shards
        )
        for shards in (manifest.train, manifest.validation)
    ]
    return splits[0], splits[1], dict(manifest.statistics)


NAME = "owner/wiki"
"""Name of the data set with configurations on the hub."""
DATA_SETS = {
    NAME: {
        "README.md": README,
        "zh/train-0.csv": csv_table(RECORDS[:90]),
        "zh/train-1.csv": csv_table(RECORDS[90:]),
        "zh/test.csv": csv_table(RECORDS[:2]),
        "lines.jsonl": json_lines(RECORDS),
    },
    "owner/texts": {"a.txt": "第一篇\n\n第二篇\n".encode(), "b.txt.gz": compressed("第三篇\n".encode(), ".gz")},
    "owner/gated": {},
}
