"""Records as JSON: written without secrets; read with every field's type checked, as a stored file may be damaged."""

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
    """The part of a stored file that decides how the rest of it is read."""

    format_version: int


def record_bytes(record: Any) -> bytes:
    """Return a dataclass or a dictionary as JSON, without the secrets that its texts may hold."""
    values = record if isinstance(record, dict) else asdict(record)
    return orjson.dumps(redacted_tree(values), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def parse_record(content: bytes | bytearray, kind: type[Record]) -> Record:
    """Read JSON as an instance of the dataclass `kind`, with every field's type checked.

    Keys that `kind` does not have are ignored: a newer version of the program may have written them.

    Raises:
        ValueError: it is damaged, nested too deeply, or a field is missing or of another type; one line says where.
    """
    try:
        record_type: TypeAdapter[Record] = _record_type(cast(Any, kind))
        return record_type.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(one_line(f"{f'{place}: ' if place else ''}{first['msg']}")) from None


@cache
def _record_type(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
