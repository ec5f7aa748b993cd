"""The types of settings: lengths of time, ranges of steps, and sections with the limits that hold for every setting."""

import re
import types
from typing import Annotated, Any, Final, Union, get_args, get_origin

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

AUTO: Final = "auto"
"""Value of a setting that the program chooses by itself."""
YEAR_SECONDS = 365 * 24 * 3600
_LARGEST_NUMBER = 2**63 - 1
"""Upper limit of whole numbers without a limit of their own: the largest that files and other programs can hold."""
_LARGEST_FLOAT = 1e12
_SIZE = re.compile(r"\d*\.?\d+\s*[a-zA-Z]*")
_MOST_STEP_DIGITS = 18


class Duration(str):
    """A length of time as text: ``3h50m``, ``90s``, ``01:30:00``, or a number of seconds."""

    _FORM = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?|(\d+):(\d\d):(\d\d)")

    @property
    def seconds(self) -> float:
        """Length of time in seconds."""
        match = self._FORM.fullmatch(self)
        assert match is not None
        days, hours, minutes, seconds = (float(match[i] or 0) for i in (1, 2, 3, 4))
        clock = [float(match[i] or 0) for i in (5, 6, 7)]
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
    """A range of steps as text: ``10:13`` are the three steps after step 10."""

    @property
    def ends(self) -> tuple[int, int]:
        """Number of steps done when the range begins, and when it ends."""
        first, last = map(int, self.split(":"))
        return first, last

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(cls._checked, str_schema(coerce_numbers_to_str=True))

    @classmethod
    def _checked(cls, text: str) -> "StepRange":
        first, colon, last = text.partition(":")
        are_steps = colon and all(end.isdecimal() and len(end) <= _MOST_STEP_DIGITS for end in (first, last))
        if not are_steps or int(first) >= int(last):
            raise ValueError("a step and a later one, such as 10:13")
        return cls(text)


def setting(default: Any, meaning: str, *, unit: str = "", **constraints: Any) -> Any:
    """Return a field of a section.

    Args:
        default: the default value.
        meaning: the help text, without a period at the end.
        unit: unit of a number, such as ``seconds`` or ``steps``; empty if it has none.
        constraints: limits that pydantic checks, such as ``ge=1``.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, validate_default=True, **constraints)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, such as (int, NoneType) for ``int | None``; for any other type, that type alone.

    Limits of one type of the union, as in ``Annotated[int, Field(ge=1)]``, are left out.
    """
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)


class Section(BaseModel):
    """A group of settings. It is immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_for_numbers(cls, values: Any) -> Any:
        """Replace booleans given to settings of other types by text: pydantic refuses text, but takes True for 1."""
        if isinstance(values, dict):
            for name, value in values.items():
                field = cls.model_fields.get(name)
                if isinstance(value, bool) and field is not None and bool not in alternatives(field.annotation):
                    values = values | {name: "true" if value else "false"}
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _check_whole_size(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a size with text after it that pydantic would ignore: it reads ``1:30`` as one byte."""
        is_size = ByteSize in alternatives(cls.model_fields[str(info.field_name)].annotation)
        if is_size and isinstance(value, str) and not _SIZE.fullmatch(value.strip()):
            raise ValueError("a number and a unit, such as 64MiB")
        return value

    @field_validator("*")
    @classmethod
    def _check_limits(cls, value: Any) -> Any:
        largest = _LARGEST_FLOAT if isinstance(value, float) else _LARGEST_NUMBER
        if isinstance(value, int | float) and abs(value) > largest:
            raise ValueError(f"at most {largest:,}")
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            raise ValueError("a text without the character 0, which no path can have")
        return value
