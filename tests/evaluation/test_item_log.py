"""The file of single items: what counts is there, whatever happened while it was written."""

import json

import pytest

from lorax_gen.errors import UserError
from lorax_gen.evaluation.item_log import ItemLog

SETTINGS = {"mode": "plain", "shots": 0, "stop": ("a",)}
ROWS = [{"index": 0, "acc": 1}, {"index": 2, "acc": 0}]


@pytest.fixture
def path(tmp_path):
    """A file with two items, in a folder that was not there."""
    path = tmp_path / "items" / "boolq.plain.jsonl"
    ItemLog(path, SETTINGS).append(ROWS)
    return path


def test_what_was_written_is_there_again_and_more_goes_behind_it(path):
    log = ItemLog(path, SETTINGS)
    assert log.rows == ROWS
    log.append([{"index": 1, "acc": 1}])
    assert ItemLog(path, SETTINGS).rows == log.rows == [*ROWS, {"index": 1, "acc": 1}]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_does_not_count_and_is_gone(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    log = ItemLog(path, SETTINGS)
    assert log.rows == ROWS[:1]
    log.append(ROWS[1:])
    assert path.read_bytes() == whole


def test_a_file_that_was_killed_before_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"settings": {"mo')
    assert ItemLog(path, SETTINGS).rows == []
    assert ItemLog(path, SETTINGS).rows == []


def test_other_settings_are_refused_and_named(path):
    before = path.read_bytes()
    with pytest.raises(UserError, match="is of a run with shots 0, this one has 5"):
        ItemLog(path, {**SETTINGS, "shots": 5})
    with pytest.raises(UserError, match="is of a run with seed None, this one has 1"):
        ItemLog(path, {**SETTINGS, "seed": 1})
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["not json", "[1]", '{"settings": {}}'])
def test_a_foreign_line_is_named(path, line):
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="line 4: not a line of results"):
        ItemLog(path, SETTINGS)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"index": 0}) + "\n")
    with pytest.raises(UserError, match="line 1: not a line of results"):
        ItemLog(path, SETTINGS)


def test_what_json_has_no_number_for_is_not_written(path):
    before = path.read_bytes()
    with pytest.raises(ValueError):
        ItemLog(path, SETTINGS).append([{"acc": float("nan")}])
    assert path.read_bytes() == before
