"""Settings from and to plain values, checked against the dataclasses' type hints."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from typing import Any, Literal

_type_hints = functools.cache(typing.get_type_hints)


def check(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises ValueError that names the setting unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def check_positive(config: Any, section: str, *names: str) -> None:
    """Raises ValueError for a field that is not above 0; ``section`` is the prefix of its name,
    such as ``mel.``."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{section}{name}", value, "a positive number")


def check_choices(config: Any, section: str = "") -> None:
    """Raises ValueError for a field outside the Literal of its type hint, likewise."""
    for name, hint in _type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            value, choices = getattr(config, name), typing.get_args(hint)
            check(value in choices, f"{section}{name}", value, f"one of {choices}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any], path: str = "") -> Any:
    """A config from plain JSON values; a field left out keeps its default.

    Raises ValueError that names the path of an unknown key, with the closest known one, or of a
    value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path or kind.__name__}: found {values!r}, expected a mapping")
    hints = _type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(_unknown_setting(f"{path}{key}", str(key), hints))
    return kind(**{k: _parse(hints[k], v, f"{path}{k}") for k, v in values.items()})


def override(config: Any, changes: dict[str, Any], path: str = "") -> Any:
    """A copy of ``config`` with dotted keys changed: ``{"model.audio.num_layers": 6}``.

    Strings are read as the field's type, as a command line gives them. Raises ValueError as
    :func:`from_dict` does.
    """
    hints = _type_hints(type(config))
    fields: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, inner_key = key.partition(".")
        if head not in hints:
            raise ValueError(_unknown_setting(f"{path}{head}", head, hints))
        if inner_key and not dataclasses.is_dataclass(hints[head]):
            raise ValueError(f"{path}{head}: has no settings of its own, found {path}{key!r}")
        if inner_key:
            nested.setdefault(head, {})[inner_key] = value
        else:
            fields[head] = _parse(hints[head], value, f"{path}{head}")
    for head, inner in nested.items():
        fields[head] = override(fields.get(head, getattr(config, head)), inner, f"{path}{head}.")
    return dataclasses.replace(config, **fields)


def _unknown_setting(path: str, key: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{path}: unknown setting{hint} Known here: {', '.join(known)}"


def _parse(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{path}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value in ("none", "None", "null"):
            return None
        return _parse(arguments[0], value, path)
    if origin is Literal:
        check(value in arguments, path, value, f"one of {arguments}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        fits = isinstance(items, (list, tuple)) and len(items) == len(arguments)
        check(fits, path, value, f"{len(arguments)} values")
        return tuple(_parse(a, v, path) for a, v in zip(arguments, items, strict=True))
    if hint is bool:
        booleans = {True: True, False: False, "true": True, "false": False}
        check(isinstance(value, (bool, str)) and value in booleans, path, value, "true or false")
        return booleans[value]
    check(not isinstance(value, bool), path, value, hint.__name__)
    try:
        number = hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: found {value!r}, expected {hint.__name__}") from None
    check(hint is not str or isinstance(value, str), path, value, "a string")
    rounded = hint is int and isinstance(value, float) and value != number
    check(not rounded, path, value, "an integer")
    check(hint is not float or math.isfinite(number), path, value, "a finite number")
    return number
