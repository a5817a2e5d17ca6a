"""Settings from and to plain values, checked against the dataclasses' type hints."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from slap_fast.config.bounds import check, check_value, type_hints


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
    return override(kind(), values, path)


def override(config: Any, changes: dict[str, Any], path: str = "") -> Any:
    """A copy of ``config`` with settings changed: ``{"model.audio.num_layers": 6}``, or nested as
    in ``{"model": {"audio": {"num_layers": 6}}}``.

    Strings are read as the field's type, as a command line gives them. A setting that depends on a
    changed one, and is not in ``changes``, follows it (``following`` of its dataclass). Raises
    ValueError as :func:`from_dict` does.
    """
    return _replace(config, by_name(type(config), changes, path))


def by_name(kind: type, changes: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Changes of a config of that kind, nested or not, as {dotted name: value}, each one checked.

    ``path`` is the prefix of the names in messages. Raises ValueError as :func:`override` does.
    """
    return dict(_parsed(kind, changes, path))


def derived(before: Any, changes: dict[str, Any], after: Any) -> dict[str, Any]:
    """The settings of ``after = override(before, changes)`` that followed, by dotted name."""
    chosen = by_name(type(before), changes)
    old, new = (dict(flat(config)) for config in (before, after))
    return {name: x for name, x in new.items() if name not in chosen and x != old[name]}


def flat(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting and its value, by dotted name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", value


def _names(kind: type, path: str = "") -> dict[str, Any]:
    """The type hint of every setting and section, by dotted name."""
    names = {}
    for name, hint in type_hints(kind).items():
        names[f"{path}{name}"] = hint
        if dataclasses.is_dataclass(hint):
            names |= _names(hint, f"{path}{name}.")
    return names


def _parsed(kind: type, changes: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """The changes by dotted name, each of its field's type; ``path`` is the prefix in messages."""
    names, pending = _names(kind), list(changes.items())
    while pending:
        key, value = pending.pop(0)
        hint = names.get(key)
        if hint is None:
            raise ValueError(_unknown_setting(path, str(key), names))
        if not dataclasses.is_dataclass(hint):
            parsed = _parse(hint, value, f"{path}{key}")
            check_value(hint, parsed, f"{path}{key}")
            yield key, parsed
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{path}{key}: found {value!r}, expected a mapping")
        pending[:0] = [(f"{key}.{inner}", inner_value) for inner, inner_value in value.items()]


def _replace(config: Any, changes: dict[str, Any]) -> Any:
    """The config with the dotted names changed, from the innermost section outwards."""
    fields: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            fields[head] = value
    for head, inner in nested.items():
        fields[head] = _replace(getattr(config, head), inner)
    followers = config.following(fields) if hasattr(config, "following") else {}
    return dataclasses.replace(config, **(followers | fields))


def _unknown_setting(path: str, key: str, names: dict[str, Any]) -> str:
    section, _, last = key.rpartition(".")
    if section and section in names and not dataclasses.is_dataclass(names[section]):
        return f"{path}{section}: has no settings of its own, found {path}{key!r}"
    # The same name in other sections, then a misspelt one of this section, then of any.
    inside = [name for name in names if name.rpartition(".")[0] == section]
    close = [name for name in names if name.endswith(f".{key}")]
    close = close or [name for name in names if name.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(key, inside, n=1)
    close = close or difflib.get_close_matches(key, names, n=1)
    if close:
        hint = f"did you mean {' or '.join(path + name for name in close[:3])}?"
    else:
        hint = f"known here: {', '.join(name.rpartition('.')[2] for name in inside or _top(names))}"
    return f"{path}{key}: unknown setting; {hint}"


def _top(names: dict[str, Any]) -> list[str]:
    return [name for name in names if "." not in name]


def _parse(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _parse(arguments[0], value, path)
    if origin in (typing.Union, types.UnionType):
        if value is None or value in ("none", "None", "null"):
            return None
        return _parse(arguments[0], value, path)
    if origin is Literal:
        check(value in arguments, path, value, f"one of {arguments}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        check(
            isinstance(items, (list, tuple)) and len(items) == len(arguments),
            path,
            value,
            f"{len(arguments)} values",
        )
        return tuple(_parse(a, v, path) for a, v in zip(arguments, items, strict=True))
    if hint is bool:
        booleans = {True: True, False: False, "true": True, "false": False}
        check(isinstance(value, (bool, str)) and value in booleans, path, value, "true or false")
        return booleans[value]
    if isinstance(value, bool):
        raise ValueError(f"{path}: found {value!r}, expected {hint.__name__}")
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: found {value!r}, expected {hint.__name__}") from None
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{path}: found {value!r}, expected a string")
    if hint is int and isinstance(value, float) and value != number:
        raise ValueError(f"{path}: found {value!r}, expected an integer")
    if hint is float:
        check(math.isfinite(number), path, value, "a finite number")
    return number
