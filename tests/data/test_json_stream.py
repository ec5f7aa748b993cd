"""Records cut from JSON unparsed: what any bytes and any chunks of them must give."""

import codecs
import io
import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.data import json_stream as records
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
def test_every_element_of_a_sound_array_is_found_where_it_is(values, indent, ascii_only, chunk_bytes):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    found = list(elements(stream(data, chunk_bytes)))
    assert [json.loads(one.content) for one in found] == values
    assert [one.number for one in found] == list(range(1, len(values) + 1))
    assert all(one.fault is None and data[one.offset :].startswith(one.content) for one in found)


@given(st.lists(TRICKY | st.binary(max_size=6), max_size=8), CHUNKS)
@example([codecs.BOM_UTF8], 1)
@example([codecs.BOM_UTF8 + b"a", codecs.BOM_UTF8 + b"b"], 2)
def test_every_line_that_is_not_blank_is_found_where_it_is(pieces, chunk_bytes):
    data = b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in pieces)
    expected, offset = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        content = line.removeprefix(codecs.BOM_UTF8)
        if content.strip(b" \t\r\n"):
            expected.append((offset, number, content))
        offset += len(line) + 1
    assert [tuple(one)[:3] for one in lines(stream(data, chunk_bytes))] == expected


SHREDS = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"\n", b" ", b"7", b'{"text": "a"}', b"\xff", b"\n{"]),
    max_size=30,
).map(lambda shreds: b"[" + b"".join(shreds))


@settings(max_examples=500)
@given(SHREDS, CHUNKS)
def test_broken_bytes_are_always_told_of_and_read_the_same_in_any_chunks(data, chunk_bytes):
    whole = list(elements(stream(data)))
    assert list(elements(stream(data, chunk_bytes))) == whole
    offsets = [one.offset for one in whole]
    assert offsets == sorted(offsets)
    assert all(0 <= offset < len(data) for offset in offsets)
    assert all(data[one.offset :].startswith(one.content) for one in whole)
    try:
        sound = all(isinstance(one, dict) for one in json.loads(data))
    except ValueError:
        sound = False
    if not sound:
        assert any(one.fault or not _is_object(one.content) for one in whole)


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("reader", [elements, lines])
def test_a_record_without_an_end_is_not_kept_in_memory(reader, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_RECORD_BYTES", 10**5)
    start, end = (b"[", b"]") if reader is elements else (b"", b"")
    data = start + b'{"text": "' + b"a" * 10**7 + b'"},\n{"text": "b"}' + end
    tracemalloc.start()
    long, short = reader(stream(data, 10**4))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert long.content == b"" and long.fault == "no end within 100,000 bytes"
    assert (short.content, short.fault) == (b'{"text": "b"}', None)
    assert peak_bytes < 2 * 10**6
