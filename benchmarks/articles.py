"""Articles for the comparison with the tutorial: generated from the bundled sample, or read from a corpus."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SAMPLE = Path(__file__).parent.parent / "job/demo/sample.jsonl"
MEAN_TOKENS, SIGMA, TOKENS_PER_CHARACTER = 278, 1.6, 0.8
"""Length of an article: mean, log-normal sigma, and tokens per character.

Chinese Wikipedia has 400 M tokens in 1.44 M articles; 230 M of them are in full sequences of 512 tokens. A log-normal
distribution with these parameters has the same mean and the same share of full sequences.
"""


def articles(size_bytes: int, seed: int = 2333) -> Iterator[str]:
    """Generate articles from clauses of the bundled sample until they have `size_bytes` of UTF-8 text."""
    generator = random.Random(seed)
    sample = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    clauses = [clause for clause in re.split(r"(?<=[，。；、！？])|\n", "\n".join(sample)) if clause]
    while size_bytes > 0:
        # The mean of a log-normal distribution is exp(mu + sigma² / 2); this mu makes it 1.
        characters = MEAN_TOKENS / TOKENS_PER_CHARACTER * generator.lognormvariate(-(SIGMA**2) / 2, SIGMA)
        parts = list[str]()
        while sum(map(len, parts)) < characters:
            head, tail = generator.choice(clauses), generator.choice(clauses)
            cut_head = head[: generator.randint(0, len(head))].rstrip("，。；、！？")
            parts.append(cut_head + tail[generator.randint(0, len(tail) - 1) :])
        yield "".join(parts)
        size_bytes -= len("".join(parts).encode())


def first_texts(corpus: Path, size_bytes: int) -> Iterator[str]:
    """Generate the first texts of a JSON lines file until they have `size_bytes` of UTF-8 text."""
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            if size_bytes <= 0:
                return
            text = json.loads(line)["text"]
            yield text
            size_bytes -= len(text.encode())


def texts_of(path: Path) -> list[str]:
    """Return all texts of a JSON lines file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def text_bytes(path: Path) -> int:
    """Return the number of bytes of all texts of a JSON lines file."""
    return sum(len(text.encode()) for text in texts_of(path))


def count_tokens(tokenizer: Path, path: Path) -> tuple[int, int]:
    """Return the numbers of tokens and of texts in a JSON lines file, counted with a tokenizer's folder."""
    from tokenizers import Tokenizer

    texts = texts_of(path)
    encoded = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encoded), len(texts)
