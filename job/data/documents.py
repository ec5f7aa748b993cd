"""Documents out of records: of a record's fields only the two that were asked for are judged.

JSON that another field makes invalid (NaN, half a surrogate pair, a byte that is no UTF-8) costs no document. An id may
be any scalar and is the text that stands in the file: ``7``, ``1.50`` and ``1e3`` are "7", "1.50" and "1e3". Null is no
id; a boolean, NaN and Infinity name no document and are refused.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from job.data.json_stream import Record

_SHOWN_FIELDS = 8
_TEXT_FIELDS = ("text", "content", "raw_content", "正文", "内容", "文本", "body", "article", "document", "passage")
"""Names under which corpora keep their text, the most common ones first."""


@dataclass(frozen=True)
class Document:
    """A text and the name it goes by, if it has one."""

    id: str | None
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document, or a fault between records."""

    url: str
    position: str
    """``line 17, byte 2,031``, ``record 12, byte 9,001``, ``byte 9,001`` or ``row 12``: bytes are offsets in the
    decompressed file, counted from 0; lines, records and rows are counted from 1."""
    reason: str
    setting: str = "data.source"
    """The setting that is probably wrong: it may also be `data.text_field` or `data.id_field`."""
    remedy: str = ""
    """What to do, where it is something else than to mend the record or to leave it out."""


class Unfit(ValueError):
    """Why a record is no document; takes the fields of `BadRecord` of the same names."""

    def __init__(self, reason: str, setting: str = "data.source", remedy: str = "") -> None:
        super().__init__(reason)
        self.setting, self.remedy = setting, remedy

    def at(self, url: str, position: str) -> BadRecord:
        """The record that is reported."""
        return BadRecord(url, position, str(self), self.setting, self.remedy)


def json_document(record: Record, text_field: str, id_field: str) -> Document:
    """The document in a record of JSON. Raises Unfit if there is none."""
    if record.fault:
        raise Unfit(record.fault)
    try:
        value = orjson.loads(record.content)
    except orjson.JSONDecodeError as error:
        return _tolerated(record.content, error, text_field, id_field)
    if type(value) is dict and type(text := value.get(text_field)) is str:
        name = value.get(id_field)
        if type(name) is str or name is None:
            return Document(name, text)
        if type(name) is int and name != 0:
            return Document(str(name), text)
        if type(name) in (int, float):  # orjson keeps neither -0 nor 1.50 nor the digits of a long integer
            return document(_parsed(record.content.decode()), text_field, id_field)
    return document(value, text_field, id_field)


def document(record: Any, text_field: str, id_field: str) -> Document:
    """The document in a record. Raises Unfit if there is none."""
    if not isinstance(record, dict):
        raise Unfit(f"{_kind(record)} and not an object")
    if text_field not in record:
        likely = likely_text_field({name: len(value) for name, value in _strings(record) if name != id_field})
        raise no_text_field(text_field, list(record), likely)
    text, name = record[text_field], record.get(id_field)
    if not isinstance(text, str):
        raise Unfit(f"{text_field!r} is {_kind(text)} and not a string")
    if isinstance(name, _Number):
        name = name.text
        if math.isnan(float(name)) or name.endswith("Infinity"):
            raise _unfit_id(id_field, name)
    elif isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    elif name is not None and not isinstance(name, str):
        raise _unfit_id(id_field, repr(name) if isinstance(name, float) else _kind(name))
    return Document(name, text)


def no_text_field(text_field: str, fields: list[str], likely: str | None) -> Unfit:
    """The error for records without the field of the text; `likely` is the field that probably holds it."""
    shown = ", ".join(map(repr, fields[:_SHOWN_FIELDS])) or "nothing"
    more = f" and {len(fields) - _SHOWN_FIELDS} more" if len(fields) > _SHOWN_FIELDS else ""
    reason = f"no {text_field!r}, only {shown}{more}"
    if likely is None:
        return Unfit(reason, "data.text_field")
    remedy = f"set data.text_field to {likely} if that is the text; else mend it, or set data.on_bad_record to skip"
    return Unfit(reason, "data.text_field", remedy)


