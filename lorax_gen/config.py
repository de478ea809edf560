"""Configs: frozen dataclasses, read from YAML strictly and written back resolved."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from lorax_gen import documents
from lorax_gen.errors import UserError

T = TypeVar("T")

# Types of fields with a range; `check` enforces it.
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
"""Also a dropout rate: a number from 0 and below 1."""


def check(config: Any, prefix: str = "") -> None:
    """Raises UserError where a field of a config has another type than declared or is out of range.

    Called by the `__post_init__` of a config, so it holds for YAML, options and Python alike.

    Args:
      prefix: of the keys, such as `run.`.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}.")
        else:
            _convert(value, hint, f"{prefix}{name}")


def from_dict(cls: type[T], values: dict[str, Any], where: str, prefix: str = "") -> T:
    """A config dataclass from plain values, nested ones included.

    Where a field may be one of several dataclasses, its key `kind` selects one: each class has a
    field `kind` whose default names the class. A single name may stand for a list of one.

    Args:
      where: source of the values, for messages; `prefix` is that of the keys, such as `data.`.

    Raises UserError for an unknown key (naming the nearest known one), an unknown or missing kind,
    or a value of a wrong type or out of range.
    """
    try:
        return _build(cls, values, prefix)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the file'} must map names to values")
    hints, fields = _hints(cls), dict[str, Any]()
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise UserError(f"unknown key {prefix}{key}; {hint}")
        classes, name = _classes(hints[key]), f"{prefix}{key}"
        if classes and value is None and type(None) in typing.get_args(hints[key]):
            fields[key] = None
        elif classes:
            chosen = classes[0] if len(classes) == 1 else _choose(classes, value, f"{name}.")
            fields[key] = _build(chosen, value, f"{name}.")
        else:
            single = isinstance(value, str) and tuple[str, ...] in (
                hints[key],
                *typing.get_args(hints[key]),
            )
            fields[key] = _convert((value,) if single else value, hints[key], name)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in fields
        and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{', '.join(prefix + name for name in missing)} is missing")
    return cls(**fields)


def _convert(value: Any, hint: Any, name: str) -> Any:
    if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
        known = ", ".join(map(str, typing.get_args(hint)))
        raise UserError(f"{name} is {value!r}; choose one of {known}")
    try:
        return documents.convert(value, hint)
    except UserError as error:
        raise UserError(f"{name} is {value!r}; {error}") from None


def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _classes(hint: Any) -> list[Any]:
    """The dataclasses that a field may be."""
    return [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]


def _choose(classes: list[Any], values: Any, prefix: str) -> Any:
    """The class selected by the `kind` of the values."""
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.')} must map names to values")
    kinds = {cls.kind: cls for cls in classes}
    if "kind" not in values:
        raise UserError(f"{prefix}kind is missing; choose one of {', '.join(kinds)}")
    kind = values["kind"]
    if kind not in list(kinds):  # a list, as YAML may give an unhashable value
        raise UserError(f"{prefix}kind is {kind!r}; choose one of {', '.join(kinds)}")
    return kinds[kind]


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, as YAML and JSON take them."""
    plain = lambda x: list(x) if isinstance(x, tuple) else x  # noqa: E731
    return dataclasses.asdict(
        config, dict_factory=lambda items: {key: plain(value) for key, value in items}
    )
