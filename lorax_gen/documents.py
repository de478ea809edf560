"""JSON and YAML that people and other programs wrote: parsed within limits, checked against types.

A document is refused, not repaired. It must be within a size, depth and range of numbers that any
program can handle, and hold each key once: of two values one would be dropped in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import msgspec
import yaml

from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath

T = TypeVar("T")

MAX_BYTES = 64 << 20  # the largest: an index of the tensors of a large model
MAX_YAML_BYTES = 1 << 20  # PyYAML reads about 100 kB/s
MAX_DEPTH = 50
MAX_VALUES = 100_000  # of a YAML document, with its aliases expanded


def parse_json(text: str | bytes, where: str, most: int = MAX_BYTES) -> Any:
    """The value of a JSON text, which may begin with a byte order mark.

    Args:
      where: source of the text, for messages.
      most: the largest size of the text.

    Raises UserError where it is invalid or beyond the limits, has a key twice in an object, or has
    NaN, an infinity, an integer beyond 64 bits or half a surrogate pair.
    """

    def parse(text: str) -> Any:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)

    return _parsed(parse, text, where, "JSON", most)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text; see `parse_json`. Aliases count as often as they are used."""
    return _parsed(lambda text: yaml.load(text, _Loader), text, where, "YAML", MAX_YAML_BYTES)


def convert(value: Any, kind: type[T], where: str = "") -> T:
    """A plain value as a type: a dataclass, a `msgspec.Struct`, `tuple[str, ...]`, or a number with
    `Annotated[int, msgspec.Meta(ge=1)]`. Nothing is guessed: `True` is no integer, `'1'` no number.

    Args:
      where: source of the value, for messages.

    Raises UserError where the value has another type or is out of range.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, key = str(error).replace("`", "").partition(" - at $")
        message = f"{message[:1].lower()}{message[1:]}"
        parts = [where, key.lstrip("."), message]
        raise UserError(": ".join(part for part in parts if part)) from None


def read_bytes(path: AnyPath, most: int = MAX_BYTES) -> bytes:
    """The content of a document; raises UserError where it is missing, unreadable or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from None
    if len(data) > most:
        raise UserError(f"{path} is too large; expected at most {most:,} bytes")
    return data


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file; raises UserError where it is missing, invalid or not an object."""
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def read_yaml(path: AnyPath) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError where it is missing, invalid or not one."""
    value = parse_yaml(read_bytes(path, MAX_YAML_BYTES), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} must map names to values")
    return value


def to_yaml(values: dict[str, Any]) -> str:
    """YAML text that `parse_yaml` reads as the same values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _parsed(
    parse: Callable[[str], Any], text: str | bytes, where: str, kind: str, most: int
) -> Any:
    if len(text) > most:
        raise UserError(f"{where} has {len(text):,} bytes of {kind}; expected at most {most:,}")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        value = parse(text)
        _check_values(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; expected {MAX_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{where} is not valid {kind} ({' '.join(str(error).split())})") from None
    return value


def _check_values(value: Any) -> None:
    """Raises UserError for the first value that not every program can represent."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
            else:
                _check_scalar(each)
        if not inner:
            return
        level = inner
    raise UserError(f"nested too deeply; expected at most {MAX_DEPTH} levels")


def _check_scalar(value: Any) -> None:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise UserError(f"an integer of {value.bit_length()} bits; expected at most 64")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{value} is not a finite number")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{value!r} has half a surrogate pair, which no text has")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {twice!r} is there twice; keep one")
    return values


def _constant(name: str) -> Any:
    raise UserError(f"{name} is not a finite number")


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, without tags. SafeLoader itself reads YAML 1.1, where `no` is
    false, `1:20` is 80, `010` is 8 and `2e-5` is text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        tag = getattr(self.peek_event(), "tag", None)
        if tag:
            raise UserError(f"the tag {tag} is not supported; leave it out")
        return super().compose_node(parent, index)

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        _count(node, {}, ())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if key.tag != f"{_YAML}merge"]
        if not all(isinstance(key, yaml.ScalarNode) for key in keys):
            raise UserError("a key is itself a list or a mapping")
        _object([(self.construct_object(key), None) for key in keys])
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_YAML = "tag:yaml.org,2002:"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_YAML + _tag, re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor(
    f"{_YAML}int", lambda _, node: int(node.value, 0 if node.value[1:2] in "ox" else 10)
)


def _count(node: yaml.Node, counts: dict[yaml.Node, int], parents: tuple[yaml.Node, ...]) -> int:
    """The number of values of a node, with its aliases expanded; raises UserError beyond a limit,
    before any of them is constructed."""
    if node in parents:
        raise UserError("an alias is inside what it stands for")
    if node not in counts:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [each for pair in inner for each in (pair if isinstance(pair, tuple) else (pair,))]
        counts[node] = 1 + sum(_count(each, counts, (*parents, node)) for each in flat)
    if counts[node] > MAX_VALUES:
        raise UserError(f"more than {MAX_VALUES:,} values, aliases expanded")
    return counts[node]
