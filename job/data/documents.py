"""Make documents of records: take the text and the id, and check only these two fields.

A record stays usable if another field of it is invalid (NaN, half a surrogate pair, a byte that is not UTF-8). An id
may be any scalar and is kept as it is written in the file: ``7``, ``1.50`` and ``1e3`` become "7", "1.50" and "1e3".
A null id counts as no id. A boolean, NaN and Infinity are refused as ids.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from job.data.json_stream import Record

CONVERT_GBK = "if it is in GBK, convert it: iconv -f gb18030 -t utf-8"
"""Remedy in errors about a file that is not UTF-8."""
_MAX_SHOWN_FIELDS = 8
_TEXT_FIELDS = ("text", "content", "raw_content", "正文", "内容", "文本", "body", "article", "document", "passage")
"""Names under which corpora usually keep their text, the most common first."""


@dataclass(frozen=True)
class Document:
    """A text, and its id if it has one."""

    id: str | None
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot become a document, or a fault between two records."""

    url: str
    position: str
    """Position of the record: ``line 17, byte 2,031``, ``record 12, byte 9,001``, ``byte 9,001`` or ``row 12``.

    Bytes are offsets in the decompressed file, counted from 0. Lines, records and rows are counted from 1."""
    reason: str
    setting: str = "data.source"
    """The setting that is probably wrong: `data.source`, `data.text_field` or `data.id_field`."""
    remedy: str = ""
    """Remedy, if it is another one than to repair or skip the record."""
    likely_field: str | None = None
    """The field that probably holds the text if the record has no `data.text_field`; None if no field does."""


class RecordError(ValueError):
    """A record that cannot become a document; the arguments are the `BadRecord` fields of the same names."""

    def __init__(
        self, reason: str, setting: str = "data.source", remedy: str = "", likely_field: str | None = None
    ) -> None:
        super().__init__(reason)
        self.setting, self.remedy, self.likely_field = setting, remedy, likely_field

    def at(self, url: str, position: str) -> BadRecord:
        """Return the `BadRecord` for this error at a position in a file."""
        return BadRecord(url, position, str(self), self.setting, self.remedy, self.likely_field)


def document_from_json(record: Record, text_field: str, id_field: str) -> Document:
    """Return the document in a record of JSON. Raises RecordError if there is none."""
    if record.fault:
        raise RecordError(record.fault)
    try:
        value = orjson.loads(record.content)
    except orjson.JSONDecodeError as error:
        return _document_from_invalid_json(record.content, error, text_field, id_field)
    if type(value) is dict and type(text := value.get(text_field)) is str:
        document_id = value.get(id_field)
        if type(document_id) is str or document_id is None:
            return Document(document_id, text)
        if type(document_id) is int and document_id != 0:
            return Document(str(document_id), text)
        if type(document_id) in (int, float):
            # orjson does not keep -0, 1.50 or all digits of a long integer, so the number is read again as text.
            return document_from_fields(_parsed(record.content.decode()), text_field, id_field)
    return document_from_fields(value, text_field, id_field)


def document_from_fields(record: Any, text_field: str, id_field: str) -> Document:
    """Return the document in a parsed record. Raises RecordError if there is none."""
    if not isinstance(record, dict):
        raise RecordError(f"{_type_name(record)}, expected an object")
    if text_field not in record:
        lengths = {name: len(value) for name, value in record.items() if isinstance(value, str) and name != id_field}
        raise missing_text_field(text_field, list(record), likely_text_field(lengths))
    text, document_id = record[text_field], record.get(id_field)
    if not isinstance(text, str):
        raise RecordError(f"{text_field!r} is {_type_name(text)}, expected a string")
    if isinstance(document_id, _Number):
        document_id = document_id.text
        if math.isnan(float(document_id)) or document_id.endswith("Infinity"):
            raise _invalid_id(id_field, document_id)
    elif isinstance(document_id, int) and not isinstance(document_id, bool):
        document_id = str(document_id)
    elif document_id is not None and not isinstance(document_id, str):
        raise _invalid_id(id_field, repr(document_id) if isinstance(document_id, float) else _type_name(document_id))
    return Document(document_id, text)


