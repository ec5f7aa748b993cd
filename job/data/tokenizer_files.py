"""The files of a tokenizer: their names, and the content of the files that describe tokenizer.json."""

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
"""Classes of transformers that both version 4 and 5 have. The plain class does what tokenizer.json says."""
RESTORE_FILE = "restore the right file, or use another tokenizer"
"""The remedy for a damaged file."""


@dataclass(frozen=True)
class _AddedToken:
    content: str


@dataclass(frozen=True)
class TokenizerDescription:
    """The fields of tokenizer_config.json and special_tokens_map.json that this program uses."""

    eos_token: str | _AddedToken | None = None
    tokenizer_class: str | None = None

    @property
    def eos(self) -> str | None:
        """The end-of-document token."""
        return self.eos_token.content if isinstance(self.eos_token, _AddedToken) else self.eos_token


def read_description(folder: Path, source: str) -> TokenizerDescription:
    """Read the files in a local folder that describe its tokenizer.json.

    The end-of-document token is that of the first file that names one.

    Args:
        folder: the folder.
        source: the tokenizer's source, for error messages.

    Raises:
        UserError: a file is damaged.
    """
    description = TokenizerDescription()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                read = parse_record((folder / name).read_bytes(), TokenizerDescription)
            except ValueError as error:
                expected = f"{name} cannot be read: {error}"
                raise UserError("tokenizer.source", source, expected, RESTORE_FILE) from None
            description = TokenizerDescription(read.eos_token, description.tokenizer_class or read.tokenizer_class)
            if description.eos_token:
                break
    return description


def write_description(folder: Path, tokenizer_class: str, eos_token: str, context_length: int | None = None) -> None:
    """Write the tokenizer_config.json that belongs to a tokenizer.json, for transformers 4 and 5.

    Args:
        folder: a local folder.
        tokenizer_class: `QWEN2_CLASS` or `PLAIN_CLASS`.
        eos_token: the end-of-document token.
        context_length: most tokens that the model was trained to see at once, if there is a model.
    """
    content: dict[str, object] = {
        "tokenizer_class": tokenizer_class,
        "eos_token": eos_token,
        # Without this transformers 4 also returns token types, which `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if context_length is not None:
        content["model_max_length"] = context_length
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")
