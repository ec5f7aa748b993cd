"""The format and compression of a corpus file, as its name tells them."""

import re
from typing import Literal

from job import storage
from job.data.json_stream import COMPRESSIONS, Compression

Format = Literal["json", "parquet", "library"]
"""``json`` is JSON or JSON lines; ``library`` is every format that the `datasets` library reads."""
Form = tuple[Format, Compression | None]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
COMPRESSION_SUFFIXES = tuple(f".{suffix}" for suffix in COMPRESSIONS)
LIBRARY_KINDS = ("txt", "csv", "tsv", "arrow", "tar")
"""Suffixes, without the dot, of the files that the `datasets` library reads."""
LIBRARY_SUFFIXES_TEXT = f"{', '.join(f'.{kind}' for kind in LIBRARY_KINDS[:-1])} or .{LIBRARY_KINDS[-1]}"
"""The same suffixes as part of a message."""


def _any_of(suffixes: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, suffixes))


_OWN_FORM = re.compile(
    rf"(?:(?:{_any_of(JSON_SUFFIXES)})(?:{_any_of(COMPRESSION_SUFFIXES)})?|({re.escape(PARQUET_SUFFIX)}))$",
    re.IGNORECASE,
)
_LIBRARY_FORM = re.compile(rf"\.({_any_of(LIBRARY_KINDS)})(?:{_any_of(COMPRESSION_SUFFIXES)})?$", re.IGNORECASE)


def compression_by_name(url: str) -> Compression | None:
    """Return the compression that the name of a file tells; None if it tells none."""
    stem, _, suffix = _name(url).rpartition(".")
    return COMPRESSIONS.get(suffix.lower()) if stem else None


def form_by_name(url: str) -> Form | None:
    """Return format and compression if the name says JSON, JSON lines or Parquet, else None."""
    match = _OWN_FORM.search(_name(url))
    if match is None:
        return None
    return ("parquet", None) if match[1] else ("json", compression_by_name(url))


def library_kind(url: str) -> str:
    """Return which of `LIBRARY_KINDS` the name of a file tells, in lower case; "" if none.

    Files whose names start with ``.`` do not count, nor do the ``cache-….arrow`` files that `datasets.map` leaves
    beside a saved data set.
    """
    name = _name(url)
    match = _LIBRARY_FORM.search(name)
    is_cache = name.startswith("cache-") and name.endswith(".arrow")
    return match[1].lower() if match and not name.startswith(".") and not is_cache else ""


def without_suffixes(name: str) -> str:
    """Return `name` without the suffixes of compression and of JSON or Parquet."""
    for suffixes in (COMPRESSION_SUFFIXES, (*JSON_SUFFIXES, PARQUET_SUFFIX)):
        name = next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)
    return name


def _name(url: str) -> str:
    return storage.url_path(url).rpartition("/")[2]
