"""The sample that a tokenizer is trained on: chosen by hash from the whole training split, the same in any order."""

import random
import tracemalloc
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
from corpus_files import json_array, json_lines, parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from preparation import recipe

from job.data.corpus import BadRecord
from job.data.split import is_validation
from job.data.text_sample import TextSample, sample_corpus
from job.errors import UserError

RECORDS = [{"id": str(number), "text": f"第{number:04}篇文章，讲的是数字{number * 7919}。"} for number in range(2000)]
TEXTS = [record["text"] for record in RECORDS]
TOTAL_BYTES = sum(len(text.encode()) for text in TEXTS)


def sample_of(texts: Sequence[str], limit_bytes: int, seed: int = 1) -> list[str]:
    sample = TextSample(limit_bytes, seed)
    for text in texts:
        sample.add(text)
    chosen = list(sample.texts())
    assert sample.size - 3 <= sum(len(text.encode()) for text in chosen) <= sample.size <= limit_bytes
    return chosen


def hash_of(text: str, seed: int = 1) -> int:
    key = seed.to_bytes(8, "little")
    return int.from_bytes(
        blake2b(text.encode(), digest_size=16, key=key, person=b"tokenizer sample").digest(), "little"
    )


# ---- Which texts ----


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["", "a", "文", "文章", "abc", "x" * 50]) | st.text(max_size=20), max_size=30),
    limit_bytes=st.integers(1, 150),
    order=st.randoms(use_true_random=False),
)
def test_sample_is_the_smallest_hashes_up_to_the_limit(
    texts: list[str], limit_bytes: int, order: random.Random
) -> None:
    expected, left = [], limit_bytes
    for text in sorted(set(texts) - {""}, key=hash_of):
        if left > 0:
            expected.append(text.encode()[:left].decode(errors="ignore"))
            left -= len(text.encode())
    assert sample_of(texts, limit_bytes) == expected
    order.shuffle(texts)
    assert sample_of(texts, limit_bytes) == expected


def test_sample_comes_from_everywhere_in_the_corpus() -> None:
    chosen = set(sample_of(TEXTS, TOTAL_BYTES // 10))
    counts = [sum(text in chosen for text in TEXTS[start : start + 200]) for start in range(0, 2000, 200)]
    assert all(5 <= count <= 40 for count in counts)  # 20 are expected of each tenth.


def test_another_seed_gives_another_sample() -> None:
    assert set(sample_of(TEXTS, TOTAL_BYTES // 10, 1)) != set(sample_of(TEXTS, TOTAL_BYTES // 10, 2))


def test_sample_is_independent_of_the_validation_split() -> None:
    """With the split's own hash, the sample would be the documents just above the fraction, and no others."""
    training = [text for text in TEXTS if not is_validation(None, text, 1, 0.5)]
    chosen = sample_of(training, TOTAL_BYTES // 10)
    assert 0 < sum(is_validation(None, text, 1, 0.6) for text in chosen) < len(chosen) / 2


# ---- Sizes ----


def test_corpus_smaller_than_the_limit_is_taken_whole() -> None:
    assert sorted(sample_of(TEXTS, TOTAL_BYTES)) == sorted(TEXTS) == sorted(sample_of(TEXTS, 10 * TOTAL_BYTES))


def test_document_larger_than_the_limit_is_cut_at_a_character() -> None:
    assert sample_of(["文" * 1000], 100) == ["文" * 33]


def test_equal_texts_are_taken_once() -> None:
    sample = TextSample(10**6, 1)
    for text in [*TEXTS[:10], *TEXTS[:10], ""]:
        sample.add(text)
    assert sorted(sample.texts()) == TEXTS[:10]
    assert (len(sample), sample.documents, sample.utf8_bytes) == (10, 20, 2 * sample.size)


def test_memory_stays_below_twice_the_limit() -> None:
    tracemalloc.start()
    sample = TextSample(10**6, 1)
    for number in range(1000):
        sample.add(f"{number:<100000}"[: 100 if number % 2 else 100_000])  # 50 MB in all.
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample.size == 10**6
    assert peak_bytes < 2 * 10**6


def test_document_larger_than_the_limit_is_not_kept_whole() -> None:
    text = "文" * 10**7
    tracemalloc.start()
    sample = TextSample(10**6, 1)
    sample.add(text)
    kept_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sample.size == 10**6
    assert kept_bytes < 2 * 10**6


# ---- A corpus ----


def test_files_formats_and_slices_do_not_change_the_sample(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(json_lines(RECORDS))
    several = tmp_path / "several"
    several.mkdir()
    (several / "1.parquet").write_bytes(parquet(RECORDS[1500:][::-1]))
    (several / "2.json").write_bytes(json_array(RECORDS[700:1500]))
    (several / "3.jsonl").write_bytes(json_lines(RECORDS[:700]))
    samples = []
    for source, slice_bytes in ((tmp_path / "one.jsonl", 2**20), (several, 2**12)):
        both = sample_corpus(recipe(str(source), slice_bytes=slice_bytes), 20_000, 1000)
        samples.append([list(sample.texts()) for sample in both])
    assert samples[0] == samples[1]
    train, validation = samples[0]
    assert train and validation


def test_sample_has_no_validation_document(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(json_lines(RECORDS))
    read: list[tuple[int, int]] = []
    settings = recipe(str(tmp_path / "one.jsonl"), validation_fraction=0.3)
    both = sample_corpus(settings, 10**9, 10**9, lambda *done: read.append(done))
    train, validation = (set(sample.texts()) for sample in both)
    expected = {record["text"] for record in RECORDS if is_validation(record["id"], record["text"], 2333, 0.3)}
    assert (validation, train) == (expected, set(TEXTS) - expected)
    assert read[-1] == (len(RECORDS), TOTAL_BYTES)


def test_bad_record_stops_reading_or_is_reported(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(json_lines(RECORDS[:100]) + b'{"id": "x"}\n' + json_lines(RECORDS[100:200]))
    with pytest.raises(UserError, match=r"data\.text_field: 'text': .*bad record at line 101"):
        sample_corpus(recipe(str(tmp_path / "one.jsonl")), 10**6, 10**6)
    bad: list[BadRecord] = []
    tolerant = recipe(str(tmp_path / "one.jsonl"), on_bad_record="skip")
    both = sample_corpus(tolerant, 10**6, 10**6, on_bad_record=bad.append)
    assert sum(map(len, both)) == 200
    assert [record.position.split(",")[0] for record in bad] == ["line 101"]
