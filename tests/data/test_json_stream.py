"""JSON is split into the same records for any content and any chunk size."""

import codecs
import io
import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.data import json_stream
from job.data.json_stream import ByteStream, elements, lines

TRICKY = st.text(st.sampled_from('"\\[]{},:\n\r\t aé的𝄞'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=8,
)
CHUNKS = st.integers(1, 40) | st.just(10**6)


def stream(data: bytes, chunk_bytes: int = 10**6) -> ByteStream:
    return ByteStream(io.BytesIO(data), None, chunk_bytes)


@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), CHUNKS)
def test_every_element_of_a_valid_array_is_found_at_its_offset(values, indent, ascii_only, chunk_bytes):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    found = list(elements(stream(data, chunk_bytes)))
    assert [json.loads(record.content) for record in found] == values
    assert [record.number for record in found] == list(range(1, len(values) + 1))
    assert all(record.fault is None and data[record.offset :].startswith(record.content) for record in found)


@given(st.lists(TRICKY | st.binary(max_size=6), max_size=8), CHUNKS)
@example([codecs.BOM_UTF8], 1)
@example([codecs.BOM_UTF8 + b"a", codecs.BOM_UTF8 + b"b"], 2)
def test_every_nonblank_line_is_found_at_its_offset(pieces, chunk_bytes):
    data = b"\n".join(piece if isinstance(piece, bytes) else json.dumps(piece).encode() for piece in pieces)
    expected, offset = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        content = line.removeprefix(codecs.BOM_UTF8)
        if content.strip(b" \t\r\n"):
            expected.append((offset, number, content))
        offset += len(line) + 1
    assert [tuple(record)[:3] for record in lines(stream(data, chunk_bytes))] == expected


FRAGMENTS = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"\n", b" ", b"7", b'{"text": "a"}', b"\xff", b"\n{"]),
    max_size=30,
).map(lambda fragments: b"[" + b"".join(fragments))


@settings(max_examples=500)
@given(FRAGMENTS, CHUNKS)
def test_faults_are_reported_the_same_for_any_chunk_size(data, chunk_bytes):
    whole = list(elements(stream(data)))
    assert list(elements(stream(data, chunk_bytes))) == whole
    offsets = [record.offset for record in whole]
    assert offsets == sorted(offsets)
    assert all(0 <= offset < len(data) for offset in offsets)
    assert all(data[record.offset :].startswith(record.content) for record in whole)
    try:
        is_valid = all(isinstance(value, dict) for value in json.loads(data))
    except ValueError:
        is_valid = False
    if not is_valid:
        assert any(record.fault or not _is_object(record.content) for record in whole)


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("reader", [elements, lines])
def test_record_without_an_end_is_not_kept_in_memory(reader, monkeypatch):
    monkeypatch.setattr(json_stream, "LONGEST_RECORD_BYTES", 10**5)
    start, end = (b"[", b"]") if reader is elements else (b"", b"")
    data = start + b'{"text": "' + b"a" * 10**7 + b'"},\n{"text": "b"}' + end
    tracemalloc.start()
    long, short = reader(stream(data, 10**4))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert long.content == b"" and long.fault == "the record does not end within 100,000 bytes"
    assert (short.content, short.fault) == (b'{"text": "b"}', None)
    assert peak_bytes < 2 * 10**6
