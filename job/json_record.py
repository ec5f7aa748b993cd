"""Reads and writes records as JSON. Writing removes secrets; reading checks the type of every field."""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, TypeVar, cast

import orjson
from pydantic import TypeAdapter, ValidationError

from job.errors import one_line
from job.redaction import redacted_tree

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Versioned:
    """The field of a stored file that says how to read the other fields."""

    format_version: int


def record_bytes(record: Any) -> bytes:
    """Return a dataclass or a dictionary as JSON, with the secrets in its texts removed."""
    values = record if isinstance(record, dict) else asdict(record)
    return orjson.dumps(redacted_tree(values), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def parse_record(content: bytes | bytearray, kind: type[Record]) -> Record:
    """Parse JSON as an instance of the dataclass `kind`, and check the type of every field.

    Keys that `kind` does not have are ignored, because a newer version of the program may have written them.

    Raises:
        ValueError: the JSON is invalid or nested too deeply, or a field is missing or of the wrong type. The message is
            one line that names the field.
    """
    try:
        record_type: TypeAdapter[Record] = _record_type(cast(Any, kind))
        return record_type.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(one_line(f"{f'{name}: ' if name else ''}{first['msg']}")) from None


@cache
def _record_type(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
