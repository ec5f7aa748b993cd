"""Exported models give the same results in transformers 4, which the Makefile installs in `.venv-transformers4`."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from export_cases import COMPARED, PRESETS, QWEN3, Exported, assert_same, export, export_kind, export_preset
from qwen import ENTRIES, qwen2_tokenizer_folder
from tokenizer_kinds import KINDS

from job.data.tokenizer import load_tokenizer

pytestmark = [pytest.mark.export, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-transformers4" / "bin" / "python"
QWEN2 = "Qwen2's own vocabulary"
OF_QWEN3 = {f"{kind}, qwen3": kind for kind in [*KINDS, QWEN2]}
CASES = [*KINDS, *PRESETS, QWEN2, *OF_QWEN3]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """One model for each kind of tokenizer, one for each preset, one with Qwen2's tokenizer, and Qwen3 with each."""
    models = {kind: export_kind(kind, tmp_path_factory.mktemp("kind")) for kind in KINDS}
    models |= {name: export_preset(name, tmp_path_factory.mktemp("preset")) for name in PRESETS}
    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = load_tokenizer(str(qwen2_tokenizer_folder(folder / "tokenizer")), folder / "cache")
    models |= {QWEN2: export(folder / "final", tokenizer)}
    for name, kind in OF_QWEN3.items():
        models[name] = export(tmp_path_factory.mktemp("qwen3") / "final", models[kind].tokenizer, QWEN3)
    return models


@pytest.fixture(scope="module")
def results(exported: dict[str, Exported]) -> dict[str, Any]:
    """The results of transformers 4 for all exported models."""
    question = {
        "models": [str(model.folder) for model in exported.values()],
        "tokenizers": [str(exported["trained here"].tokenizer.folder)],
        "texts": COMPARED,
    }
    process = subprocess.run(
        [PYTHON, "-W", "error::FutureWarning", REPOSITORY / "tests" / "exported.py"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    results: dict[str, Any] = json.loads(process.stdout)
    return results


def test_version_under_test_is_transformers_4(results: dict[str, Any]) -> None:
    assert results["version"].startswith("4.")


@pytest.mark.parametrize("case", CASES)
def test_transformers_4_computes_the_exported_model(
    case: str, exported: dict[str, Exported], results: dict[str, Any]
) -> None:
    assert_same(exported[case], results["models"][CASES.index(case)])


def test_transformers_4_reads_a_tokenizer_trained_here(exported: dict[str, Exported], results: dict[str, Any]) -> None:
    (loaded,) = results["tokenizers"]
    tokenizer = exported["trained here"].tokenizer
    assert (loaded["ids"], loaded["eos_token_id"]) == (tokenizer.encode(COMPARED), tokenizer.eod_id)


def test_the_qwen2_case_has_the_whole_qwen2_vocabulary(exported: dict[str, Exported]) -> None:
    assert exported[QWEN2].tokenizer.vocab_size == ENTRIES
    assert exported[QWEN2].form.model_type == "qwen2"
    assert {exported[name].form.model_type for name in OF_QWEN3} == {"qwen3"}
