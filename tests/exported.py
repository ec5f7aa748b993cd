"""Reads exported model folders with transformers only. Another version of transformers runs this file as a script:

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
"""Approximate number of logits that are compared at each position."""


def read_model(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Return the ids of the texts, the logits of the longest text, and what the program in the model card prints."""
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
    """Return about `COLUMNS` columns of the logits, evenly spaced."""
    return logits[:, :: max(1, logits.shape[1] // COLUMNS)]


def read_tokenizer(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Return the ids of the texts, and the texts decoded from these ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return {"ids": ids, "texts": [tokenizer.decode(one) for one in ids], "eos_token_id": tokenizer.eos_token_id}


def run_card(folder: Path) -> tuple[str, int]:
    """Run the program in the folder's README.md. Returns its output, and its number of tokens with the prompt's."""
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
