"""A file of results that a run can be resumed from, whenever it was interrupted."""

import json

import pytest

from lorax_gen.errors import UserError
from lorax_gen.evaluation.item_log import ItemLog

SETTINGS = {"task": "boolq", "shots": 5, "names": ("a", "b")}
ROWS = [{"index": i, "value": i / 3} for i in range(4)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "runs" / "boolq.jsonl"
    log = ItemLog(path, SETTINGS)
    log.append(ROWS[:1])
    log.append(ROWS[1:3])
    assert log.rows == ROWS[:3]
    return path


def test_what_was_written_is_there_again(path):
    log = ItemLog(path, SETTINGS)
    assert log.rows == ROWS[:3]
    log.append(ROWS[3:])
    assert ItemLog(path, SETTINGS).rows == ROWS
    assert len(path.read_text().splitlines()) == 5


def test_half_a_line_is_cut_off_wherever_it_ends(path):
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        log = ItemLog(path, SETTINGS)
        assert log.rows == ROWS[:2]
        log.append(ROWS[2:])
        assert ItemLog(path, SETTINGS).rows == ROWS


def test_half_a_line_of_settings_begins_anew(path):
    path.write_bytes(path.read_bytes()[:20])
    assert ItemLog(path, SETTINGS).rows == []
    assert json.loads(path.read_text()) == {"settings": {**SETTINGS, "names": ["a", "b"]}}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({**SETTINGS, "shots": 0}, r"is of a run with shots 5, this one has 0"),
        ({"task": "boolq", "shots": 5}, r"names \['a', 'b'\], this one has None"),
        ({**SETTINGS, "seed": 1}, r"seed None, this one has 1"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_changed(path, settings, message):
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        ItemLog(path, settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text, number",
    [
        ("notes\n", 1),
        ('{"settings": {}}\nnotes\n', 2),
        ('{"index": 1}\n', 1),
        ('{"settings": {}}\n[1]\n', 2),
        ('{"settings": {}}\n{"settings": {}}\n', 2),
    ],
)
def test_another_file_is_refused(tmp_path, text, number):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"notes.txt, line {number}: not a line of results"):
        ItemLog(path, {})
    assert path.read_text() == text


def test_numbers_that_json_lacks_are_not_written(path):
    before = path.read_bytes()
    with pytest.raises(ValueError):
        ItemLog(path, SETTINGS).append([{"value": float("nan")}])
    assert path.read_bytes() == before
