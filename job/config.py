"""The settings: one typed tree, which gives each setting its type, default, unit and help text.

A value is the default of the tree, unless the file given by ``--config`` sets it, or ``--section.key value`` on the
command line, which takes precedence. The help, ``--print-config`` and the commented files in ``configs/`` are generated
from this tree.

The sections are in `job.config_data` and `job.config_training`. This file puts them together, reads them and prints
them.
"""

import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ByteSize, ValidationError, model_validator
from pydantic.fields import FieldInfo

from job.config_data import Data, Run, Store, Tokenizer
from job.config_training import Checkpoint, DeviceSetting, Evaluate, Generate, Model, Tracking, Train
from job.errors import UserError, raise_all
from job.redaction import learn_urls, redacted_tree
from job.setting_kinds import Duration, Section, StepRange, alternatives
from job.suggestions import hint
from job.yaml_file import read_yaml, read_yaml_file

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "DeviceSetting",
    "Duration",
    "Evaluate",
    "Generate",
    "Model",
    "Run",
    "Setting",
    "Store",
    "Tokenizer",
    "Tracking",
    "Train",
    "as_yaml",
    "build",
    "load",
    "settings",
    "to_dict",
    "to_yaml",
    "unknown_setting",
]
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
"""Characters that break a line in YAML, or that YAML does not allow."""
_WHOLE_NUMBER = "whole number"
_EXAMPLE = "see configs/demo.yaml"
_LEAST_LIKENESS_OF_OPTION = 0.8
_LONGEST_REASON = 200
"""Characters of the reason why a value is wrong. The reason may repeat the value, which may be long."""


class Config(Section):
    """All settings of WikiLLM."""

    run: Run = Run()
    store: Store = Store()
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    generate: Generate = Generate()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _learn_secrets_in_urls(self) -> "Config":
        learn_urls(*(value for _, section in self for _, value in section if isinstance(value, str)))
        return self


@dataclass(frozen=True)
class Setting:
    """A setting as the help shows it."""

    name: str
    """The section and the key, such as ``train.epochs``."""
    kind: str
    """The type in words, such as ``whole number or null``."""
    meaning: str
    """The help text."""
    default: str
    """The default as it is written in YAML."""
    unit: str
    """Unit of the number, such as ``seconds``; empty if it has none."""

    @property
    def type_and_unit(self) -> str:
        """The type with the unit, such as ``number in seconds`` or ``whole number of steps or null``."""
        if not self.unit:
            return self.kind
        first, alternative, others = self.kind.partition(" or ")
        return f"{first} {'of' if first == _WHOLE_NUMBER else 'in'} {self.unit}{alternative}{others}"


@cache
def settings() -> tuple[Setting, ...]:
    """Return all settings, in the order of the tree."""
    return tuple(_settings())


def _settings() -> Iterator[Setting]:
    for name, section in _sections():
        for key, field in section.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            yield Setting(
                name=f"{name}.{key}",
                kind=_kind(field),
                meaning=field.description or "",
                default=as_yaml(field.default),
                unit=str(extra.get("unit", "")),
            )


def load(
    path: str | None,
    overrides: Sequence[tuple[str, str]] = (),
    named_by: str = "--config",
    options: Sequence[str] = (),
) -> Config:
    """Return the settings of a file with overrides applied.

    Args:
        path: a YAML file; None: use the defaults.
        overrides: pairs of a setting's dotted name and the value as typed on a command line.
        named_by: the option or variable that names the file, for error messages.
        options: options of the command, such as ``--place``, which an error suggests for an unknown setting like them.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is of the wrong type or out of range. One
            error names all unknown keys, or all wrong values.
    """
    tree = _read_settings(path, named_by) if path is not None else {}
    names = {setting.name for setting in settings()}
    unknown_overrides = (unknown_setting(name, options=options) for name, _ in overrides if name not in names)
    raise_all(chain(_unknown_keys(tree), unknown_overrides))
    for name, text in overrides:
        section, _, key = name.partition(".")
        values = tree.setdefault(section, {})
        if values is None:
            values = tree[section] = {}
        values[key] = _parse_override(name, text)
    return build(tree)


def build(tree: dict[str, Any]) -> Config:
    """Return the settings in a nested dict of sections and keys. Raises UserError as `load` does."""
    raise_all(_unknown_keys(tree))
    try:
        return Config.model_validate({section: values or {} for section, values in tree.items()})
    except ValidationError as error:
        mistakes: dict[str, UserError] = {}
        for detail in error.errors(include_url=False):
            name = ".".join(str(part) for part in detail["loc"][:2])
            # pydantic reports a setting once for each alternative of its type; the first report is enough.
            mistakes.setdefault(name, UserError(name, detail["input"], _expected(name, detail["msg"]), "see --help"))
        raise_all(mistakes.values())
        raise


