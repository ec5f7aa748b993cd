"""YAML that a person has written: no key twice, and nothing in it that takes more memory than a file of settings."""

from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from job.errors import UserError, one_line

_LARGEST_FILE_BYTES = 2**20
_MOST_VALUES = 100_000
_DEEPEST = 20
_LONGEST_NUMBER_BITS = 2**12


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which would let the second of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping as a dict, unless a key stands in it twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number, unless it is so long that Python cannot write it again."""
        with suppress(ValueError):  # Python reads no more than 4,300 digits
            number: int = super().construct_yaml_int(node)
            if number.bit_length() <= _LONGEST_NUMBER_BITS:
                return number
        raise yaml.constructor.ConstructorError(None, None, "a number of thousands of digits", node.start_mark)


UniqueKeys.add_constructor("tag:yaml.org,2002:int", UniqueKeys.construct_yaml_int)


def read_yaml(text: str, loader_type: type[UniqueKeys] = UniqueKeys) -> Any:
    """Read one YAML document, such as a person writes.

    Raises:
        ValueError: it is not YAML, or aliases in it stand for more than any file of settings holds.
    """
    loader: UniqueKeys | None = None
    try:
        loader = loader_type(text)
        document = loader.get_single_node()
        if document is None:
            return None
        _check_extent(document)
        return loader.construct_document(document)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date or number may be one that Python has not
        raise ValueError(one_line(str(error))) from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_extent(document: yaml.Node) -> None:
    """Raises a ValueError if the values of a document are too many: ten aliases of ten aliases are few bytes."""
    waiting, seen = [(document, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if seen > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            waiting += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(child, depth + 1) for child in node.value]


def read_yaml_file(path: Path, setting: str, remedy: str, loader_type: type[UniqueKeys] = UniqueKeys) -> Any:
    """Read a YAML file that a person has written.

    Args:
        path: of the file.
        setting: what named it, for errors.
        remedy: what to do if there is none.
        loader_type: what makes values of YAML.

    Raises:
        UserError: it is missing, cannot be read, or is not YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
        text = content.decode()
    except FileNotFoundError:
        raise UserError(setting, str(path), "no such file", remedy) from None
    except (OSError, ValueError) as error:
        raise UserError(setting, str(path), f"cannot be read: {error}") from None
    if len(content) > _LARGEST_FILE_BYTES:
        raise UserError(
            setting, str(path), f"is larger than {_LARGEST_FILE_BYTES // 2**20} MiB: not a file of settings"
        )
    try:
        return read_yaml(text, loader_type)
    except ValueError as error:
        raise UserError(setting, str(path), f"not valid YAML: {error}") from None
