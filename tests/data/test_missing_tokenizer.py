"""`prepare` trains a tokenizer where the settings name a place that has none."""

from pathlib import Path

import pytest
from corpus_files import json_lines
from preparation import SAMPLE, objects

from job import storage
from job.cli import main
from job.data.tokenizer_download import has_no_tokenizer_yet
from job.errors import EXIT_DONE, EXIT_REFUSED


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with a corpus, and the place of a tokenizer that does not exist."""
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE))
    return tmp_path


def words(command: str, corpus: Path, tokenizer: str, shards: str = "shards") -> list[str]:
    settings = {
        "data.source": corpus / "corpus.jsonl",
        "data.shards": corpus / shards,
        "data.cache_dir": corpus / "cache",
        "tokenizer.source": tokenizer,
        "tokenizer.vocab_size": 400,
    }
    return [command, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


@pytest.mark.parametrize("place", ["folder", "URL"])
def test_missing_tokenizer_is_the_one_that_its_command_trains(
    place: str, corpus: Path, bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made, expected = (
        (str(corpus / "made"), str(corpus / "own")) if place == "folder" else (f"{bucket}/a", f"{bucket}/b")
    )
    assert main(words("prepare", corpus, made)) == EXIT_DONE
    printed = capfd.readouterr().out
    assert f"no tokenizer in {made} yet: training one with up to 400 tokens on the corpus" in printed.replace("\n", " ")
    assert main(words("tokenizer", corpus, expected)) == EXIT_DONE
    assert objects(made) == objects(expected)
    assert main(words("prepare", corpus, expected, "others")) == EXIT_DONE
    assert objects(str(corpus / "shards")) == objects(str(corpus / "others"))
    before = objects(str(corpus))
    capfd.readouterr()
    assert main(words("prepare", corpus, made)) == EXIT_DONE
    assert "training one" not in capfd.readouterr().out
    assert objects(str(corpus)) == before


def test_missing_corpus_is_refused_before_the_tokenizer_is_announced(
    corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (corpus / "corpus.jsonl").unlink()
    assert main(words("prepare", corpus, str(corpus / "made"))) == EXIT_REFUSED
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("data.source: ") and len(err.splitlines()) == 1


def test_tokenizer_that_was_stored_in_part_is_trained_again(corpus: Path) -> None:
    folder = corpus / "made"
    assert main(words("prepare", corpus, str(folder))) == EXIT_DONE
    whole = objects(str(folder))
    (folder / "tokenizer.json").unlink()
    assert has_no_tokenizer_yet(str(folder))
    assert main(words("prepare", corpus, str(folder))) == EXIT_DONE
    assert objects(str(folder)) == whole


def test_place_with_anything_else_or_on_a_hub_is_not_free(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    assert not has_no_tokenizer_yet(".")
    assert not has_no_tokenizer_yet("corpus.jsonl")
    assert not has_no_tokenizer_yet("owner/name")
    assert not has_no_tokenizer_yet("modelscope://owner/name")
    assert has_no_tokenizer_yet("data/tokenizer")
    assert has_no_tokenizer_yet("new")
    storage.write_bytes("old/vocab.json", b"{}")
    assert not has_no_tokenizer_yet("old")
    Path("owner").mkdir()
    assert not has_no_tokenizer_yet("owner/name")
