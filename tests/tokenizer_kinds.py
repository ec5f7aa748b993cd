"""Byte-level tokenizers of all kinds that a user may bring; each splits text differently."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from job.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, load_tokenizer, train_tokenizer
from job.demo.walk import SAMPLE

TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
BEFORE = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Pattern with which earlier versions of `job tokenizer` split text."""
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def made(
    folder: Path,
    pattern: str | None,
    *,
    normalizer: Any = None,
    post_processor: Any = None,
    ignore_merges: bool = False,
    added: Iterable[AddedToken] = (),
    **described: Any,
) -> None:
    """Train and save a tokenizer with 500 tokens. Without a pattern it splits text like GPT-2's."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=True)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [] if described.get("tokenizer_class") == "Qwen2Tokenizer" else [END_OF_DOCUMENT]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS[:20], trainer)
    if not special:
        backend.add_special_tokens([END_OF_DOCUMENT])
    backend.add_tokens(list(added))
    if normalizer is not None:
        backend.normalizer = normalizer
    if post_processor is not None:
        backend.post_processor = post_processor
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    described = {"eos_token": END_OF_DOCUMENT} | described
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")


def trained_here(folder: Path) -> None:
    train_tokenizer(TEXTS[:20], 500, folder)


def with_a_gap_in_its_ids(folder: Path) -> None:
    """Save a tokenizer with a gap in its ids, as if tokens had been removed."""
    made(folder, LLAMA3)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.__getitem__)] += 40
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


NAMES_AS_DICT = {"content": END_OF_DOCUMENT, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
KINDS: dict[str, Callable[[Path], None]] = {
    "trained here": trained_here,
    "trained by an earlier version": lambda folder: made(folder, BEFORE, tokenizer_class="TokenizersBackend"),
    "GPT-2's": lambda folder: made(
        folder, None, tokenizer_class="GPT2Tokenizer", post_processor=processors.ByteLevel()
    ),
    "Llama 3's": lambda folder: made(folder, LLAMA3, ignore_merges=True, tokenizer_class="LlamaTokenizerFast"),
    "Qwen2's": lambda folder: made(folder, QWEN2, normalizer=normalizers.NFC(), tokenizer_class="Qwen2Tokenizer"),
    "said to be Qwen2's": lambda folder: made(folder, BEFORE, tokenizer_class="Qwen2Tokenizer"),
    "Qwen2's without its normalizer": lambda folder: made(folder, QWEN2, tokenizer_class="Qwen2TokenizerFast"),
    "NFKC": lambda folder: made(folder, LLAMA3, normalizer=normalizers.NFKC(), eos_token=NAMES_AS_DICT),
    "a gap in its ids": with_a_gap_in_its_ids,
}


def tokenizer_of(kind: str, folder: Path) -> TextTokenizer:
    """Make a tokenizer of this kind in `folder`, and load it."""
    KINDS[kind](folder)
    return load_tokenizer(str(folder), folder / "cache")
