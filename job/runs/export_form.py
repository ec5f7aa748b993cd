"""Which form a model is written in, so that other people's tools cut a text into the tokens that it was trained on.

`AutoTokenizer` chooses a class by the model's type and the tokenizer's, and some classes put rules of their own in the
place of those in tokenizer.json. So every form is tried, on texts made to be hard and on text of the data set, and one
is taken only if it gives the same ids. This is done when a run starts, since a run must not learn at its last step that
nobody can use what it made, and once more with the files that it wrote.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from job import storage
from job.data.manifest import Manifest
from job.data.tokenizer import TextTokenizer, refuse_surrounding_tokens
from job.data.tokenizer_files import PLAIN_CLASS, QWEN2_CLASS, write_description
from job.errors import UserError, one_line
from job.model.save_folder import CONFIG, ModelType

HARD_TEXTS = (
    "",
    "2024年1月31日，共1234567890人，占12.5%；０１２３，Ⅷ½²",
    "café cafe\u0301 é\u0323\u0302 Z\u0351\u036b 각\u11a8 שָׁלוֹם ﷺ สวัสดี",
    "नमस्ते दुनिया, क्षत्रिय १२३",
    "👩\u200d👩\u200d👧👍🏽🇨🇳🤖 a👍🏽b",
    "def f(x):\n    return {'a': x[0], \"b\": x**2}  # it's\n\n\tpass\r\n\r\n",
    " a  b   c \u3000全角\u00a0 \n\n  x\t\ty \u200b ",
    "The cat's out, they'VE, we'll, I'D, ſ's…——！？《》 \x00\x07\ufeff",
    "ﬁ 﨎﨑 Å Ω 𠀀𪚥 \U0010ffff",
)
_SAMPLE_TOKENS = 16_384


@dataclass(frozen=True)
class Form:
    """How a model and its tokenizer are written."""

    model_type: ModelType
    tokenizer_class: str
    texts: tuple[str, ...] = ()
    """Documents of the data set, for which it gives the same ids."""


_QWEN2, _PLAIN = Form("qwen2", QWEN2_CLASS), Form("llama", PLAIN_CLASS)


def choose_form(shards_url: str, manifest: Manifest, tokenizer: TextTokenizer) -> Form:
    """The first form in which `AutoTokenizer` gives the ids of a data set's tokenizer.

    Args:
        shards_url: of the data set, whose first documents are tried.
        manifest: the data set.
        tokenizer: the one that made it.

    Raises:
        UserError: there is none.
    """
    refuse_surrounding_tokens(tokenizer, "data.shards", shards_url)
    texts, why_not = _sample_texts(shards_url, manifest, tokenizer), ""
    for form in (_QWEN2, _PLAIN) if tokenizer.is_qwen2 else (_PLAIN,):
        with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
            folder = Path(scratch)
            (folder / CONFIG).write_text(f'{{"model_type": "{form.model_type}"}}', encoding="utf-8")
            write_tokenizer(folder, form, tokenizer)
            why_not = other_ids(folder, tokenizer, texts)
        if not why_not:
            return replace(form, texts=tuple(texts))
    expected = f"AutoTokenizer does not give the ids of its tokenizer: {why_not}"
    raise UserError("data.shards", shards_url, expected, "prepare again with another tokenizer")


def write_tokenizer(folder: Path, form: Form, tokenizer: TextTokenizer, context_length: int | None = None) -> None:
    """Write the tokenizer's files for `AutoTokenizer` into a local folder that has the model's config.json."""
    (folder / "tokenizer.json").write_bytes((tokenizer.folder / "tokenizer.json").read_bytes())
    write_description(folder, form.tokenizer_class, tokenizer.eos_token, context_length)


def other_ids(folder: Path, tokenizer: TextTokenizer, texts: Sequence[str]) -> str:
    """What `AutoTokenizer` on a local folder does otherwise than `tokenizer`; empty if nothing.

    Texts with the name of an added token are left out: to `tokenizer` that is text, to others the token.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever makes transformers fail, it fails for everybody
        return one_line(f"{type(error).__name__}: {error}")[:200]
    if loaded.get_vocab() != tokenizer.vocabulary:
        other = loaded.get_vocab().items() ^ tokenizer.vocabulary.items()
        return f"another vocabulary, such as {min(other)!r}"
    if loaded.eos_token_id != tokenizer.eod_id:
        return f"the end of a document is {loaded.eos_token_id} instead of {tokenizer.eod_id}"
    plain = [text for text in [*HARD_TEXTS, *texts] if not any(token in text for token in tokenizer.added_tokens)]
    found: list[list[int]] = loaded(plain, verbose=False)["input_ids"]
    for text, ids, other_ids in zip(plain, tokenizer.encode(plain), found, strict=True):
        if ids != other_ids:
            at = next((i for i, pair in enumerate(zip(ids, other_ids, strict=False)) if pair[0] != pair[1]), 0)
            before = tokenizer.decode(ids[:at])
            near = text[max(0, len(before) - 10) :][:30]
            return f"{other_ids[at : at + 5]} instead of {ids[at : at + 5]} at {near!r}"
        if loaded.decode(ids) != tokenizer.decode(ids):
            return f"another text for the tokens of {text[:30]!r}"
    return ""


def _sample_texts(shards_url: str, manifest: Manifest, tokenizer: TextTokenizer) -> list[str]:
    """The first documents of the validation shards, of the training shards if nothing is held out.

    Empty if the shard cannot be opened: its reader in training says why.
    """
    shards = [shard for shard in [*manifest.validation, *manifest.train] if shard.tokens > 1]
    if not shards:
        return []
    stored = np.dtype(manifest.dtype).newbyteorder("<")
    try:
        with storage.open_read(storage.join(shards_url, shards[0].name)) as file:
            content = file.read(min(shards[0].tokens, _SAMPLE_TOKENS) * stored.itemsize)
    except storage.StoreError:
        raise
    except OSError:
        return []
    tokens = np.frombuffer(content[: len(content) // stored.itemsize * stored.itemsize], stored)
    documents = np.split(tokens, np.flatnonzero(tokens == manifest.eod_id))
    return [tokenizer.decode(ids[ids != manifest.eod_id].tolist()) for ids in documents if len(ids) > 1]
