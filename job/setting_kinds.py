"""What a setting can be: lengths of time, ranges of steps, and the limits that every number of the tree has."""

import re
import types
from typing import Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function, str_schema

YEAR_SECONDS = 365 * 24 * 3600
_LARGEST_NUMBER = 2**63 - 1
"""Of whole numbers without a limit of their own: what other programs and files can hold."""
_LARGEST_FLOAT = 1e12
_SIZE = re.compile(r"\d*\.?\d+\s*[a-zA-Z]*")
_MOST_DIGITS = 18
"""Of a step."""


class Duration(str):
    """A length of time as a person writes it: ``3h50m``, ``90s``, ``01:30:00``, or a number of seconds."""

    _FORM = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?|(\d+):(\d\d):(\d\d)")

    @property
    def seconds(self) -> float:
        """Its length."""
        found = self._FORM.fullmatch(self)
        assert found is not None
        days, hours, minutes, seconds = (float(found[i] or 0) for i in (1, 2, 3, 4))
        clock = [float(found[i] or 0) for i in (5, 6, 7)]
        return 86400 * days + 3600 * (hours + clock[0]) + 60 * (minutes + clock[1]) + seconds + clock[2]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(cls._checked, str_schema(coerce_numbers_to_str=True))

    @classmethod
    def _checked(cls, text: str) -> "Duration":
        if not cls._FORM.fullmatch(text) or not 0 < cls(text).seconds <= YEAR_SECONDS:
            raise ValueError("a time above 0 and up to a year, such as 3h50m, 90s or 01:30:00")
        return cls(text)


class StepRange(str):
    """From one step to a later one, ``10:13``: three steps."""

    @property
    def ends(self) -> tuple[int, int]:
        """Steps that are done when it begins, and when it ends."""
        first, last = map(int, self.split(":"))
        return first, last

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(cls._checked, str_schema(coerce_numbers_to_str=True))

    @classmethod
    def _checked(cls, text: str) -> "StepRange":
        first, colon, last = text.partition(":")
        are_steps = colon and all(one.isdecimal() and len(one) <= _MOST_DIGITS for one in (first, last))
        if not are_steps or int(first) >= int(last):
            raise ValueError('a step and a later one, such as 10:13 (in a file with quotes: "10:13")')
        return cls(text)


def setting(default: Any, meaning: str, *, unit: str = "", **constraints: Any) -> Any:
    """A field of the tree: its default, what it means, the unit it is counted in, and pydantic's constraints."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, validate_default=True, **constraints)


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type: (int, NoneType) of ``int | None``, otherwise the type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


class Section(BaseModel):
    """A group of settings; unknown keys are errors, and a section never changes once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_and_no_are_not_numbers(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, value in values.items():
                field = cls.model_fields.get(name)
                if isinstance(value, bool) and field is not None and bool not in members(field.annotation):
                    values = values | {name: "true" if value else "false"}
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _is_all_of_a_size(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a text of which pydantic would read the beginning alone: ``1:30`` as one byte."""
        is_size = ByteSize in members(cls.model_fields[str(info.field_name)].annotation)
        if is_size and isinstance(value, str) and not _SIZE.fullmatch(value.strip()):
            raise ValueError("a number and a unit, such as 64MiB")
        return value

    @field_validator("*")
    @classmethod
    def _is_of_a_possible_size(cls, value: Any) -> Any:
        largest = _LARGEST_FLOAT if isinstance(value, float) else _LARGEST_NUMBER
        if isinstance(value, int | float) and abs(value) > largest:
            raise ValueError(f"at most {largest:,}")
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            raise ValueError("a text without the character 0, which no path can have")
        return value
