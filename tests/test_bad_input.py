"""Mistakes of a user: each gives one line that names the setting, and exit code 78, and leaves no files behind."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from newcomer import GOOD, SETTINGS

from job import storage

SMALL_MODEL = {
    f"{section}.{key}": str(value) for section in ("model", "train") for key, value in SETTINGS[section].items()
} | {"train.max_steps": "1"}


@dataclass
class Place:
    """A folder with a good corpus, tokenizer and shards, which a test then damages."""

    folder: Path
    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)

    def corpus(self, content: bytes, name: str = "wiki.jsonl") -> None:
        (self.folder / name).write_bytes(content)
        self.options["data.source"] = str(self.folder / name)


def _lines(rows: list[object]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a correct corpus, tokenizer and shards."""
    folder = tmp_path_factory.mktemp("right")
    (folder / "wiki.jsonl").write_bytes(_lines(GOOD))
    _job("tokenizer", _options(folder), {})
    _job("prepare", _options(folder), {})
    return folder


@pytest.fixture
def place(tmp_path: Path, prepared: Path) -> Place:
    """A copy of this folder, without an output."""
    subprocess.run(["cp", "-r", f"{prepared}/.", str(tmp_path)], check=True)
    return Place(tmp_path, _options(tmp_path))


def _options(folder: Path) -> dict[str, str]:
    return {
        "data.source": str(folder / "wiki.jsonl"),
        "data.shards": str(folder / "shards"),
        "data.cache_dir": str(folder / "cache"),
        "tokenizer.source": str(folder / "tokenizer"),
        "tokenizer.vocab_size": "300",
        "run.output": str(folder / "run"),
        "tracking.mode": "disabled",
        "tracking.log_dir": str(folder / "swanlog"),
        **SMALL_MODEL,
    }


def _job(command: str, options: dict[str, str], environment: dict[str, str | None]) -> tuple[int, str]:
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    variables = {name: value for name, value in (os.environ | environment).items() if value is not None}
    ended = subprocess.run(
        [sys.executable, "-m", "job", command, *words], env=variables, capture_output=True, text=True, timeout=120
    )
    return ended.returncode, ended.stderr


Spoil = Callable[[Place], object]


def options(**changed: str) -> Spoil:
    """Return a function that changes settings; `__` in a name stands for the dot."""
    return lambda place: place.options.update({name.replace("__", "."): value for name, value in changed.items()})


def environment(**changed: str | None) -> Spoil:
    return lambda place: place.environment.update(changed)


def rows(*bad: object) -> Spoil:
    """Return a function that writes a corpus with bad records after good ones."""
    return lambda place: place.corpus(_lines([*GOOD, *bad]))


def lines(content: bytes, name: str = "wiki.jsonl") -> Spoil:
    return lambda place: place.corpus(_lines(GOOD) + content, name)


def whole(content: bytes, name: str) -> Spoil:
    return lambda place: place.corpus(content, name)


def parquet_without_text(place: Place) -> None:
    pq.write_table(pa.table({"id": ["1"], "body": ["文"]}), place.folder / "wiki.parquet")
    place.options["data.source"] = str(place.folder / "wiki.parquet")


