"""What the value of a setting may be, written in its type hint: ``Annotated[int, Bounds(...)]``."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

type_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))
"""The type hint of every field of a class, with its bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A range of finite numbers; a side left out has no limit."""

    at_least: float | None = None
    """The lower limit, allowed itself."""
    above: float | None = None
    """The lower limit, not allowed itself."""
    at_most: float | None = None
    """The upper limit, allowed itself."""
    below: float | None = None
    """The upper limit, not allowed itself."""

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        limits = dataclasses.asdict(self).items()
        words = [f"{name.replace('_', ' ')} {limit}" for name, limit in limits if limit is not None]
        return "a number " + ", ".join(words) if words else "a finite number"


Count = Annotated[int, Bounds(at_least=1)]
CountOrZero = Annotated[int, Bounds(at_least=0)]
Positive = Annotated[float, Bounds(above=0)]
PositiveOrZero = Annotated[float, Bounds(at_least=0)]
Share = Annotated[float, Bounds(at_least=0, at_most=1)]
AnyNumber = Annotated[float, Bounds()]


def check(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises ValueError that names the setting unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def check_fields(config: Any, section: str = "") -> None:
    """Raises ValueError for a field that its type hint does not allow.

    That is a number of another type or out of its bounds, or a choice that is none. ``section`` is
    the prefix of the field's name, such as ``model.mel.``.
    """
    for name, hint in type_hints(type(config)).items():
        check_value(hint, getattr(config, name), f"{section}{name}")


def check_value(hint: Any, value: Any, name: str) -> None:
    """Raises ValueError, which names ``name``, where the type hint does not allow the value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            check_value(arguments[0], value, name)
    elif origin is Literal:
        check(value in arguments, name, value, f"one of {arguments}")
    elif origin is tuple and arguments[-1] is not Ellipsis:
        several = isinstance(value, tuple) and len(value) == len(arguments)
        check(several, name, value, f"{len(arguments)} values")
        for argument, part in zip(arguments, value, strict=True):
            check_value(argument, part, name)
    elif origin is Annotated:
        kind = numbers.Integral if arguments[0] is int else numbers.Real
        for bounds in arguments[1:]:
            if isinstance(bounds, Bounds):
                number = isinstance(value, kind) and not isinstance(value, bool)
                expected = str(bounds).replace("number", "whole number", arguments[0] is int)
                check(number and value in bounds, name, value, expected)
