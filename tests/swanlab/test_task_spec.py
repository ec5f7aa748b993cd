"""Tests of the task spec: launch/swanlab.yaml is valid, and every mistake in a spec is a one-line error."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import Launch

from job.errors import EXIT_REFUSED, UserError
from launch.swanlab.cli import SPEC
from launch.swanlab.spec import load_spec

GOOD: dict[str, Any] = {
    "apiVersion": "swanlab/v1",
    "kind": "Folder",
    "metadata": {"name": "WikiLLM", "desc": "a text", "combo": "H800-1"},
    "spec": {
        "python": "3.11",
        "entry": "train.py",
        "volumes": [{"name": "WIKI_CN", "id": "9sqjot"}],
        "exclude": ["WIKI_CN"],
    },
}

MISTAKES: list[tuple[str, Any, str]] = [
    ("apiVersion", "swanlab/v2", "apiVersion: 'swanlab/v2': expected 'swanlab/v1'"),
    ("kind", "File", "kind: 'File': expected 'Folder'"),
    ("kind", None, "kind: is missing"),
    ("owner", "me", "owner: 'me': unknown key"),
    ("metadata", None, "metadata: is missing"),
    ("metadata", "WikiLLM", "metadata: 'WikiLLM': expected"),
    ("metadata.name", None, "metadata.name: is missing"),
    ("metadata.name", "  ", "metadata.name: ' ': expected a non-empty text"),
    ("metadata.name", 5, "metadata.name: 5: expected"),
    ("metadata.combo", "A100-8", "metadata.combo: 'A100-8': expected 'RTX3090-1' or 'H800-1'"),
    ("metadata.gpu", "H800", "metadata.gpu: 'H800': unknown key"),
    ("spec", None, "spec: is missing"),
    ("spec.python", "3.12", "spec.python: '3.12': expected"),
    ("spec.python", 3.11, "spec.python: 3.11: YAML reads this as a number; put it in quotes"),
    ("spec.python", "3.10", "spec.python: '3.10': expected \"3.11\""),
    ("spec.entry", "no.py", "spec.entry: 'no.py': there is no such file"),
    ("spec.entry", "../train.py", "spec.entry: '../train.py': expected a path relative"),
    ("spec.entry", "/train.py", "spec.entry: '/train.py': expected a path relative"),
    ("spec.volumes", [{"id": "9sqjot"}, {"id": "9sqjou"}], "spec.volumes: expected at most one volume (data set)"),
    ("spec.volumes", [{"name": "WIKI_CN"}], "spec.volumes.0.id: is missing"),
    ("spec.volumes", [{"id": "9sqjo"}], "spec.volumes.0.id: '9sqjo': expected the six characters"),
    ("spec.volumes", [{"id": "9sqjot", "path": "/data"}], "spec.volumes.0.path: '/data': unknown key"),
    ("spec.volumes", "9sqjot", "spec.volumes: '9sqjot': expected"),
    ("spec.exclude", "WIKI_CN", "spec.exclude: 'WIKI_CN': expected"),
    ("spec.exclude", ["/data"], "spec.exclude.0: '/data': expected a path relative"),
    ("spec.gpus", 8, "spec.gpus: 8: unknown key"),
]


def write_spec(folder: Path, text: str) -> Path:
    (folder / "train.py").touch()
    path = folder / "swanlab.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed_spec(name: str, value: Any) -> str:
    """Return the good spec with one key changed, or removed if `value` is None."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    group, _, key = name.rpartition(".")
    (tree[group] if group else tree).update({key or name: value})
    if value is None:
        del (tree[group] if group else tree)[key or name]
    return yaml.safe_dump(tree)


def test_shipped_spec_is_valid() -> None:
    assert load_spec(SPEC).spec.entry == "swanlab_task.py"


def test_valid_spec_is_read(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path, yaml.safe_dump(GOOD)))
    assert spec.metadata.combo == "H800-1"
    assert [volume.id for volume in spec.spec.volumes] == ["9sqjot"]
    assert spec.spec.exclude == ("WIKI_CN",)


@pytest.mark.parametrize("written", ["116670", "012345", "0x12ab", "120000", "'116670'"])
def test_id_that_looks_like_a_number_stays_text(tmp_path: Path, written: str) -> None:
    text = changed_spec("spec.volumes", [{"id": "9sqjot"}]).replace("9sqjot", written)
    spec = load_spec(write_spec(tmp_path, text))
    assert [volume.id for volume in spec.spec.volumes] == [written.strip("'")]


def test_key_without_value_is_ignored(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path, changed_spec("spec.volumes", []).replace("volumes: []", "volumes:")))
    assert spec.spec.volumes == ()


@pytest.mark.parametrize(("name", "value", "line"), MISTAKES, ids=[f"{name}={value}" for name, value, _ in MISTAKES])
def test_mistake_is_one_line_that_names_the_key(name: str, value: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_spec(write_spec(tmp_path, changed_spec(name, value)))
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["kind: Folder\nkind: Folder\n", "a: [", "- 1\n", ""], ids=["twice", "broken", "list", "empty"]
)
def test_file_that_is_not_a_spec_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--spec: "):
        load_spec(write_spec(tmp_path, text))


def test_invalid_spec_exits_with_78(tmp_path: Path, launch: Launch) -> None:
    spec = write_spec(tmp_path, changed_spec("spec.gpus", 8))
    result = launch("submit", "--spec", str(spec), "--config", "configs/demo.yaml")
    assert (result.code, result.err.count("\n")) == (EXIT_REFUSED, 1)
    assert result.err.startswith("spec.gpus: 8: unknown key")
