"""Options that a suite's YAML gives to probes and attacks, held to the functions that take them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from align_unlearn.errors import UserError, unknown_name


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function that are not bound already, each with its type."""
    bound = function.keywords if isinstance(function, partial) else {}
    plain = function.func if isinstance(function, partial) else function
    hints = get_type_hints(plain)
    parameters = inspect.signature(plain).parameters.values()
    return {each.name: hints[each.name] for each in parameters
            if each.kind is inspect.Parameter.KEYWORD_ONLY and each.name not in bound}  # fmt: skip


def check_options(options: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Refuses options that a function would not take, or would stumble over in the middle of an audit.

    Raises:
        UserError: a name is unknown, or a value is of another type; it is named.
    """
    for key, value in options.items():
        if key not in known:
            raise unknown_name("option", str(key), known, where=where)
        if not fits(value, known[key]):
            raise UserError(f"{value!r} is not {in_words(known[key])}.", where=f"{where}: {key}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of a type; a whole number is a number, a truth value is none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list) and bool(value) and all(fits(each, inner[0]) for each in value)
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """A type as a person would say it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(each) for each in inner if each is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        return f"a list of {plural.get(inner[0], 'values')}, such as [{'a' if inner[0] is str else 1}]"
    return {int: "a whole number", float: "a number", str: "a text"}.get(hint, str(hint))
