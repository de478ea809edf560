"""Training configs and the documents they are written in."""

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorax_gen import config as configs
from lorax_gen import documents
from lorax_gen.recipes.registry import RECIPES, load_config, shipped_configs
from tests.fuzz.damage import damaged_bytes, damaged_json, fuzz, nested, refused

SHIPPED = {name: load_config(name) for name in shipped_configs()}
VALUES = {
    name: {"method": method, **configs.to_dict(config)}
    for name, (method, config) in SHIPPED.items()
}
NAMES = st.sampled_from(sorted(VALUES))
# Written independently of the ranges in the code: (least, largest) of the last key.
RANGES = {
    "seed": (0, 2**32 - 1), "world_seed": (0, 2**32 - 1), "warmup_steps": (0, 2**31),
    "learning_rate": (1e-300, 1e30), "clip_norm": (1e-300, 1e30), "b1": (0, 1 - 1e-9),
    "b2": (0, 1 - 1e-9), "final_fraction": (0, 1), "dropout": (0, 1 - 1e-9),
    "cloud_dropout": (0, 1 - 1e-9), "weight_decay": (0, 1e30), "bn_momentum": (0, 1 - 1e-9),
    "max_shots": (0, 2**31), "shots": (0, 2**31), "min_shots": (0, 2**31),
    "evaluate_shots": (0, 2**31), "data": (-1, 2**31), "fsdp": (-1, 2**31), "tensor": (-1, 2**31),
    "balance_coefficient": (0, 1e30), "tasks": (0, 1 - 1e-9), "wordings": (0, 1 - 1e-9),
    "rows": (0, 1 - 1e-9), "evaluate_new_tokens": (0, 2**31),
}  # fmt: skip


def dump(values: object) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def check_accepted(path) -> None:
    """What is accepted has the types of the shipped config, numbers in range, and is read again as
    itself."""
    method, config = load_config(str(path))
    kinds = {name: configs.to_dict(RECIPES[method].config()) for name in [method]}[method]
    values = configs.to_dict(config)

    def walk(values: dict, kinds: dict) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, kinds[key] if isinstance(kinds.get(key), dict) else {})
            elif isinstance(value, int | float) and not isinstance(value, bool):
                least, largest = RANGES.get(key, (1e-30, 2**31))
                assert math.isfinite(value) and least <= value <= largest, (key, value)
            if isinstance(kinds.get(key), bool | str) and value is not None:
                assert isinstance(value, type(kinds[key])), (key, value)

    walk(values, kinds)
    again = documents.parse_yaml(documents.to_yaml(values), "again")
    assert configs.from_dict(type(config), again, "again") == config


@fuzz
@given(data=st.data())
def test_a_config_with_a_changed_value(data, tmp_path_factory):
    values = data.draw(damaged_json(VALUES[data.draw(NAMES)]))
    path = tmp_path_factory.getbasetemp() / "changed.yaml"
    path.write_text(dump(values))
    if refused(lambda: load_config(str(path))) is None:
        check_accepted(path)


@fuzz
@given(data=st.data())
def test_a_config_with_damaged_bytes(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(data.draw(damaged_bytes(dump(VALUES[data.draw(NAMES)]).encode())))
    if refused(lambda: load_config(str(path))) is None:
        check_accepted(path)


@fuzz
@given(data=st.data())
def test_a_json_document_with_damaged_bytes(data):
    """What is accepted is what python's own parser reads."""
    text = json.dumps(VALUES[data.draw(NAMES)], indent=1).encode()
    text = data.draw(damaged_bytes(text))
    if refused(lambda: documents.parse_json(text, "a file")) is None:
        assert documents.parse_json(text, "a file") == json.loads(text.decode("utf-8-sig"))


@fuzz
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text()
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)  # fmt: skip
def test_every_value_survives_yaml_and_json(value):
    assert documents.parse_json(json.dumps(value), "a file") == value
    assert documents.parse_yaml(documents.to_yaml(value), "a file") == value


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, "aliases expanded"),
        ("a: &a [*a]", "inside what it stands for"),
        ("[" * 50_000, "nested too deeply"),
        (json.dumps(nested(60)), "nested too deeply"),
        ("a: " + "9" * 5000, "digits"),
        ("a: " + "9" * 25, "64"),
        ("a: .nan", "finite"),
        ("a: 1\na: 2", "twice"),
        ("a: !!python/object:os.system 1", "tag"),
        ("a: !!int x", "tag"),
        ("? [1]\n: 2", "a key is itself"),
        ("--- a\n--- b", "single document"),
        ("a" * (2 << 20), "at most"),
    ],
)
def test_a_hostile_yaml_document_is_refused_at_once(text, message):
    assert message in refused(lambda: documents.parse_yaml(text, "a file"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 6000, "digits"),
        ("9" * 25, "64"),
        ("NaN", "finite"),
        ("1e999", "finite"),
        ('{"a": 1, "a": 2}', "twice"),
        (r'"\ud800"', "surrogate"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_hostile_json_document_is_refused_at_once(text, message):
    assert message in refused(lambda: documents.parse_json(text, "a file"))


@pytest.mark.parametrize(
    "text, value",
    [
        ("no", "no"), ("010", 10), ("1:20", "1:20"), ("2026-01-01", "2026-01-01"), ("2e-5", 2e-5),
        ("0x1f", 31), ("~", None), ("True", True), ("'5'", "5"), (".5", 0.5),
    ],
)  # fmt: skip
def test_yaml_is_read_by_the_core_schema_of_version_1_2(text, value):
    found = documents.parse_yaml(f"key: {text}", "a file")["key"]
    assert found == value and type(found) is type(value)
