"""transformers 4 computes what was exported; it is installed in `.venv-transformers4` by the Makefile."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from export_cases import COMPARED, PRESETS, Exported, assert_same, export, export_kind, export_preset
from qwen import ENTRIES, qwen2_tokenizer_folder
from tokenizer_kinds import KINDS

from job.data.tokenizer import load_tokenizer

pytestmark = [pytest.mark.export, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-transformers4" / "bin" / "python"
QWEN2 = "Qwen2's own vocabulary"
CASES = [*KINDS, *PRESETS, QWEN2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """A model for each kind of tokenizer, for each file of settings, and one with Qwen2's tokenizer."""
    found = {kind: export_kind(kind, tmp_path_factory.mktemp("kind")) for kind in KINDS}
    found |= {name: export_preset(name, tmp_path_factory.mktemp("preset")) for name in PRESETS}
    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = load_tokenizer(str(qwen2_tokenizer_folder(folder / "tokenizer")), folder / "cache")
    return found | {QWEN2: export(folder / "final", tokenizer)}


@pytest.fixture(scope="module")
def answer(exported: dict[str, Exported]) -> dict[str, Any]:
    """What transformers 4 makes of them all."""
    question = {
        "models": [str(one.folder) for one in exported.values()],
        "tokenizers": [str(exported["trained here"].tokenizer.folder)],
        "texts": COMPARED,
    }
    ended = subprocess.run(
        [PYTHON, "-W", "error::FutureWarning", REPOSITORY / "tests" / "exported.py"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_it_is_transformers_4(answer: dict[str, Any]) -> None:
    assert answer["version"].startswith("4.")


@pytest.mark.parametrize("case", CASES)
def test_transformers_4_computes_what_was_exported(
    case: str, exported: dict[str, Exported], answer: dict[str, Any]
) -> None:
    assert_same(exported[case], answer["models"][CASES.index(case)])


def test_transformers_4_reads_a_tokenizer_that_was_trained_here(
    exported: dict[str, Exported], answer: dict[str, Any]
) -> None:
    (found,) = answer["tokenizers"]
    tokenizer = exported["trained here"].tokenizer
    assert (found["ids"], found["eos_token_id"]) == (tokenizer.encode(COMPARED), tokenizer.eod_id)


def test_the_largest_vocabulary_is_qwen2s(exported: dict[str, Exported]) -> None:
    assert exported[QWEN2].tokenizer.vocab_size == ENTRIES
    assert exported[QWEN2].form.model_type == "qwen2"
