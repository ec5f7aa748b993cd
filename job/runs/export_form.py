"""Choosing the classes of an exported model, so that other programs tokenize text exactly as in training.

`AutoTokenizer` chooses a tokenizer class by the types of model and tokenizer, and some classes replace rules of
tokenizer.json with their own. So each form is tried on texts that are hard to tokenize and on text of the data set, and
is used only if it gives the same token ids. This check runs when training starts, because a model that nobody can use
must not be discovered after the last step. It runs again on the exported files.
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
from job.model.architecture import architecture_of
from job.model.save_folder import CONFIG
from job.model.spec import ModelSpec

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
"""Texts on which tokenizers are likely to differ: digits, combining marks, emoji, code, white space, contractions."""
_SAMPLE_TOKENS = 16_384
"""Tokens of the data set that are decoded for the comparison."""


@dataclass(frozen=True)
class Form:
    """The classes under which a model and its tokenizer are exported."""

    model_type: str
    """The `model_type` in config.json."""
    tokenizer_class: str
    """The `tokenizer_class` in tokenizer_config.json."""
    texts: tuple[str, ...] = ()
    """Documents of the data set on which this form was checked."""


def choose_form(shards_url: str, manifest: Manifest, tokenizer: TextTokenizer, spec: ModelSpec) -> Form:
    """Return the first form in which `AutoTokenizer` gives the same token ids as the data set's tokenizer.

    Args:
        shards_url: folder or URL of the data set.
        manifest: the manifest of the data set.
        tokenizer: the tokenizer that made the data set.
        spec: the model, whose architecture has the forms.

    Raises:
        UserError: there is no such form.
    """
    refuse_surrounding_tokens(tokenizer, "data.shards", shards_url)
    texts, mismatch = _sample_texts(shards_url, manifest, tokenizer), ""
    for written in architecture_of(spec).forms:
        if written.is_for_qwen2_tokenizer and not tokenizer.is_qwen2:
            continue
        form = Form(written.model_type, QWEN2_CLASS if written.is_for_qwen2_tokenizer else PLAIN_CLASS)
        with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
            folder = Path(scratch)
            (folder / CONFIG).write_text(f'{{"model_type": "{form.model_type}"}}', encoding="utf-8")
            write_tokenizer(folder, form, tokenizer)
            mismatch = tokenizer_mismatch(folder, tokenizer, texts)
        if not mismatch:
            return replace(form, texts=tuple(texts))
    expected = f"AutoTokenizer does not give the same token ids as the data set's tokenizer: {mismatch}"
    raise UserError("data.shards", shards_url, expected, "prepare the data again with another tokenizer")


def write_tokenizer(folder: Path, form: Form, tokenizer: TextTokenizer, context_length: int | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json into a local folder that already has the model's config.json."""
    (folder / "tokenizer.json").write_bytes((tokenizer.folder / "tokenizer.json").read_bytes())
    write_description(folder, form.tokenizer_class, tokenizer.eos_token, context_length)


def tokenizer_mismatch(folder: Path, tokenizer: TextTokenizer, texts: Sequence[str]) -> str:
    """Describe how `AutoTokenizer` on a local folder differs from `tokenizer`; empty if it does not differ.

    Texts that contain the name of an added token are not compared: `tokenizer` encodes the name as text, other
    programs as the token.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any error of transformers here would also be raised for the users of the model
        return one_line(f"{type(error).__name__}: {error}")[:200]
    if loaded.get_vocab() != tokenizer.vocabulary:
        different = loaded.get_vocab().items() ^ tokenizer.vocabulary.items()
        return f"the vocabularies differ, for example in {min(different)!r}"
    if loaded.eos_token_id != tokenizer.eod_id:
        return f"the end-of-document id is {loaded.eos_token_id} instead of {tokenizer.eod_id}"
    compared = [text for text in [*HARD_TEXTS, *texts] if not any(token in text for token in tokenizer.added_tokens)]
    loaded_ids: list[list[int]] = loaded(compared, verbose=False)["input_ids"]
    for text, ids, other_ids in zip(compared, tokenizer.encode(compared), loaded_ids, strict=True):
        if ids != other_ids:
            at = next((i for i, pair in enumerate(zip(ids, other_ids, strict=False)) if pair[0] != pair[1]), 0)
            before = tokenizer.decode(ids[:at])
            context = text[max(0, len(before) - 10) :][:30]
            return f"{other_ids[at : at + 5]} instead of {ids[at : at + 5]} at {context!r}"
        if loaded.decode(ids) != tokenizer.decode(ids):
            return f"the tokens of {text[:30]!r} are decoded to another text"
    return ""


def _sample_texts(shards_url: str, manifest: Manifest, tokenizer: TextTokenizer) -> list[str]:
    """Return the first documents of the first validation shard, or of the first training shard if there is none.

    The list is empty if the shard cannot be opened: training opens it again and reports why.
    """
    shards = [shard for shard in [*manifest.validation, *manifest.train] if shard.tokens > 1]
    if not shards:
        return []
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    try:
        with storage.open_read(storage.join(shards_url, shards[0].name)) as file:
            content = file.read(min(shards[0].tokens, _SAMPLE_TOKENS) * dtype.itemsize)
    except storage.StoreError:
        raise
    except OSError:
        return []
    tokens = np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype)
    documents = np.split(tokens, np.flatnonzero(tokens == manifest.eod_id))
    return [tokenizer.decode(ids[ids != manifest.eod_id].tolist()) for ids in documents if len(ids) > 1]
