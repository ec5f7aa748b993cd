"""The data set that the plan assumes, compared with the one that `prepare` makes of the same corpus."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small_run import DataSet

from job.config import Data, Tokenizer
from job.data.corpus import list_corpus
from job.data.listing import Listing
from job.demo.walk import SAMPLE
from job.preflight.assumed_data import AssumedData, assume_data, own_bytes_per_token
from job.preflight.findings import UNSURE, Findings

RECORDS = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
TEXT_BYTES = sum(len(record["text"].encode()) for record in RECORDS)
LINES = SAMPLE.read_bytes()


def parquet_of_sample(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path, compression="zstd", use_dictionary=False)


FORMS: dict[str, Callable[[Path], object]] = {
    "wiki.jsonl": lambda path: path.write_bytes(LINES),
    "escaped.jsonl": lambda path: path.write_text("\n".join(json.dumps(record) for record in RECORDS)),
    "array.json": lambda path: path.write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8"),
    "wiki.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "wiki.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "wiki.parquet": parquet_of_sample,
}


def assumed(source: Path, findings: Findings, tokenizer: str = "Qwen/Qwen2-0.5B", **data: object) -> AssumedData | None:
    listings: list[Listing] = []
    list_corpus(str(source), listings.append)
    settings = Data.model_validate({"source": str(source)} | data)
    return assume_data(findings, settings, Tokenizer(source=tokenizer, vocab_size=5000), listings[0])


def tokens_of(data: AssumedData | None) -> tuple[int, int]:
    """Return the tokens for training and for validation."""
    assert data is not None
    train, validation = data.manifest.train, data.manifest.validation
    return sum(shard.tokens for shard in train), sum(shard.tokens for shard in validation)


@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_about_those_that_prepare_makes(name: str, data_set: DataSet, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name)
    data = assumed(tmp_path / name, Findings(), str(data_set.tokenizer.folder))
    real = sum(shard.tokens for shard in data_set.manifest.train + data_set.manifest.validation)
    assert sum(tokens_of(data)) == pytest.approx(real, rel=0.03)
    assert data is not None and data.manifest.vocab_size == data_set.manifest.vocab_size
    assert f"as in its first {len(RECORDS)} documents" in data.assumptions[0]


def test_tokenizer_at_a_file_url_is_measured(data_set: DataSet) -> None:
    data = assumed(SAMPLE, Findings(), f"file://{data_set.tokenizer.folder}")
    assert data is not None and data.manifest.vocab_size == data_set.manifest.vocab_size


def test_start_of_a_large_file_stands_for_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "large.jsonl").write_bytes(20 * (LINES.rstrip() + b"\n"))
    assert (tmp_path / "large.jsonl").stat().st_size > 2 * 2**20
    data = assumed(tmp_path / "large.jsonl", Findings())
    assert sum(tokens_of(data)) == pytest.approx(20 * TEXT_BYTES / 4.5, rel=0.02)


def test_validation_has_its_share_of_the_tokens() -> None:
    train, validation = tokens_of(assumed(SAMPLE, Findings(), validation_fraction=0.25))
    assert validation / (train + validation) == pytest.approx(0.25, abs=0.001)
    assert tokens_of(assumed(SAMPLE, Findings(), validation_fraction=0))[1] == 0


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "bytes_per_token", "words"),
    [
        ("Qwen/Qwen2-0.5B", 151_646, 4.5, "4.5 bytes of text per token and 151,646 entries, as Qwen2"),
        ("data/tokenizer", 5000, 3.45, "3.45 bytes of text per token, as about 5,000 entries (tokenizer.vocab_size)"),
    ],
)
def test_unknown_tokenizer_is_assumed_and_named(
    tokenizer: str, vocab_size: int, bytes_per_token: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = assumed(SAMPLE, Findings(), tokenizer)
    assert data is not None and data.manifest.vocab_size == vocab_size
    assert sum(tokens_of(data)) == pytest.approx(TEXT_BYTES / bytes_per_token, rel=0.02)
    assert words in data.assumptions[1]


@pytest.mark.parametrize(
    ("entries", "bytes_per_token"),
    [(300, 2.29), (4096, 3.30), (5793, 3.55), (8192, 3.81), (16_384, 4.27), (10**6, 4.27)],
)
def test_bytes_per_token_grow_with_the_vocabulary(entries: int, bytes_per_token: float) -> None:
    assert own_bytes_per_token(entries) == pytest.approx(bytes_per_token, abs=0.01)


def test_plain_text_files_are_all_text(tmp_path: Path) -> None:
    text = "\n\n".join(record["text"] for record in RECORDS)
    (tmp_path / "wiki.txt").write_text(text, encoding="utf-8")
    data = assumed(tmp_path / "wiki.txt", Findings())
    assert sum(tokens_of(data)) == pytest.approx(len(text.encode()) / 4.5, rel=0.01)
    assert data is not None and data.assumptions[0] == "every byte of the corpus is text"


def test_corpus_without_the_text_field_has_no_plan() -> None:
    findings = Findings()
    assert assumed(SAMPLE, findings, text_field="content") is None
    (row,) = findings.rows
    assert (row.mark, row.name) == (UNSURE, "plan")
    assert "line 1, byte 0" in row.found and "content" in row.found and "text" in row.remedy


def test_empty_corpus_has_no_plan(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    findings = Findings()
    assert assumed(tmp_path / "empty.jsonl", findings) is None
    assert [row.found for row in findings.rows] == ["none: no text was found at the start of the corpus"]


@pytest.mark.parametrize("content", [gzip.compress(b"", mtime=0), b"<html>404 Not Found</html>"], ids=["empty", "HTML"])
def test_compressed_file_without_text_has_no_plan(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    findings = Findings()
    assert assumed(tmp_path / "a.jsonl.gz", findings) is None
    assert [row.name for row in findings.rows] == ["plan"]