def missing_text_field(text_field: str, fields: list[str], likely: str | None) -> RecordError:
    """Return the error for records without a text field.

    Args:
        text_field: the field that was expected.
        fields: the fields that the record has.
        likely: the field that probably holds the text; None if no field does.
    """
    shown = ", ".join(map(repr, fields[:_MAX_SHOWN_FIELDS]))
    more = f" and {len(fields) - _MAX_SHOWN_FIELDS} more" if len(fields) > _MAX_SHOWN_FIELDS else ""
    reason = f"no field {text_field!r}, {f'only {shown}{more}' if fields else 'the record is empty'}"
    if likely is None:
        return RecordError(reason, "data.text_field")
    remedy = (
        f"set data.text_field to {likely} if that is the text; otherwise fix the record, "
        "or set data.on_bad_record to skip"
    )
    return RecordError(reason, "data.text_field", remedy, likely)


def likely_text_field(sizes: Mapping[str, int]) -> str | None:
    """Return the field that probably holds the text: one with a usual name, else the longest; None if all are empty.

    Args:
        sizes: length of each field that holds a string.
    """
    by_lower_case = {name.casefold(): name for name in reversed(list(sizes)) if sizes[name]}
    usual = next((by_lower_case[name] for name in _TEXT_FIELDS if name in by_lower_case), None)
    return usual or max((name for name in sizes if sizes[name]), key=sizes.__getitem__, default=None)


def _invalid_id(id_field: str, value: str) -> RecordError:
    remedy = "set data.id_field to another field, fix the record, or set data.on_bad_record to skip"
    return RecordError(f"{id_field!r} is {value}, expected a string or a finite number", "data.id_field", remedy)


# ---- JSON that orjson refuses ----


@dataclass(frozen=True, slots=True)
class _Number:
    """A number as it is written in the file."""

    text: str


_CONTROL = re.compile(r"[\0-\x1f]")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SURROGATES = 0xDC00
"""First of the characters that mark a byte which JSON or UTF-8 does not allow; valid text never contains them."""


def _document_from_invalid_json(
    content: bytes, error: orjson.JSONDecodeError, text_field: str, id_field: str
) -> Document:
    """Return the document in a record of invalid JSON, provided that the fault is in another field."""
    try:
        value = json_value(content)
    except RecordError:
        raise _encoding_error(content) or RecordError(
            f"invalid JSON: {error.msg} at character {error.pos + 1:,} of the record"
        ) from None
    document = document_from_fields(value, text_field, id_field)
    for text in (document.text, document.id or ""):
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise _encoding_error(content) or RecordError(_character_fault(text[fault.start])) from None
    return document


def json_value(content: bytes) -> Any:
    """Parse JSON that may hold invalid strings: each invalid byte becomes a surrogate, each number a `_Number`.

    Raises:
        RecordError: the content is not JSON even so.
    """
    text = content.decode(errors="surrogateescape")
    if _CONTROL.search(text):
        text = _STRING.sub(lambda string: _CONTROL.sub(_mark_control, string[0]), text)
    return _parsed(text)


def _parsed(text: str) -> Any:
    """Parse JSON; each number, NaN and Infinity becomes a `_Number`, which keeps its text."""
    try:
        return json.loads(text, parse_float=_Number, parse_int=_Number, parse_constant=_Number)
    except RecursionError:
        raise RecordError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"invalid JSON: {error}") from None


def _mark_control(control: re.Match[str]) -> str:
    return chr(_SURROGATES + ord(control[0]))


def _encoding_error(content: bytes) -> RecordError | None:
    """Return the error for content that is not UTF-8; None if it is UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        remedy = f"{CONVERT_GBK}; otherwise set data.on_bad_record to skip"
        return RecordError(f"invalid UTF-8 at byte {error.start:,} of the record", remedy=remedy)
    return None


def _character_fault(character: str) -> str:
    code = ord(character) - _SURROGATES
    if 0 <= code < 0x20:
        return f"invalid JSON: the control character \\x{code:02x} in a string is not escaped"
    return f"a lone surrogate, \\u{ord(character):x}, which is not a character and cannot be written as UTF-8"


def _type_name(value: object) -> str:
    return next((name for types, name in _TYPE_NAMES if isinstance(value, types)), type(value).__name__)


_TYPE_NAMES: list[tuple[type | tuple[type, ...], str]] = [
    (type(None), "null"),
    (bool, "a boolean"),
    ((int, float, _Number), "a number"),
    (str, "a string"),
    (bytes, "invalid UTF-8"),
    (list, "an array"),
    (dict, "an object"),
]