def to_yaml(config: Config) -> str:
    """Return the settings as a commented YAML file. Reading this file gives the same settings."""
    described = {setting.name: setting for setting in settings()}
    lines: list[str] = []
    for name, section in _sections():
        lines += ([""] if lines else []) + [f"# {section.__doc__}", f"{name}:"]
        for key, value in getattr(config, name):
            setting = described[f"{name}.{key}"]
            comment = f"{setting.meaning}. ({setting.type_and_unit}; default {setting.default})"
            lines += textwrap.wrap(comment, 116, initial_indent="  # ", subsequent_indent="  #   ")
            lines += [f"  {key}: {as_yaml(value)}"]
    return "\n".join(lines) + "\n"


def to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as plain values without secrets, for the run's record and the tracker.

    Two signed URLs that differ only in the signature give equal values.
    """
    tree: dict[str, Any] = redacted_tree(config.model_dump(mode="json"))
    return tree


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        yield name, field.annotation


def _kind(field: FieldInfo) -> str:
    names = {str: "text", int: _WHOLE_NUMBER, float: "number", bool: "true or false", ByteSize: "size",
             Duration: "length of time", StepRange: "range of steps", list[str]: "list of texts",
             type(None): "null"}  # fmt: skip
    kinds = [
        " | ".join(map(str, get_args(alternative))) if get_origin(alternative) is Literal else names[alternative]
        for alternative in alternatives(field.annotation)
    ]
    return " or ".join(kinds)


def as_yaml(value: Any) -> str:
    """Return a value as a person would write it in YAML."""
    if isinstance(value, ByteSize):
        power = next((power for power in (3, 2, 1) if value and value % 2 ** (10 * power) == 0), 0)
        return f"{value // 2 ** (10 * power)}{('', 'KiB', 'MiB', 'GiB')[power]}"
    if isinstance(value, str):
        plain = yaml.safe_dump(str(value), allow_unicode=True, width=10**6).removesuffix("...\n").strip()
        return plain if "\n" not in plain and read_yaml(plain) == value else _as_json(value)
    return _as_json(value)


def _as_json(value: Any) -> str:
    """Return a value as JSON that is also valid YAML."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _read_settings(path: str, named_by: str) -> dict[str, Any]:
    tree = read_yaml_file(Path(path), named_by, "presets are in configs/")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(named_by, path, f"expected sections with settings, found {type(tree).__name__}", _EXAMPLE)
    return tree


def _unknown_keys(tree: dict[str, Any]) -> Iterator[UserError]:
    """Yield an error for each unknown section, for each unknown key, and for each section that is not a mapping."""
    sections = dict(_sections())
    for name, values in tree.items():
        if name not in sections:
            yield _unknown_section(str(name), values, list(sections))
        elif not isinstance(values, dict | None):
            yield UserError(name, values, "expected settings under it (key: value)", _EXAMPLE)
        else:
            known = sections[name].model_fields
            for key in [key for key in values or {} if key not in known]:
                yield unknown_setting(f"{name}.{key}", (values or {})[key])


def _unknown_section(name: str, values: Any, sections: list[str]) -> UserError:
    if not isinstance(values, dict | None):
        return unknown_setting(name, values)  # It has a value, so it is a setting outside of any section.
    close = difflib.get_close_matches(name, sections, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"sections are {', '.join(sections)}"
    return UserError(name, None, "unknown section of settings", remedy)


def unknown_setting(name: str, value: Any = None, options: Sequence[str] = ()) -> UserError:
    """Return the error for a setting that does not exist, with the setting or option that was probably meant."""
    remedy = hint(name, [setting.name for setting in settings()])
    if close := difflib.get_close_matches(f"--{name}", options, n=1, cutoff=_LEAST_LIKENESS_OF_OPTION):
        remedy = f"did you mean {close[0]}?"
    return UserError(name, value, "unknown setting", remedy or "see --help for all settings")


def _parse_override(name: str, text: str) -> Any:
    """Return the text typed for a setting as the value that YAML would have given."""
    section, _, key = name.partition(".")
    kinds = alternatives(dict(_sections())[section].model_fields[key].annotation)
    if type(None) in kinds and text.lower() in ("null", "none", ""):
        return None
    if list[str] in kinds:
        try:
            return read_yaml(text)
        except ValueError:
            raise UserError(name, text, "expected a list", 'for example \'["一", "二"]\'') from None
    return text


def _expected(name: str, message: str) -> str:
    """Return what is wrong with a setting's value and what was expected, from the message of pydantic."""
    setting = next((setting for setting in settings() if setting.name == name), None)
    if setting is None:
        return message
    reason = message.removeprefix("Input ").removeprefix("Value error, ")[:_LONGEST_REASON]
    return f"expected {setting.type_and_unit}: {reason}"
