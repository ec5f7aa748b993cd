"""Recipes, commands and listings that the tests of `prepare` share."""

import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import storage
from job.data.recipe import Recipe
from job.data.tokenizer import TextTokenizer

REPOSITORY = Path(__file__).parents[2]
SAMPLE = [json.loads(line) for line in (REPOSITORY / "job/demo/sample.jsonl").read_text(encoding="utf-8").splitlines()]
KiB = 1024


def recipe(source: str, **changes: Any) -> Recipe:
    return replace(Recipe(source, "text", "id", "stop", 16 * KiB, 0.1, 2333), **changes)


def objects(url: str) -> dict[str, str]:
    """Return the name and the sha256 of every object below `url`."""

    def digest(entry: storage.Entry) -> tuple[str, str]:
        return entry.url.removeprefix(url), hashlib.sha256(storage.read_bytes(entry.url)).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(digest, storage.list_files(url)))


def parts(url: str) -> set[str]:
    """Return the names of the finished slices."""
    return {entry.url.rpartition("/")[2].removesuffix(".json") for entry in storage.list_files(f"{url}/parts")}


def job(*words: str, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "job", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, **pipes, **options)


def prepare_command(source: str, url: str, tokenizer: TextTokenizer, **settings: object) -> list[str]:
    settings = {"source": source, "shards": url, "slice_bytes": 16 * KiB, **settings}
    words = [word for name, value in settings.items() for word in (f"--data.{name}", str(value))]
    return ["prepare", "--tokenizer.source", str(tokenizer.folder), *words]


def rows_of(table: str) -> dict[str, str]:
    return {name.strip(): value.strip() for name, value in re.findall(r"│([^│]+)│([^│]+)│", table)}
