"""Check that a config's values have the types and sizes that the constructors they are passed to accept."""

import inspect
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lctrain.errors import InputError

BOUNDS = {  # for values that no constructor checks
    "sequence_length": (2, inf),
    "model.sequence_length": (2, inf),
    "seed": (0, 2**32 - 1),
    "prefill_chunk_size": (1, inf),
    "tuning.r": (1, inf),
    "tuning.lora_dropout": (0, 1),
    "scheduler.num_warmup_steps": (0, inf),
    "scheduler.num_cooldown_steps": (0, inf),
    "trainer.accumulate_grad_batches": (1, inf),
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def check_values(raw: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """Raise InputError for a value of another type than its constructor's annotation, or out of bounds.

    `raw` and `resolved` are the same config before and after its interpolations. Each `_target_` is imported.
    """
    for prefix, node in _targets(raw, resolved):
        hints = _hints(node["_target_"])
        for name in node.keys() & hints.keys():
            if not _fits(node[name], hints[name]):
                raise _refusal(_origin(raw, f"{prefix}{name}"), node[name], _describe(hints[name]))
    for option, (low, high) in BOUNDS.items():
        value = _at(resolved, option)
        if isinstance(value, int | float) and not low <= value <= high:
            raise _refusal(option, value, f"at least {low}" if high == inf else f"within {low} and {high}")


def _targets(raw: Any, resolved: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the prefix and the resolved node of each `_target_` that is written in the node, not interpolated."""
    if isinstance(raw, dict):
        if isinstance(resolved.get("_target_"), str):
            yield prefix, resolved
        for name in raw:
            yield from _targets(raw[name], resolved[name], f"{prefix}{name}.")


def _hints(target: str) -> dict[str, Any]:
    """Return the annotations of a target; empty where it has none, or can't be found: instantiating it reports that."""
    try:
        found: Any = pkgutil.resolve_name(target)
        return get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except (ImportError, AttributeError, NameError, TypeError, ValueError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, dict) and "_target_" in value:  # the object that it builds is checked when it is built
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # of float | Tensor, for example, a config can hold only the float
        return any(_fits(value, each) for each in filter(_is_plain, arguments) or arguments)
    if not _is_plain(hint):
        return True
    if origin is Literal:
        return value in arguments
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_fits(each, arguments[1]) for each in value.values())
    if origin is not None:
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _is_plain(hint: Any) -> bool:
    """Return whether a config can hold a value of this type directly, without a `_target_` that builds it."""
    origin = get_origin(hint)
    return hint in _WORDS or origin is Literal or (isinstance(origin, type) and issubclass(origin, Sequence | Mapping))


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(_describe(each) for each in arguments if _is_plain(each))
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {_describe(arguments[0]).removeprefix('a ')}s" if arguments[0] in (int, float) else "a list"
    return _WORDS.get(hint, "a mapping")


def _origin(raw: Mapping[str, Any], option: str) -> str:
    """Return the option that sets `option`: `sequence_length` where `model.sequence_length` is `${sequence_length}`."""
    link = re.fullmatch(r"\$\{([\w.]+)\}", str(_at(raw, option)))
    return _origin(raw, link[1]) if link else option


def _at(tree: Mapping[str, Any], option: str) -> Any:
    node: Any = tree
    for name in option.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _refusal(option: str, value: Any, expected: str) -> InputError:
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    return InputError(f"{option}={shown} must be {expected}")
