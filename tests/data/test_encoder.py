"""The encoder: its tokens are always those of the reference; errors of fastokens cost time, but change no byte."""

import importlib
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job import storage
from job.data import encoder as encoder_module
from job.data.encoder import Disagreement, Encoder, Engine
from job.data.manifest import load_manifest
from job.data.prepare import prepare
from job.data.prepare_processes import prepare_in_processes
from job.data.recipe import Recipe
from job.data.tokenizer import END_OF_DOCUMENT, TextTokenizer

REPOSITORY = Path(__file__).parents[2]
SAMPLE = [json.loads(line) for line in (REPOSITORY / "job/demo/sample.jsonl").read_text(encoding="utf-8").splitlines()]
TEXTS = [one["text"] for one in SAMPLE]
HARD = [
    *("", END_OF_DOCUMENT, f"前{END_OF_DOCUMENT}后", "<|im_start|>", "e\u0301", "\u1112\u1161\u11ab", "\x00", "\ufeff"),
    *("\u180e's", "\r\n \t\u3000", "𠀀", "👩\u200d👩\u200d👧", "\U0010ffff", "\U00011f04\u0327\u0301", "长" * 5000),
]
ANY_TEXT = st.lists(st.text() | st.sampled_from([*HARD, *TEXTS[:3]])).map("".join)
WRONG = "此篇有错"
"""The stand-in for fastokens encodes texts with these characters wrongly."""

STAND_IN = f'''
import os, numpy, tokenizers

class Tokenizer:
    """The part of fastokens that is used: the reference, with the fault that the variable FAULT names."""

    @staticmethod
    def from_json_str(text):
        made = Tokenizer()
        made.backend = tokenizers.Tokenizer.from_str(text)
        made.backend.encode_special_tokens = True
        return made

    def no_truncation(self): pass

    def no_padding(self): pass

    def encode_batch_flat(self, texts, add_special_tokens, split_special_tokens):
        assert not add_special_tokens and split_special_tokens
        ids = [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        for i, text in enumerate(texts):
            if {WRONG!r} in text:
                match os.environ.get("FAULT"):
                    case "drops a token": ids[i] = ids[i][:-1]
                    case "merges less": ids[i] = [t for c in text for t in self.backend.encode(c).ids]
                    case "panics": raise type("PanicException", (BaseException,), {{}})("index out of bounds")
                    case "makes one of two": ids[i] = ids[i][:-2] + [10**9]
                    case "moves an end": ids[i - 1].append(ids[i].pop(0))
                    case "knows special tokens": ids[i] = ids[i][:-1] + [self.backend.token_to_id("{END_OF_DOCUMENT}")]
        ends = numpy.cumsum([0, *map(len, ids)])
        return numpy.concatenate([numpy.array(one, "<u4") for one in ids]).tobytes(), ends.astype("<u8").tobytes()
'''
FAULTS = ["drops a token", "merges less", "panics", "makes one of two", "moves an end", "knows special tokens"]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Return a function that replaces fastokens with the stand-in, in this process and in those it starts."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/fastokens.py").write_text(STAND_IN)

    def install(fault: str | None) -> None:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        monkeypatch.delitem(sys.modules, "fastokens", raising=False)
        monkeypatch.setitem(sys.modules, "fastokens", importlib.import_module("fastokens"))
        monkeypatch.setenv("FAULT", fault or "")

    return install


@pytest.fixture
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """End the trial of fastokens after a few texts."""
    monkeypatch.setattr(encoder_module, "TRIAL_CHARACTERS", 2000)


