"""Read and validate launch/swanlab.yaml, the `swanlab/v1` spec of a task."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, StringConstraints, ValidationError

from job.errors import UserError, one_line
from job.yaml_file import UniqueKeys, read_yaml_file

PYTHON = "3.11"
"""Python version of the task. The service offers 3.8 to 3.11, and requirements.lock is made for 3.11."""
Combo = Literal["RTX3090-1", "H800-1"]
"""GPU of a task, as the service names it. Both have one GPU."""


def _check_relative(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError("a path relative to the folder of the spec, without ..")
    return path


def _check_not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("a non-empty text")
    return text


RelativePath = Annotated[StrictStr, AfterValidator(_check_relative)]
NonEmptyText = Annotated[StrictStr, AfterValidator(_check_not_empty)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metadata(_Group):
    """Name and description of the task, and its GPU."""

    name: NonEmptyText
    desc: StrictStr | None = None
    combo: Combo | None = None


class Volume(_Group):
    """An uploaded data set, mounted below /data/."""

    name: StrictStr | None = None
    id: Annotated[StrictStr, StringConstraints(pattern=r"^[0-9A-Za-z]{6}$")]


class TaskSpec(_Group):
    """Python version, entry file, data sets and excluded files of the task."""

    python: Literal["3.8", "3.9", "3.10", "3.11"] = "3.10"
    entry: RelativePath = "train.py"
    volumes: tuple[Volume, ...] = Field((), max_length=1)
    exclude: tuple[RelativePath, ...] = ()


class Spec(_Group):
    """Content of a spec file."""

    apiVersion: Literal["swanlab/v1"]
    kind: Literal["Folder"]
    metadata: Metadata
    spec: TaskSpec


class _IdsAsText(UniqueKeys):
    """YAML loader that keeps every `id` as text, because YAML would read some of the service's ids as numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        for key, value in node.value:
            if key.value == "id" and isinstance(value, yaml.ScalarNode) and mapping["id"] is not None:
                mapping["id"] = value.value
        return mapping


def load_spec(path: Path) -> Spec:
    """Read a spec file.

    Raises:
        UserError: the file cannot be read, a key is unknown, missing or duplicated, the service does not accept a
            value, or the entry file does not exist.
    """
    tree = read_yaml_file(path, "--spec", "launch/swanlab.yaml is an example", _IdsAsText)
    if not isinstance(tree, dict):
        raise UserError("--spec", str(path), "expected apiVersion, kind, metadata and spec", "see launch/swanlab.yaml")
    try:
        spec = Spec.model_validate(_without_nulls(tree))
    except ValidationError as error:
        raise _user_error(error, str(path)) from None
    if spec.spec.python != PYTHON:
        remedy = "requirements.lock is made for this version"
        raise UserError("spec.python", spec.spec.python, f'expected "{PYTHON}"', remedy)
    if not (path.parent / spec.spec.entry).is_file():
        raise UserError("spec.entry", spec.spec.entry, f"there is no such file in {path.parent}", "correct it")
    return spec


def _without_nulls(tree: Any) -> Any:
    """Return the tree without the keys that have no value, as if they were not in the file."""
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value is not None}
    return [_without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def _user_error(error: ValidationError, path: str) -> UserError:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(name, first["input"], "unknown key", "launch/swanlab.yaml lists all keys")
    if first["type"] == "missing":
        return UserError(name, None, f"is missing in {path}", "launch/swanlab.yaml is an example")
    if first["type"] == "too_long":
        return UserError(name, None, "expected at most one volume (data set)", "put all files into one data set")
    if name == "spec.python" and isinstance(first["input"], float):
        return UserError(name, first["input"], "YAML reads this as a number", f'put it in quotes: python: "{PYTHON}"')
    if name.startswith("spec.volumes") and name.endswith(".id"):
        return UserError(name, first["input"], "expected the six characters that `upload` printed")
    return UserError(name, first["input"], f"expected {_expected(first['msg'])}", "launch/swanlab.yaml is an example")


def _expected(message: str) -> str:
    return one_line(message).removeprefix("Value error, ").removeprefix("Input should be ")
