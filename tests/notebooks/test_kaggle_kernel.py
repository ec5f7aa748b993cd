"""The kernel for Kaggle, read by the code of the `kaggle` package, without a network."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_run import REPOSITORY

pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(600)]

FOLDER = REPOSITORY / "launch/kaggle"
PYTHON = Path(os.environ.get("KAGGLE", REPOSITORY / ".venv-kaggle" / "bin" / "python"))


def push(folder: Path, home: Path, *commands: list[str]) -> dict[str, Any]:
    ended = subprocess.run(
        ["unshare", "--net", PYTHON, Path(__file__).with_name("push.py"), folder],
        input=json.dumps(commands),
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def header_commands() -> list[list[str]]:
    header = sources((FOLDER / "wikillm.ipynb").read_text(encoding="utf-8"))[0][1]
    return [shlex.split(command) for command in re.findall(r"`(kaggle [^`]+)`", header)]


def sources(notebook: str) -> list[tuple[str, str]]:
    """Return type and text of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]


def test_kaggle_accepts_the_kernel_and_the_commands(tmp_path: Path) -> None:
    answer = push(FOLDER, tmp_path, *header_commands())
    request = answer["push"]["request"]
    assert answer["push"]["printed"] == "", "a warning about the metadata"
    sent = sources(request.pop("text"))
    assert sent == sources((FOLDER / "wikillm.ipynb").read_text(encoding="utf-8")), "every cell is sent as it is"
    assert request == {
        "slug": "USERNAME/wikillm",
        "newTitle": "WikiLLM",
        "language": "python",
        "kernelType": "notebook",
        "isPrivate": True,
        "enableGpu": True,
        "enableTpu": False,
        "enableInternet": True,
        "machineShape": "NvidiaTeslaT4Highmem",
    }
    called = [command["function"].removesuffix("_cli") for command in answer["commands"]]
    assert called == ["kernels_push", "kernels_status", "kernels_logs", "kernels_output", "kernels_delete"]
    options = {command["function"]: command["options"] for command in answer["commands"]}
    assert options["kernels_push_cli"]["folder"] == "launch/kaggle"
    assert re.search(options["kernels_output_cli"]["file_pattern"], "run/final/model.safetensors")


@pytest.mark.parametrize(
    ("change", "sent"),
    [
        ({"kernel_sources": ["USERNAME/wikillm"]}, {"kernelDataSources": ["USERNAME/wikillm"]}),
        ({"dataset_sources": ["USERNAME/corpus"]}, {"datasetDataSources": ["USERNAME/corpus"]}),
    ],
    ids=["own output", "data set"],
)
def test_kaggle_accepts_inputs(change: dict[str, Any], sent: dict[str, Any], tmp_path: Path) -> None:
    request = push(changed(tmp_path, change), tmp_path)["push"]["request"]
    assert {name: request[name] for name in sent} == sent


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kernel_type": "notebooks"}, "kernel type"),
        ({"kernel_sources": ["wikillm"]}, "Kernel must be specified"),
        ({"code_file": "train.ipynb"}, "Source file not found"),
    ],
    ids=["type", "source", "file"],
)
def test_kaggle_refuses_wrong_metadata(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert named in push(changed(tmp_path, change), tmp_path)["push"]["error"]


def changed(folder: Path, change: dict[str, Any]) -> Path:
    """Return a copy of the kernel's folder with changed metadata."""
    copy = folder / "kernel"
    shutil.copytree(FOLDER, copy)
    metadata = json.loads((copy / "kernel-metadata.json").read_text(encoding="utf-8"))
    (copy / "kernel-metadata.json").write_text(json.dumps(metadata | change), encoding="utf-8")
    return copy
