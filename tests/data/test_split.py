"""What is held out depends on the document and the seed, and on nothing else."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.manifest import Shard, open_shard
from job.data.prepare import Recipe, prepare
from job.data.split import is_held_out
from job.data.tokenizer import TextTokenizer, train_tokenizer

IDS = [*map(str, range(20)), "条目", "", "a/b", "𠀀"]
FEW = settings(max_examples=15, deadline=None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer([], 257, tmp_path_factory.mktemp("bytes"))


def held_out_texts(
    tokenizer: TextTokenizer, records: Sequence[dict[str, str]], slice_bytes: int, seed: int
) -> set[str]:
    """Texts in the validation shards of a corpus of these records and a training document."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        trained = next(str(i) for i in range(100) if not is_held_out(str(i), "", seed, 0.5))
        lines = [{"id": trained, "text": "for training"}, *records]
        corpus.write_text("".join(json.dumps(one) + "\n" for one in lines))
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
def test_documents_added_removed_or_reordered_move_no_other(
    tokenizer: TextTokenizer, present: list[str], slice_bytes: int, seed: int
) -> None:
    records = [{"id": one, "text": f"text of {one}"} for one in present]
    expected = {f"text of {one}" for one in present if is_held_out(one, "", seed, 0.5)}
    assert held_out_texts(tokenizer, records, slice_bytes, seed) == expected


@FEW
@given(texts=st.lists(st.text(min_size=1), unique=True), slice_bytes=st.integers(20, 2000))
def test_a_document_without_an_id_goes_by_its_text(
    tokenizer: TextTokenizer, texts: list[str], slice_bytes: int
) -> None:
    records = [{"text": one} for one in texts]
    expected = {one for one in texts if is_held_out(None, one, 3, 0.5)}
    assert held_out_texts(tokenizer, records, slice_bytes, 3) == expected


@given(name=st.text(), texts=st.tuples(st.text(), st.text()), seed=st.integers(0, 2**63 - 1), share=st.floats(0, 1))
def test_a_document_with_an_id_stays_where_it_is_when_its_text_changes(
    name: str, texts: tuple[str, str], seed: int, share: float
) -> None:
    assert is_held_out(name, texts[0], seed, share) == is_held_out(name, texts[1], seed, share)


@given(name=st.text(), seed=st.integers(0, 2**63 - 1), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_a_larger_share_holds_out_the_same_documents_and_more(name: str, seed: int, shares: list[float]) -> None:
    assert is_held_out(name, "", seed, shares[0]) <= is_held_out(name, "", seed, shares[1])
    assert not is_held_out(name, "", seed, 0)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 2333])
def test_the_share_held_out_is_the_fraction(share: float, seed: int) -> None:
    documents = 20_000
    held_out = sum(is_held_out(str(i), "", seed, share) for i in range(documents))
    assert abs(held_out - share * documents) < 5 * (documents * share * (1 - share)) ** 0.5


def test_another_seed_holds_out_others() -> None:
    first, second = ([is_held_out(str(i), "", seed, 0.5) for i in range(2000)] for seed in (1, 2))
    assert 800 < sum(a != b for a, b in zip(first, second, strict=True)) < 1200


def test_the_rule_is_the_one_that_data_sets_were_made_with() -> None:
    """A data set that is half done, or a tokenizer trained without the held-out texts, relies on it."""
    assert [i for i in range(60) if is_held_out(str(i), "", 2333, 0.1)] == [0, 2, 15, 16, 24, 27, 36, 37, 40, 57, 58]
    assert [i for i in range(60) if is_held_out(None, str(i), 1, 0.1)] == [19, 28, 41, 52, 53]
