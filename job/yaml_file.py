"""Reads YAML that a person has written. Refuses duplicate keys, and files that would need too much memory.

Values without quotes mean what YAML 1.2 says. PyYAML reads 1.1, which has surprises: ``010`` is 8, ``1:30`` is 90, and
``on`` is true.
"""

import codecs
import re
import shlex
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from job.errors import UserError, one_line, raise_all

_LARGEST_FILE_BYTES = 2**20
_MOST_VALUES = 100_000
_DEEPEST = 20
_LONGEST_NUMBER_BITS = 2**12
_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_TAB_FIRST = re.compile(r" *\t")
_FULL_WIDTH_COLON = re.compile(r"[ \t]*[A-Za-z_][\w.]*：", re.ASCII)
"""A name and the colon of Chinese text, which YAML takes as a letter."""
_DOTTED_KEY = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)


_TAG = "tag:yaml.org,2002:"
_PLAIN_VALUES = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
"""Type → pattern of the values without quotes that have it, and their first characters. All others are text."""


class UniqueKeys(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys. PyYAML's own loader silently uses the last of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping as a dict. Raises ConstructorError if a key occurs twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                problem = "merge keys (<<) are not read; write the settings out"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number. Raises ConstructorError if it is too long for Python to print."""
        with suppress(ValueError):  # Python reads at most 4,300 digits.
            digits = node.value.replace("_", "")
            number = int(digits, {"0x": 16, "0o": 8}.get(digits[:2], 10))
            if number.bit_length() <= _LONGEST_NUMBER_BITS:
                return number
        raise yaml.constructor.ConstructorError(None, None, "a number of thousands of digits", node.start_mark)


UniqueKeys.add_constructor(f"{_TAG}int", UniqueKeys.construct_yaml_int)
UniqueKeys.yaml_implicit_resolvers = {}
for _type, (_pattern, _first) in _PLAIN_VALUES.items():
    UniqueKeys.add_implicit_resolver(f"{_TAG}{_type}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str, loader_type: type[UniqueKeys] = UniqueKeys) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: the text is not YAML, it is nested too deeply, or its aliases stand for too many values.
    """
    loader: UniqueKeys | None = None
    try:
        loader = loader_type(text)
        document = loader.get_single_node()
        if document is None:
            return None
        _check_extent(document)
        _check_colons(document)
        return loader.construct_document(document)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(one_line(_reason(error, text))) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # Python may not have the date or the number.
        raise ValueError(one_line(str(error).replace('in "<unicode string>",', "at"))) from None
    finally:
        if loader is not None:
            loader.dispose()


def _reason(error: yaml.MarkedYAMLError, text: str) -> str:
    """Return what is wrong in the text, and in which line."""
    mark, problem = error.problem_mark, str(error.problem or error.context)
    if mark is None:
        return problem
    lines = _LINE_END.split(text)[: mark.line + 1]
    if "'\\t'" in problem and _TAB_FIRST.match(lines[-1]):
        return f"line {mark.line + 1:,} begins with a tab; YAML indents with spaces"
    # The parser notices a missing colon only in a later line.
    for number in range(len(lines), 0, -1):
        if _FULL_WIDTH_COLON.match(lines[number - 1]):
            return _full_width_colon(number)
    context = ""
    if error.problem and error.context:
        begin = error.context_mark
        context = f" ({error.context}{f', from {_place(begin)} on' if begin is not None else ''})"
    return f"{_place(mark)}: {problem}{context}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1:,}, column {mark.column + 1:,}"


def _full_width_colon(line: int) -> str:
    return f'line {line:,} has a full-width colon (：); write ":"'


def _check_colons(document: yaml.Node) -> None:
    """Raise ValueError if the document, or a section of it, is a name with a full-width colon instead of settings."""
    sections = [value for _, value in document.value] if isinstance(document, yaml.MappingNode) else []
    for node in (document, *sections):
        if isinstance(node, yaml.ScalarNode) and _FULL_WIDTH_COLON.match(node.value):
            raise ValueError(_full_width_colon(node.start_mark.line + 1))


def _check_extent(document: yaml.Node) -> None:
    """Raise ValueError if a document has too many values or levels: a few nested aliases can stand for millions."""
    pending, count = [(document, 0)], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if count > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            pending += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(child, depth + 1) for child in node.value]


def read_yaml_file(path: Path, setting: str, remedy: str, loader_type: type[UniqueKeys] = UniqueKeys) -> Any:
    """Read a YAML file that a person has written.

    Args:
        path: path of the file.
        setting: the setting, option or variable that names the file, for error messages.
        remedy: what to do if the file does not exist.
        loader_type: the YAML loader.

    Raises:
        UserError: the file is missing, cannot be read, is too large, or is not YAML; or one of its outermost keys has
            a dot.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UserError(setting, str(path), "no such file", remedy) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(setting, str(path), f"cannot be read: {reason}", "name a file of settings") from None
    if len(content) > _LARGEST_FILE_BYTES:
        raise UserError(
            setting, str(path), f"is larger than {_LARGEST_FILE_BYTES // 2**20} MiB: not a file of settings"
        )
    try:
        tree = read_yaml(content.decode(), loader_type)
    except UnicodeDecodeError as error:
        raise UserError(
            setting, str(path), f"is not UTF-8, from byte {error.start:,} on", _convert(path, content)
        ) from None
    except ValueError as error:
        raise UserError(setting, str(path), f"not valid YAML: {error}") from None
    if isinstance(tree, dict):
        raise_all(_dotted_keys(tree))
    return tree


def _convert(path: Path, content: bytes) -> str:
    """Return the command that probably makes a file in UTF-8 of this one."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name, encoding = ("UTF-16", "utf-16") if is_utf16 else ("GBK", "gb18030")
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"if it is in {name}: iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"


def _dotted_keys(tree: dict[Any, Any]) -> Iterator[UserError]:
    """Yield an error for each key such as ``train.epochs``, which is the form of the command line."""
    for key, value in tree.items():
        if isinstance(key, str) and (match := _DOTTED_KEY.fullmatch(key)):
            flow = yaml.safe_dump({match[2]: value}, allow_unicode=True, width=10**6, default_flow_style=True)
            line = flow.strip()[1:-1]
            remedy = f'write "{match[1]}:" and below it, indented, "{line}"'
            yield UserError(key, value, "is not written with a dot in a file", remedy)
