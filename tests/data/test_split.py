"""The split of a document depends only on its id or text and on the seed."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.manifest import Shard, open_shard
from job.data.prepare import Recipe, prepare
from job.data.split import is_validation
from job.data.tokenizer import TextTokenizer, train_tokenizer

IDS = [*map(str, range(20)), "条目", "", "a/b", "𠀀"]
FEW = settings(max_examples=15, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer([], 257, tmp_path_factory.mktemp("bytes"))


def validation_texts(
    tokenizer: TextTokenizer, records: Sequence[dict[str, str]], slice_bytes: int, seed: int
) -> set[str]:
    """Return the texts in the validation shards of a corpus made of these records and one training document."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        training_id = next(str(i) for i in range(100) if not is_validation(str(i), "", seed, 0.5))
        lines = [{"id": training_id, "text": "for training"}, *records]
        corpus.write_text("".join(json.dumps(record) + "\n" for record in lines))
        manifest = prepare(
            Recipe(str(corpus), "text", "id", "stop", slice_bytes, 0.5, seed), tokenizer, f"{folder}/shards"
        )
        assert manifest is not None

        def texts(shard: Shard) -> list[str]:
            tokens, ends = open_shard(Path(folder, "shards", shard.name), shard, manifest.dtype)
            starts = [0, *map(int, ends[:-1])]
            return [tokenizer.decode(tokens[a : int(b) - 1].tolist()) for a, b in zip(starts, ends, strict=True)]

        return {text for shard in manifest.validation for text in texts(shard)}


@FEW
@given(
    present=st.lists(st.sampled_from(IDS), unique=True),
    slice_bytes=st.integers(20, 2000),
    seed=st.integers(0, 2**63 - 1),
)
def test_adding_removing_or_reordering_moves_no_other_document(
    tokenizer: TextTokenizer, present: list[str], slice_bytes: int, seed: int
) -> None:
    records = [{"id": document_id, "text": f"text of {document_id}"} for document_id in present]
    expected = {f"text of {document_id}" for document_id in present if is_validation(document_id, "", seed, 0.5)}
    assert validation_texts(tokenizer, records, slice_bytes, seed) == expected


@FEW
@given(texts=st.lists(st.text(min_size=1), unique=True), slice_bytes=st.integers(20, 2000))
def test_document_without_an_id_is_split_by_its_text(
    tokenizer: TextTokenizer, texts: list[str], slice_bytes: int
) -> None:
    records = [{"text": text} for text in texts]
    expected = {text for text in texts if is_validation(None, text, 3, 0.5)}
    assert validation_texts(tokenizer, records, slice_bytes, 3) == expected


@given(name=st.text(), texts=st.tuples(st.text(), st.text()), seed=st.integers(0, 2**63 - 1), fraction=st.floats(0, 1))
def test_changed_text_does_not_move_a_document_with_an_id(
    name: str, texts: tuple[str, str], seed: int, fraction: float
) -> None:
    assert is_validation(name, texts[0], seed, fraction) == is_validation(name, texts[1], seed, fraction)


@given(
    name=st.text(), seed=st.integers(0, 2**63 - 1), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
)
def test_larger_fraction_keeps_all_documents_of_a_smaller_one(name: str, seed: int, fractions: list[float]) -> None:
    assert is_validation(name, "", seed, fractions[0]) <= is_validation(name, "", seed, fractions[1])
    assert not is_validation(name, "", seed, 0)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 2333])
def test_validation_share_matches_the_fraction(fraction: float, seed: int) -> None:
    documents = 20_000
    selected = sum(is_validation(str(i), "", seed, fraction) for i in range(documents))
    assert abs(selected - fraction * documents) < 5 * (documents * fraction * (1 - fraction)) ** 0.5


def test_another_seed_selects_other_documents() -> None:
    first, second = ([is_validation(str(i), "", seed, 0.5) for i in range(2000)] for seed in (1, 2))
    assert 800 < sum(a != b for a, b in zip(first, second, strict=True)) < 1200


def test_split_rule_matches_existing_data_sets() -> None:
    """Unfinished data sets, and tokenizers that were trained without the validation texts, rely on the rule."""
    assert [i for i in range(60) if is_validation(str(i), "", 2333, 0.1)] == [0, 2, 15, 16, 24, 27, 36, 37, 40, 57, 58]
    assert [i for i in range(60) if is_validation(None, str(i), 1, 0.1)] == [19, 28, 41, 52, 53]
