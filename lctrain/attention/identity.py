"""Which patterns mean the same mask, so that what a kernel made of one serves the other."""

from collections.abc import Hashable, Iterable
from dataclasses import fields
from enum import Enum
from functools import cached_property
from typing import Any


def value(pattern: object) -> Hashable | None:
    """Return a pattern's class and fields as nested tuples, equal where masks are; None where they don't tell.

    They tell of a frozen dataclass without other attributes (cached properties apart) whose fields are numbers,
    strings, None, enum members, or lists, tuples, dicts and such dataclasses of these. A tensor or a function is no
    value: it may change, or differ without showing it.
    """
    try:
        return _value(pattern)
    except TypeError:
        return None


def kind(pattern: object) -> Hashable:
    """Return `value`, or an object that equals no other."""
    return value(pattern) or object()


def _value(part: Any) -> Hashable:
    if part is None or isinstance(part, bool | int | float | str | Enum):
        return type(part), part
    return type(part), *map(_value, _inside(part))


def _inside(part: Any) -> Iterable[Any]:
    if isinstance(part, list | tuple):
        return part
    if isinstance(part, dict):
        return part.items()
    params = getattr(type(part), "__dataclass_params__", None)
    if params and params.frozen:
        names = {field.name for field in fields(part)}
        if all(name in names or _is_cached(part, name) for name in getattr(part, "__dict__", {})):
            return [getattr(part, field.name) for field in fields(part)]
    raise TypeError(f"{type(part).__name__} is no value")


def _is_cached(part: object, name: str) -> bool:
    return isinstance(getattr(type(part), name, None), cached_property)
