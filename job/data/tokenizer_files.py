"""The files of a tokenizer: which they are, and what stands in those beside tokenizer.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from job.errors import UserError
from job.json_record import parse_record

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
QWEN2_CLASS, PLAIN_CLASS = "Qwen2Tokenizer", "PreTrainedTokenizerFast"
"""Classes of transformers that both version 4 and 5 know. The plain one does what tokenizer.json says."""
PUT_BACK = "put the right file back, or take another tokenizer"


@dataclass(frozen=True)
class _AddedToken:
    content: str


@dataclass(frozen=True)
class Description:
    """The part of tokenizer_config.json and special_tokens_map.json that is used."""

    eos_token: str | _AddedToken | None = None
    tokenizer_class: str | None = None

    @property
    def eos(self) -> str | None:
        """The end-of-document token."""
        return self.eos_token.content if isinstance(self.eos_token, _AddedToken) else self.eos_token


def described(folder: Path, source: str) -> Description:
    """What the files beside tokenizer.json say; the first that names an end-of-document token counts."""
    found = Description()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                one = parse_record((folder / name).read_bytes(), Description)
            except ValueError as error:
                expected = f"{name} cannot be read: {error}"
                raise UserError("tokenizer.source", source, expected, PUT_BACK) from None
            found = Description(one.eos_token, found.tokenizer_class or one.tokenizer_class)
            if found.eos_token:
                break
    return found


def write_description(folder: Path, tokenizer_class: str, eos_token: str, context_length: int | None = None) -> None:
    """Write the tokenizer_config.json that stands beside a tokenizer.json; transformers 4 and 5 both read it.

    Args:
        folder: a local one.
        tokenizer_class: `QWEN2_CLASS` or `PLAIN_CLASS`.
        eos_token: the end-of-document token.
        context_length: tokens that the model was trained to see at once, if there is a model.
    """
    content: dict[str, object] = {
        "tokenizer_class": tokenizer_class,
        "eos_token": eos_token,
        # Without it transformers 4 also returns token types, which `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if context_length is not None:
        content["model_max_length"] = context_length
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")