def remove(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        subprocess.run(["rm", "-r", str(place.folder / name)], check=True)

    return spoil


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(place: Place) -> None:
        path = next(place.folder.glob(name))
        path.write_bytes(change(path.read_bytes()))

    return spoil


def another_recipe(place: Place) -> None:
    place.options["data.seed"] = "1"


def foreign_tokenizer(place: Place) -> None:
    path = place.folder / "shards" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"dropout":', '"dropout" :'))


def other_store(**changed: str) -> Spoil:
    """Return a function that reads the corpus from S3, with changed environment variables."""

    def spoil(place: Place) -> None:
        place.options |= {"data.source": "s3://no-such-bucket-here/wiki.jsonl", "store.deadline_seconds": "5"}
        place.environment |= changed

    return spoil


PREPARE, TRAIN, GENERATE, TOKENIZER, EVALUATE = "prepare", "train", "generate", "tokenizer", "evaluate"

CASES: dict[str, tuple[str, Spoil, str]] = {
    # Settings.
    "an unknown setting": (TRAIN, options(train__learnin_rate="1"), "train.learnin_rate"),
    "a text for a number": (TRAIN, options(train__learning_rate="fast"), "train.learning_rate"),
    "a number out of range": (PREPARE, options(data__validation_fraction="1.5"), "data.validation_fraction"),
    "a word that is not a choice": (TRAIN, options(train__strategy="zero3"), "train.strategy"),
    "a size with no unit that exists": (PREPARE, options(data__slice_bytes="3 miles"), "data.slice_bytes"),
    "a global batch that cannot be cut": (
        TRAIN,
        options(train__global_batch_size="5", train__processes="2"),
        "train.global_batch_size",
    ),
    "heads that do not divide the width": (TRAIN, options(model__num_attention_heads="3"), "model.hidden_size"),
    "key heads that do not divide the heads": (
        TRAIN,
        options(model__num_key_value_heads="3"),
        "model.num_key_value_heads",
    ),
    "a worker beyond the last": (PREPARE, options(data__worker="3/3"), "data.worker"),
    "a worker that is no fraction": (PREPARE, options(data__worker="one of two"), "data.worker"),
    "a config file that is not there": (TRAIN, options(config="nowhere.yaml"), "--config"),
    "a config file that is a folder": (TRAIN, options(config="configs"), "--config"),
    # The corpus.
    "no such file": (PREPARE, options(data__source="nowhere.jsonl"), "data.source"),
    "a folder without a corpus": (PREPARE, options(data__source="configs"), "data.source"),
    "a glob that matches nothing": (PREPARE, options(data__source="/tmp/no-*-such.jsonl"), "data.source"),
    "an unknown protocol": (PREPARE, options(data__source="gopher://host/wiki.jsonl"), "data.source"),
    "broken JSON": (PREPARE, lines(b'{"id": "9", "text": "x\n'), "data.source"),
    "a record that is no object": (PREPARE, rows(["a", "list"]), "data.source"),
    "a record without the text field": (PREPARE, rows({"id": "9", "body": "x"}), "data.text_field"),
    "a text that is a number": (PREPARE, rows({"id": "9", "text": 7}), "data.source"),
    "a text that is not UTF-8": (PREPARE, lines(b'{"id": "9", "text": "\xff\xfe"}\n'), "data.source"),
    "half a surrogate pair": (PREPARE, lines(b'{"id": "9", "text": "\\ud800"}\n'), "data.source"),
    "an array that is cut off": (PREPARE, whole(b'[{"id": "1", "text": "x"}, {"id"', "wiki.json"), "data.source"),
    "a gzip file that is cut off": (PREPARE, whole(gzip.compress(_lines(GOOD))[:-20], "wiki.jsonl.gz"), "data.source"),
    "a parquet file that is none": (PREPARE, whole(b"PAR0 not at all", "wiki.parquet"), "data.source"),
    "a parquet file without the column": (PREPARE, parquet_without_text, "data.text_field"),
    "nothing but empty texts": (PREPARE, whole(b'{"id": "1", "text": ""}\n', "wiki.jsonl"), "data.source"),
    "a hub that cannot be reached": (
        PREPARE,
        lambda place: (
            place.options.update({"data.source": "fjcanyue/wikipedia-zh-cn"}),
            place.environment.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0"),
        ),
        "HF_ENDPOINT",
    ),
    # The tokenizer.
    "a folder with other files as tokenizer": (PREPARE, options(tokenizer__source="configs"), "tokenizer.source"),
    "no tokenizer for one of several workers": (
        PREPARE,
        options(tokenizer__source="./nowhere", data__worker="0/2"),
        "tokenizer.source",
    ),
    "a tokenizer that is damaged": (PREPARE, rewrite("tokenizer/tokenizer.json", lambda t: t[:-9]), "tokenizer.source"),
    "a tokenizer that cannot end a text": (
        PREPARE,
        rewrite("tokenizer/tokenizer_config.json", lambda t: t.replace(b"<|endoftext|>", b"<|end|>")),
        "tokenizer.source",
    ),
    "a tokenizer to be written to a hub": (TOKENIZER, options(tokenizer__source="Qwen/Qwen2-0.5B"), "tokenizer.source"),
    "a place with another tokenizer": (TOKENIZER, options(tokenizer__vocab_size="270"), "tokenizer.source"),
    # The shards.
    "no shards yet": (TRAIN, remove("shards"), "data.shards"),
    "shards of another recipe": (PREPARE, another_recipe, "data.shards"),
    "a manifest that is damaged": (TRAIN, rewrite("shards/manifest.json", lambda m: m[:-40]), "data.shards"),
    "a manifest of a million brackets": (TRAIN, rewrite("shards/manifest.json", lambda m: b"[" * 10**6), "data.shards"),
    "a manifest with a shard elsewhere": (
        TRAIN,
        rewrite("shards/manifest.json", lambda m: m.replace(b'"train/00000', b'"../../00000')),
        "data.shards",
    ),
    "a manifest of a later version": (
        TRAIN,
        rewrite("shards/manifest.json", lambda m: m.replace(b'"format_version": 1', b'"format_version": 2')),
        "data.shards",
    ),
    "a shard that is damaged": (TRAIN, rewrite("shards/train/*.bin", lambda s: s[:-1] + b"\x7f"), "data.shards"),
    "a shard that is missing": (TRAIN, remove("shards/train"), "data.shards"),
    "a tokenizer that did not make the shards": (TRAIN, foreign_tokenizer, "data.shards"),
    # The run.
    "a checkpoint that is not there": (TRAIN, options(train__resume="nowhere/step-00000001"), "train.resume"),
    "a run that is not there": (GENERATE, options(), "run.output"),
    "a model that is not there": (GENERATE, options(generate__model="nowhere"), "generate.model"),
    "a model to evaluate that is not there": (EVALUATE, options(evaluate__model="nowhere"), "evaluate.model"),
    "a tracker without a key": (
        TRAIN,
        lambda place: (
            place.options.update({"tracking.mode": "cloud"}),
            place.environment.update(SWANLAB_API_KEY=None, SWANLAB_SAVE_DIR=str(place.folder), HOME=str(place.folder)),
        ),
        "tracking.mode",
    ),
    # The store and its credentials.
    "no such bucket": (PREPARE, other_store(), "no-such-bucket-here"),
    "a wrong key": (PREPARE, other_store(AWS_SECRET_ACCESS_KEY="wrong-secret-value"), "AWS_ACCESS_KEY_ID"),
    "no key at all": (
        PREPARE,
        lambda place: (
            other_store()(place),
            place.environment.update(
                AWS_ACCESS_KEY_ID=None,
                AWS_SECRET_ACCESS_KEY=None,
                AWS_EC2_METADATA_DISABLED="true",
                HOME=str(place.folder),
            ),
        ),
        "AWS_ACCESS_KEY_ID",
    ),
    "a store that is not there": (PREPARE, other_store(AWS_ENDPOINT_URL="http://nowhere.invalid"), "AWS_ENDPOINT_URL"),
    "a store whose address is none": (PREPARE, options(store__endpoint_url="localhost:9000"), "store.endpoint_url"),
    # Variables of the cluster.
    "half of a launcher's variables": (TRAIN, environment(RANK="0"), "LOCAL_RANK"),
    "a rank beyond the world": (
        TRAIN,
        environment(
            RANK="2", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="9"
        ),
        "RANK",
    ),
    "a world size that is no number": (
        TRAIN,
        environment(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="two", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="9"
        ),
        "WORLD_SIZE",
    ),
}  # fmt: skip


SLOW = {
    "a shard that is missing",
    "a tokenizer that did not make the shards",
    "a model that is not there",
    "a model to evaluate that is not there",
    "a tracker without a key",
}
"""Mistakes that only a worker finds, which takes long to start; similar mistakes are found earlier."""


@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=pytest.mark.recovery if name in SLOW else ()) for name in CASES]
)
def test_user_mistake_gives_one_line_and_leaves_no_files(place: Place, mistake: str) -> None:
    command, spoil, named = CASES[mistake]
    spoil(place)
    if command == PREPARE and "shards" not in mistake:
        place.options["data.shards"] = str(place.folder / "new-shards")
    before = _files(place.folder)
    code, said = _job(command, place.options, place.environment)
    assert code == 78, said
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    assert named in said
    assert "wrong-secret-value" not in said
    assert _files(place.folder) == before


def _files(folder: Path) -> set[str]:
    """Return all files except the cache and what even a failed command may write: plan, run records, tokenizer."""
    return {
        entry.url
        for entry in storage.list_files(str(folder))
        if not re.search(
            r"/cache/|/new-shards/plan\.json$|/run/(run\.json$|attempts/|tokenizer/)|/new-shards/tokenizer/", entry.url
        )
    }
