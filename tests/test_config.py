"""Configs are read strictly and written back so that they read as the same."""

import dataclasses
from typing import Literal

import pytest

from lorax_gen import config as configs
from lorax_gen import documents
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ("a", "b")

    def __post_init__(self):
        if self.rate < 0:
            raise UserError("rate is negative")


@dataclasses.dataclass(frozen=True)
class Here:
    kind: Literal["here"] = "here"
    path: str = ""
    length: int = 1


@dataclasses.dataclass(frozen=True)
class There:
    kind: Literal["there"] = "there"
    host: str = ""
    names: tuple[str, ...] = ()
    length: int = 2


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int = 3
    kind: Literal["one", "two"] = "one"
    fast: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)
    place: Here | There = dataclasses.field(default_factory=Here)


def read(text):
    return configs.from_dict(Outer, documents.parse_yaml(text, "the resolved config"), "my.yaml")


def test_what_is_left_out_keeps_its_default():
    assert read("{}") == Outer()
    assert read("inner: {rate: 1.5}") == Outer(inner=Inner(rate=1.5))


@pytest.mark.parametrize("number", ["2e-5", "2.0e-5", "0.00002"])
def test_a_rate_is_a_float_however_it_is_written(number):
    rate = read(f"inner: {{rate: {number}}}").inner.rate
    assert isinstance(rate, float) and rate == 2e-5
    assert isinstance(read("inner: {rate: 2}").inner.rate, float)


def test_the_kind_tells_which_of_several_dataclasses_a_field_is():
    assert read("place: {kind: here, length: 3}").place == Here(length=3)
    assert read("place: {kind: here, path: a}").place == Here(path="a")
    assert read("place: {kind: there, host: b, length: 3}").place == There(host="b", length=3)
    again = documents.to_yaml(configs.to_dict(Outer(place=There())))
    assert read(again) == Outer(place=There())


def test_names_are_a_tuple():
    assert read("inner: {names: [c, d]}").inner.names == ("c", "d")
    assert read("inner: {names: gate}").inner.names == ("gate",)


@pytest.mark.parametrize(
    "text, message",
    [
        ("step: 1", "unknown key step; did you mean steps?"),
        ("colour: red", "unknown key colour; known: steps, kind, fast, inner, place"),
        ("1: 2", "unknown key 1; known"),
        ("inner: {rates: 1}", "unknown key inner.rates; did you mean inner.rate?"),
        ("inner: [rate]", "inner must map names to values"),
        ("inner:", "inner must map names to values"),
        ("place: {length: 3}", "place.kind is missing; choose one of here, there"),
        ("place: {}", "place.kind is missing; choose one of here, there"),
        ("place: {kind: hear}", "place.kind is 'hear'; choose one of here, there"),
        ("place: {kind: [here]}", "place.kind is ['here']; choose one of here, there"),
        (
            "place: {kind: there, hots: b, names: [c]}",
            "unknown key place.hots; did you mean place.host?",
        ),
        ("place: {kind: here, host: b}", "unknown key place.host; known: kind, path, length"),
        ("place: 3", "place must map names to values"),
        ("place: {kind: there, host: 3}", "place.host is 3; expected str, got int"),
        ("steps: many", "steps is 'many'; expected int, got str"),
        ("steps: 1.5", "steps"),
        ("steps: '3'", "steps"),
        ("kind: three", "kind is 'three'; choose one of one, two"),
        ("fast: 1", "fast"),
        ("inner: {rate: much}", "inner.rate"),
        ("inner: {rate: [1]}", "inner.rate"),
        ("inner: {names: [1]}", "inner.names"),
        ("inner: {names: 5}", "inner.names"),
        ("inner: {rate: -1}", "rate is negative"),
        ("[steps]", "the file must map names to values"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and " object at 0x" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"steps: [1", "not valid YAML"),
        (b"\tsteps: 1", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- steps", "must map names to values"),
        (b"", "must map names to values"),
        (b"a: 1\na: 2", "twice"),
    ],
)
def test_a_missing_or_broken_yaml_file_is_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        documents.read_yaml(path)
    assert "my.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_config_survives_yaml(tmp_path):
    config = Outer(steps=7, kind="two", fast=True, inner=Inner(2e-5, ("x",)))
    values = configs.to_dict(config)
    assert values == {
        "steps": 7, "kind": "two", "fast": True, "inner": {"rate": 2e-5, "names": ["x"]},
        "place": {"kind": "here", "path": "", "length": 1},
    }  # fmt: skip
    text = documents.to_yaml(values)
    assert text.startswith("steps: 7\nkind: two\n")
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert documents.read_yaml(path) == values
    assert configs.from_dict(Outer, documents.read_yaml(path), "my.yaml") == config
