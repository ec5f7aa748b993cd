"""What this program has written below a corpus, which is no part of it: data sets, runs, models and tokenizers.

A folder is one of these if it holds their record (`plan.json`, `run.json`, …) with the content that they have, finished
or not. Of such a folder only the files that the program writes are its own: a corpus beside them is still a corpus.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson

Read = Callable[[str], bytes | None]
"""Gives the content of a file by its name below the corpus; None if it is not there."""


@dataclass(frozen=True)
class _Kind:
    """One of the things that the program writes."""

    name: str
    records: dict[str, Callable[[dict[str, Any]], bool]]
    """The files of which one has to be there, and what holds of their content."""
    own: re.Pattern[str]
    """Its files, by their path below its folder."""


def _is_plan(value: dict[str, Any]) -> bool:
    return {"version", "source", "settings"} <= value.keys() or {"format_version", "data.source"} <= value.keys()


def _is_manifest(value: dict[str, Any]) -> bool:
    return {"format_version", "tokenizer_fingerprint", "train", "validation"} <= value.keys()


def _is_run(value: dict[str, Any]) -> bool:
    return {"id", "code_version", "config"} <= value.keys()


def _is_checkpoint(value: dict[str, Any]) -> bool:
    files = value.get("files")
    return isinstance(files, dict) and all(isinstance(one, dict) and "sha256" in one for one in files.values())


def _is_tokenizer(value: dict[str, Any]) -> bool:
    return isinstance(value.get("model"), dict) and "added_tokens" in value


def _is_model(value: dict[str, Any]) -> bool:
    return "model_type" in value or "architectures" in value


_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.jinja"
)
_KINDS = (
    _Kind(
        "a data set of this program",
        {"plan.json": _is_plan, "manifest.json": _is_manifest},
        re.compile(rf"(plan|manifest)\.json|parts/.*|tokenizer/({_TOKENIZER})|(train|validation)/[^/]*\.bin"),
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
        re.compile(rf"(config|generation_config)\.json|README\.md|[^/]*\.safetensors(\.index\.json)?|{_TOKENIZER}"),
    ),
    _Kind("a tokenizer", {"tokenizer.json": _is_tokenizer}, re.compile(_TOKENIZER)),
)


class Outputs:
    """Tells which files below a corpus the program has written itself.

    Args:
        read: gives the content of a file by its name below the corpus.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._is_one = cache(self._look)

    def owner(self, name: str) -> tuple[str, str] | None:
        """The folder and the kind of what a file belongs to, the outermost one; None for any other file.

        Args:
            name: path below the corpus. The folder is given in the same way, with a ``/`` at its end.
        """
        parts = name.split("/")
        for depth in range(len(parts)):
            rest = "/".join(parts[depth:])
            for kind in _KINDS:
                folder = "".join(f"{part}/" for part in parts[:depth])
                if kind.own.fullmatch(rest) and self._is_one(folder, kind.name):
                    return folder, kind.name
        return None

    def _look(self, folder: str, kind_name: str) -> bool:
        kind = next(one for one in _KINDS if one.name == kind_name)
        return any(_holds(self._read(folder + name), is_one) for name, is_one in kind.records.items())


def _holds(content: bytes | None, is_one: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        value = orjson.loads(content or b"null")
    except orjson.JSONDecodeError:
        return False
    return isinstance(value, dict) and is_one(value)
