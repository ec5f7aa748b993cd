"""launch/swanlab.yaml, the `swanlab/v1` spec of a task: every mistake is one line that names the key."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, StringConstraints, ValidationError

from job.errors import UserError, one_line
from job.yaml_file import UniqueKeys, read_yaml_file

PYTHON = "3.11"
"""Of the four that the service has (3.8 to 3.11), the one that requirements.lock is for."""


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError("a path relative to the folder of the spec, without ..")
    return path


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text


Inside = Annotated[StrictStr, AfterValidator(_inside)]
NotEmpty = Annotated[StrictStr, AfterValidator(_not_empty)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metadata(_Group):
    """What the task is called, and the GPU it gets."""

    name: NotEmpty
    desc: StrictStr | None = None
    combo: Literal["RTX3090-1", "H800-1"] | None = None


class Volume(_Group):
    """An uploaded data set, mounted below /data/."""

    name: StrictStr | None = None
    id: Annotated[StrictStr, StringConstraints(pattern=r"^[0-9A-Za-z]{6}$")]


class Work(_Group):
    """What the task runs and on what."""

    python: Literal["3.8", "3.9", "3.10", "3.11"] = "3.10"
    entry: Inside = "train.py"
    volumes: tuple[Volume, ...] = Field((), max_length=1)
    exclude: tuple[Inside, ...] = ()


class Spec(_Group):
    """A whole spec."""

    apiVersion: Literal["swanlab/v1"]
    kind: Literal["Folder"]
    metadata: Metadata
    spec: Work


class _IdsAsWritten(UniqueKeys):
    """Takes an id for the text that it is: of those that the service gives out, YAML reads some as numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        for key, value in node.value:
            if key.value == "id" and isinstance(value, yaml.ScalarNode) and mapping["id"] is not None:
                mapping["id"] = value.value
        return mapping


def load_spec(path: Path) -> Spec:
    """The spec in a file.

    Raises:
        UserError: it cannot be read, a key is unknown, missing or twice there, a value is not what the service takes,
            or the entry does not exist.
    """
    tree = read_yaml_file(path, "--spec", "launch/swanlab.yaml is one", _IdsAsWritten)
    if not isinstance(tree, dict):
        raise UserError("--spec", str(path), "expected apiVersion, kind, metadata and spec", "see launch/swanlab.yaml")
    try:
        spec = Spec.model_validate(_without_nulls(tree))
    except ValidationError as error:
        raise _mistake(error, str(path)) from None
    if spec.spec.python != PYTHON:
        raise UserError("spec.python", spec.spec.python, f'expected "{PYTHON}"', "it is what requirements.lock is for")
    if not (path.parent / spec.spec.entry).is_file():
        raise UserError("spec.entry", spec.spec.entry, f"there is no such file in {path.parent}")
    return spec


def _without_nulls(tree: Any) -> Any:
    """A key without a value is as if it was not there."""
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value is not None}
    return [_without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def _mistake(error: ValidationError, path: str) -> UserError:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(name, first["input"], "unknown key", "see launch/swanlab.yaml for all of them")
    if first["type"] == "missing":
        return UserError(name, None, f"is missing in {path}", "see launch/swanlab.yaml")
    if first["type"] == "too_long":
        return UserError(name, None, "expected one volume at most", "put what is needed into one data set")
    if name == "spec.python" and isinstance(first["input"], float):
        return UserError(name, first["input"], "YAML reads this as a number", f'write "{PYTHON}", with quotes')
    if name.startswith("spec.volumes") and name.endswith(".id"):
        return UserError(name, first["input"], "expected the six characters that `upload` has printed")
    return UserError(name, first["input"], f"expected {_expected(first['msg'])}", "see launch/swanlab.yaml")


def _expected(message: str) -> str:
    return one_line(message).removeprefix("Value error, ").removeprefix("Input should be ")