def likely_text_field(sizes: Mapping[str, int]) -> str | None:
    """The field that probably holds the text: one with a usual name, else the longest one.

    Args:
        sizes: length of each field that holds a string.
    """
    usual = {name.casefold(): name for name in reversed(list(sizes)) if sizes[name]}
    found = next((usual[name] for name in _TEXT_FIELDS if name in usual), None)
    return found or max((name for name in sizes if sizes[name]), key=sizes.__getitem__, default=None)


def _strings(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in record.items() if isinstance(value, str)]


def _unfit_id(id_field: str, what: str) -> Unfit:
    remedy = "name another field in data.id_field, or mend it, or set data.on_bad_record to skip"
    return Unfit(f"{id_field!r} is {what}, which names no document", "data.id_field", remedy)


# ---- JSON that orjson refuses ----


@dataclass(frozen=True, slots=True)
class _Number:
    """A number as it stands in the file."""

    text: str


_CONTROL = re.compile(r"[\0-\x1f]")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SURROGATES = 0xDC00
"""Characters from here on stand for bytes in a string that JSON or UTF-8 does not allow; no sound text has them."""


def _tolerated(content: bytes, error: orjson.JSONDecodeError, text_field: str, id_field: str) -> Document:
    """The document in a record that is no JSON, if what is wrong with it is in another field."""
    try:
        value = json_value(content)
    except Unfit:
        raise _encoding_fault(content) or Unfit(
            f"broken JSON: {error.msg} at its character {error.pos + 1:,}"
        ) from None
    found = document(value, text_field, id_field)
    for one in (found.text, found.id or ""):
        try:
            one.encode()
        except UnicodeEncodeError as fault:
            raise _encoding_fault(content) or Unfit(_character_fault(one[fault.start])) from None
    return found


def json_value(content: bytes) -> Any:
    """The value of JSON, with `_Number` for numbers; what strings may not hold is surrogates in it. Raises Unfit."""
    spelled = content.decode(errors="surrogateescape")
    if _CONTROL.search(spelled):
        spelled = _STRING.sub(lambda string: _CONTROL.sub(_marked, string[0]), spelled)
    return _parsed(spelled)


def _parsed(spelled: str) -> Any:
    """The value that stands in a string of JSON, numbers and what is no number as `_Number`."""
    try:
        return json.loads(spelled, parse_float=_Number, parse_int=_Number, parse_constant=_Number)
    except RecursionError:
        raise Unfit("nested too deeply") from None
    except ValueError as error:
        raise Unfit(f"broken JSON: {error}") from None


def _marked(control: re.Match[str]) -> str:
    return chr(_SURROGATES + ord(control[0]))


def _encoding_fault(content: bytes) -> Unfit | None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        remedy = "convert the file (iconv -f gb18030 -t utf-8, if it is in GBK), or set data.on_bad_record to skip"
        return Unfit(f"invalid UTF-8 at its byte {error.start:,}", remedy=remedy)
    return None


def _character_fault(character: str) -> str:
    code = ord(character) - _SURROGATES
    if 0 <= code < 0x20:
        return f"broken JSON: the control character \\x{code:02x} in a string is not escaped"
    return f"a lone surrogate, \\u{ord(character):x}, which is no character and has no UTF-8"


def _kind(value: object) -> str:
    return next((words for kinds, words in _KINDS if isinstance(value, kinds)), type(value).__name__)


_KINDS: list[tuple[type | tuple[type, ...], str]] = [
    (type(None), "null"),
    (bool, "a boolean"),
    ((int, float, _Number), "a number"),
    (str, "a string"),
    (bytes, "invalid UTF-8"),
    (list, "an array"),
    (dict, "an object"),
]
