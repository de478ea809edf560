"""Configs: frozen dataclasses, read from YAML strictly and written back resolved."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any, TypeVar

import dacite
import yaml

from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath

T = TypeVar("T")


def at_least_one(config: Any, names: tuple[str, ...], prefix: str = "") -> None:
    """Raises UserError if one of a config's fields is below 1; `prefix` is that of the keys."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{prefix}{name} is {value}; it must be at least 1")


def from_dict(cls: type[T], values: dict[str, Any], where: str, prefix: str = "") -> T:
    """A config dataclass from plain values, nested ones included.

    Where a field may be one of several dataclasses, its key `kind` selects one: each class has a
    field `kind` whose default names the class.

    Args:
      where: source of the values, for messages; `prefix` is that of the keys, such as `data.`.

    Raises UserError for an unknown key (naming the nearest known one), an unknown or missing kind,
    or a value of a wrong type.
    """
    _reject_unknown(cls, values, where, prefix)
    for name, classes in _choices(cls).items():
        if name in values:
            inner = f"{prefix}{name}."
            chosen = _choose(classes, values[name], where, inner)
            values = {**values, name: from_dict(chosen, values[name], where, inner)}
    hooks = {float: _to_float, tuple[str, ...]: _to_names, tuple[int, ...]: _to_tuple}
    try:
        return dacite.from_dict(cls, values, dacite.Config(type_hooks=hooks, strict=True))
    except (dacite.DaciteError, TypeError, ValueError) as error:
        if prefix and isinstance(error, dacite.DaciteFieldError):
            error.update_path(prefix.rstrip("."))
        raise UserError(f"{where}: {error}") from None


def _choices(cls: type) -> dict[str, list[type]]:
    """The fields of a dataclass that may be one of several dataclasses, with those classes."""
    unions = {
        name: [c for c in typing.get_args(hint) if dataclasses.is_dataclass(c)]
        for name, hint in typing.get_type_hints(cls).items()
    }
    return {name: classes for name, classes in unions.items() if len(classes) > 1}


def _choose(classes: list[type], values: dict[str, Any], where: str, prefix: str) -> type:
    """The class selected by the `kind` of the values."""
    kinds = {cls.kind: cls for cls in classes}
    if "kind" not in values:
        raise UserError(f"{where}: {prefix}kind is missing; choose one of {', '.join(kinds)}")
    kind = values["kind"]
    if kind not in list(kinds):  # a list, as YAML may give an unhashable value
        raise UserError(f"{where}: {prefix}kind is {kind!r}; choose one of {', '.join(kinds)}")
    return kinds[kind]


def _to_float(value: Any) -> Any:
    """A float from a YAML integer or from text, as YAML reads 2e-5; other values unchanged."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _to_names(value: Any) -> Any:
    """A tuple from a YAML list or from a single name."""
    if isinstance(value, str):
        return (value,)
    return _to_tuple(value)


def _reject_unknown(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> None:
    _must_map(values, where, prefix)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        nested = fields[key].default_factory
        if key in _choices(cls):
            _must_map(value, where, f"{prefix}{key}.")
        elif dataclasses.is_dataclass(nested):
            _reject_unknown(nested, value, where, f"{prefix}{key}.")


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _must_map(values: Any, where: str, prefix: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'} must map names to values")


def read_yaml(path: AnyPath) -> dict[str, Any]:
    """Reads a YAML mapping. Raises UserError if the file is missing or not one."""
    try:
        values = read_yaml_text(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such config file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {line}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must map names to values")
    return values


def read_yaml_text(text: str) -> Any:
    return yaml.safe_load(text)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, as YAML and JSON take them."""
    plain = lambda x: list(x) if isinstance(x, tuple) else x  # noqa: E731
    return dataclasses.asdict(
        config, dict_factory=lambda items: {key: plain(value) for key, value in items}
    )


def to_yaml(values: dict[str, Any]) -> str:
    """YAML text in the order of the fields."""
    return yaml.safe_dump(values, sort_keys=False)
