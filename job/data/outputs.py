"""Recognize what this program has written below a corpus: data sets, runs, checkpoints, models and tokenizers.

These are not part of the corpus. A folder is such an output if it holds its record (`plan.json`, `run.json`, …) with
the expected content, whether the output is finished or not. In such a folder only the files that this program writes
are left out; a corpus beside them is still read.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson

from job.data.tokenizer_files import TOKENIZER_FILES

Read = Callable[[str], bytes | None]
"""Returns the content of a file by its name below the corpus; None if there is no such file."""


@dataclass(frozen=True)
class _Kind:
    """A kind of output: a data set, a run, a checkpoint, a model or a tokenizer."""

    name: str
    """Name that is shown to the user."""
    records: dict[str, Callable[[dict[str, Any]], bool]]
    """Test of the content of each record file; a folder needs one record that passes."""
    own_files: re.Pattern[str]
    """The files of the output, by their path below its folder."""


def _is_plan(value: dict[str, Any]) -> bool:
    return {"version", "source", "settings"} <= value.keys() or {"format_version", "data.source"} <= value.keys()


def _is_manifest(value: dict[str, Any]) -> bool:
    return {"format_version", "tokenizer_fingerprint", "train", "validation"} <= value.keys()


def _is_run(value: dict[str, Any]) -> bool:
    return {"id", "code_version", "config"} <= value.keys()


def _is_checkpoint(value: dict[str, Any]) -> bool:
    files = value.get("files")
    return isinstance(files, dict) and all(isinstance(file, dict) and "sha256" in file for file in files.values())


def _is_tokenizer(value: dict[str, Any]) -> bool:
    return isinstance(value.get("model"), dict) and "added_tokens" in value


def _is_model(value: dict[str, Any]) -> bool:
    return "model_type" in value or "architectures" in value


_TOKENIZER_FILES = "|".join(map(re.escape, (*TOKENIZER_FILES, "chat_template.jinja")))
_KINDS = (
    _Kind(
        "a data set of this program",
        {"plan.json": _is_plan, "manifest.json": _is_manifest},
        re.compile(rf"(plan|manifest)\.json|parts/.*|tokenizer/({_TOKENIZER_FILES})|(train|validation)/[^/]*\.bin"),
    ),
    _Kind(
        "a run of this program",
        {"run.json": _is_run},
        re.compile(r"run\.json|(attempts|checkpoints|final|logs|tokenizer)/.*"),
    ),
    _Kind(
        "a checkpoint",
        {"manifest.json": _is_checkpoint},
        re.compile(r"(manifest|state)\.json|metrics\.jsonl|[^/]*\.safetensors"),
    ),
    _Kind(
        "a model",
        {"config.json": _is_model},
        re.compile(
            rf"(config|generation_config)\.json|README\.md|[^/]*\.safetensors(\.index\.json)?|{_TOKENIZER_FILES}"
        ),
    ),
    _Kind("a tokenizer", {"tokenizer.json": _is_tokenizer}, re.compile(_TOKENIZER_FILES)),
)


class Outputs:
    """The outputs of this program below a corpus.

    Args:
        read: returns the content of a file by its name below the corpus.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._is_kind_cached = cache(self._is_kind)

    def owner(self, name: str) -> tuple[str, str] | None:
        """Return the folder and the kind of the outermost output that a file belongs to; None for any other file.

        Args:
            name: path of the file below the corpus. The folder is returned in the same form, with a ``/`` at its end.
        """
        parts = name.split("/")
        for depth in range(len(parts)):
            folder, rest = "".join(f"{part}/" for part in parts[:depth]), "/".join(parts[depth:])
            for kind in _KINDS:
                if kind.own_files.fullmatch(rest) and self._is_kind_cached(folder, kind.name):
                    return folder, kind.name
        return None

    def _is_kind(self, folder: str, kind_name: str) -> bool:
        kind = next(kind for kind in _KINDS if kind.name == kind_name)
        return any(_is_record(self._read(folder + name), test) for name, test in kind.records.items())


def _is_record(content: bytes | None, test: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        value = orjson.loads(content or b"null")
    except orjson.JSONDecodeError:
        return False
    return isinstance(value, dict) and test(value)
