"""What anybody makes of an exported model folder; run as a script by another version of transformers.

python exported.py < question.json > answer.json
"""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

COLUMNS = 500
"""About so many entries of the vocabulary are compared at each position."""


def read_model(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Ids, the logits of the longest text, and what the program in the card prints."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = read_tokenizer(folder, texts)
    ids = max(found["ids"], key=len)[: model.config.max_position_embeddings]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    printed, tokens = run_card(folder)
    said = {"dtype": str(model.dtype), "printed": printed, "tokens": tokens}
    return found | said | {"logits": thinned(logits).tolist()}


def thinned(logits: Any) -> Any:
    """Some of the columns, for a large vocabulary."""
    return logits[:, :: max(1, logits.shape[1] // COLUMNS)]


def read_tokenizer(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Ids, and the texts that they give back."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return {"ids": ids, "texts": [tokenizer.decode(one) for one in ids], "eos_token_id": tokenizer.eos_token_id}


def run_card(folder: Path) -> tuple[str, int]:
    """What the program in the folder's README.md prints, when it is run there as it stands, and how many tokens it has.

    The prompt's are among them.
    """
    (program,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    printed, before, names = io.StringIO(), Path.cwd(), dict[str, Any]()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "README.md", "exec"), names)
    finally:
        os.chdir(before)
    return printed.getvalue(), names["output"].shape[1]


if __name__ == "__main__":
    import transformers

    question = json.load(sys.stdin)
    answer: dict[str, Any] = {"version": transformers.__version__}
    answer["models"] = [read_model(Path(folder), question["texts"]) for folder in question["models"]]
    answer["tokenizers"] = [read_tokenizer(Path(folder), question["texts"]) for folder in question["tokenizers"]]
    json.dump(answer, sys.stdout)