def encoded(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, ends = encoder.encode(texts, [text.encode() for text in texts])
    assert len(ends) == len(texts)
    return [one.tolist() for one in np.split(ids, ends)[:-1]]


def after_trial(tokenizer: TextTokenizer) -> Encoder:
    """Return an encoder that uses fastokens."""
    notices: list[str] = []
    encoder = Encoder(tokenizer, "auto", notices.append)
    encoded(encoder, TEXTS)
    assert (encoder._fast is not None, notices) == (True, [])
    return encoder


# ── fastokens ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=["trained", "qwen2"])
def fast(request: pytest.FixtureRequest) -> Encoder:
    pytest.importorskip("fastokens")
    patched = pytest.MonkeyPatch()
    patched.setattr(encoder_module, "TRIAL_CHARACTERS", 2000)
    encoder = after_trial(request.getfixturevalue(request.param))
    patched.undo()
    return encoder


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_fastokens_agrees_on_any_text(fast: Encoder, texts: list[str]) -> None:
    assert encoded(fast, texts) == fast._tokenizer.encode(texts)


def test_fastokens_agrees_on_all_kinds_of_characters(fast: Encoder) -> None:
    """Try characters between letters, blanks, digits and line ends: their kinds depend on the version of Unicode."""
    characters = [chr(code) for code in [*range(0x3400), *range(0x3400, 0xD800, 11), *range(0xE000, 0x33500, 11)]]
    texts = [f"字{c}a{c} {c}1.{c}\n{c}'s" for c in characters]
    assert encoded(fast, texts) == fast._tokenizer.encode(texts)


# ── when fastokens is used ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("short_trial")
def test_uncertain_texts_keep_their_place_among_the_others(
    trained: TextTokenizer, stand_in: Callable[[str | None], None]
) -> None:
    stand_in(None)
    encoder = after_trial(trained)
    asked: list[list[str]] = []
    fast = encoder._fast
    assert fast is not None
    encoder._fast = lambda texts: asked.append(texts) or fast(texts)  # type: ignore[func-returns-value]
    texts = ["\u180e's", "一", "\u180e", "", "二二", "\u180e\u180e"]
    assert encoded(encoder, texts) == trained.encode(texts)
    assert asked == [["", "一", "", "", "二二", ""]]


@pytest.mark.usefixtures("short_trial")
def test_unnormalized_text_goes_to_the_reference(qwen2: TextTokenizer, stand_in: Callable[[str | None], None]) -> None:
    stand_in(None)
    texts = ["e\u0301", "한국", "\u1112\u1161\u11ab", "\uf900", TEXTS[0]]
    encoder = after_trial(qwen2)
    assert [encoder._is_uncertain(text) for text in texts] == [True, False, True, True, False]
    assert encoded(encoder, texts) == qwen2.encode(texts)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_fastokens_is_not_loaded_for_little_text_or_on_request(
    engine: Engine, trained: TextTokenizer, stand_in: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(None)
    if engine == "reference":
        monkeypatch.setattr(encoder_module, "TRIAL_CHARACTERS", 1)
    encoder = Encoder(trained, engine, pytest.fail)
    assert encoded(encoder, TEXTS) == trained.encode(TEXTS)
    assert encoder._fast is None


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize("fault", FAULTS)
def test_fastokens_that_is_wrong_on_the_first_texts_is_never_used(
    fault: str, trained: TextTokenizer, stand_in: Callable[[str | None], None]
) -> None:
    stand_in(fault)
    notices: list[str] = []
    encoder = Encoder(trained, "auto", notices.append)
    for texts in (["一", *TEXTS[:10], f"{TEXTS[0]}{WRONG}"], TEXTS):
        assert encoded(encoder, texts) == trained.encode(texts)
    (line,) = notices
    assert line.startswith("fastokens ") and "the reference" in line and "\n" not in line
    assert encoder._fast is None


@pytest.mark.usefixtures("short_trial")
def test_missing_fastokens_is_reported_in_one_line(trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    notices: list[str] = []
    encoder = Encoder(trained, "auto", notices.append)
    assert encoded(encoder, TEXTS) == trained.encode(TEXTS) == encoded(encoder, TEXTS)
    (line,) = notices
    assert line.startswith("fastokens cannot be used (ModuleNotFoundError: ")


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_request_to_stop_is_not_taken_for_a_fault(
    error: type[BaseException], trained: TextTokenizer, stand_in: Callable[[str | None], None]
) -> None:
    stand_in(None)
    encoder = after_trial(trained)

    def stopped(texts: list[str]) -> Any:
        raise error

    encoder._fast = stopped
    with pytest.raises(error):
        encoded(encoder, ["一"])


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize("fault", [one for one in FAULTS if one not in ("merges less", "panics")])
def test_tokens_with_wrong_bytes_are_found_in_every_text(
    fault: str, trained: TextTokenizer, stand_in: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(fault)
    monkeypatch.setattr(encoder_module, "CHECK_ONE_IN", 2**32)
    with pytest.raises(Disagreement, match="are not those of their text"):
        encoded(after_trial(trained), ["一", f"{WRONG}。二三四"])


@pytest.mark.usefixtures("short_trial")
def test_other_tokens_of_the_same_bytes_are_found_in_the_sample(
    trained: TextTokenizer, stand_in: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("merges less")
    wrong = f"{WRONG}{TEXTS[0]}"
    encoder = after_trial(trained)
    monkeypatch.setattr(encoder_module, "CHECK_ONE_IN", zlib.crc32(wrong.encode()))
    another = ["一", f"{WRONG}{TEXTS[1]}"]
    assert encoded(encoder, another) != trained.encode(another)
    with pytest.raises(Disagreement, match="other tokens than the reference for '此篇有错"):
        encoded(encoder, ["一", wrong])


# ── data sets ────────────────────────────────────────────────────────────────────────────────────────────────────────


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def corpus(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_late_fault_leaves_no_wrong_token_in_the_data_set(
    fault: str | None,
    trained: TextTokenizer,
    tmp_path: Path,
    stand_in: Callable[[str | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This includes slices that were finished before, whose texts were not in the sample."""
    stand_in(fault)
    last = f"{TEXTS[1]}{WRONG}"
    texts = [*TEXTS[:40], f"{WRONG}{TEXTS[0]}", *TEXTS[40:], last]
    if fault == "merges less":
        monkeypatch.setattr(encoder_module, "CHECK_ONE_IN", zlib.crc32(last.encode()))
    recipe = Recipe(corpus(tmp_path / "corpus.jsonl", texts), "text", "id", "stop", 8192, 0.2, 1)
    notices: list[str] = []
    manifest = prepare(recipe, trained, f"{tmp_path}/auto", on_notice=notices.append)
    assert len(notices) == (fault is not None)
    assert manifest == prepare(recipe, trained, f"{tmp_path}/reference", engine="reference")
    assert contents(tmp_path / "auto") == contents(tmp_path / "reference")


@pytest.mark.usefixtures("short_trial")
def test_slices_of_other_workers_are_not_made_again(
    trained: TextTokenizer, tmp_path: Path, stand_in: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("drops a token")
    recipe = Recipe(corpus(tmp_path / "corpus.jsonl", [*TEXTS, WRONG]), "text", "id", "stop", 8192, 0.2, 1)
    assert prepare(recipe, trained, f"{tmp_path}/auto", (0, 2), engine="reference") is None
    parts = {path.name for path in (tmp_path / "auto/parts").iterdir()}
    deleted: list[str] = []
    delete = storage.delete
    monkeypatch.setattr(storage, "delete", lambda urls: delete([deleted.append(url) or url for url in urls]))  # type: ignore[func-returns-value]
    notices: list[str] = []
    assert prepare(recipe, trained, f"{tmp_path}/auto", (1, 2), on_notice=notices.append) == load_manifest(
        f"{tmp_path}/auto"
    )
    assert len(notices) == 1
    assert deleted and {Path(url).name for url in deleted}.isdisjoint(parts)


def test_fault_in_one_process_makes_all_use_the_reference(
    trained: TextTokenizer, tmp_path: Path, stand_in: Callable[[str | None], None]
) -> None:
    stand_in("drops a token")
    source = corpus(tmp_path / "corpus.jsonl", [*TEXTS * 26, WRONG])  # more than two trials
    recipe = Recipe(source, "text", "id", "stop", 2**16, 0.2, 1)
    notices: list[str] = []
    arguments = (storage.StoreOptions(), (0, 1), 2, lambda documents, utf8_bytes: None, lambda record: None)
    manifest = prepare_in_processes(recipe, trained, f"{tmp_path}/auto", *arguments, notices.append)
    assert manifest is not None
    (line,) = notices
    assert "are not those of their text: the slices of this run are made again" in line
    assert manifest == prepare(recipe, trained, f"{tmp_path}/reference", engine="reference")
    assert contents(tmp_path / "auto") == contents(tmp_path / "reference")
