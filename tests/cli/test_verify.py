"""`lorax-gen verify`; and what it and `export` refuse alike."""

import pytest

from tests.tiny import PROMPTS


def test_verify_prints_a_line_for_each_form(call, card, to):
    code, out, err = call(*to("verify", card))
    assert (code, err) == (0, "")
    forms = ["edge without it", "gates, one row each", "merged", "merged, written and read"]
    for form in (*forms, "adapter, written and read"):
        [line] = [line for line in out.splitlines() if line.strip().startswith(f"{form}  ")]
        assert line.split()[-1] == ("%" if form == "edge without it" else "ok")
    assert "differs" not in out


def test_verify_takes_what_export_wrote(call, card, to):
    for format in ("merged", "peft"):
        words = to("export", card, "--format", format, "--output", format)
        assert call(*words)[0] == 0
        code, out, err = call(*to("verify", format))
        assert (code, err) == (0, "") and "differs" not in out


def test_verify_ends_with_code_1_where_a_form_differs(call, card, specialize, to, tmp_path):
    words = to("export", card, "--format", "merged", "--output", "merged", "--dtype", "bfloat16")
    assert call(*words)[0] == 0
    assert call(*to("verify", "merged"))[0] == 0
    (tmp_path / "merged" / card.name).unlink()
    assert call(*specialize(PROMPTS[2], "--output", tmp_path / "merged" / card.name))[0] == 0
    code, out, err = call(*to("verify", "merged"))
    assert (code, err) == (1, "")
    [line] = [line for line in out.splitlines() if "differs" in line.split()]
    assert "the directory" in line


@pytest.mark.parametrize(
    "other, message",
    [
        ({"edge": "edge2"}, "this card was made for the edge model"),
        ({"generator": "generator2"}, "this card was made with the pool"),
        ({"edge": "nowhere"}, "no model directory at"),
        ({"generator": "nowhere"}, "no generator directory at"),
    ],
)
def test_what_an_artifact_was_not_made_for_is_refused(refused, card, to, tmp_path, other, message):
    assert message in refused(*to("verify", card, **other))
    for format in ("merged", "peft"):
        words = to("export", card, "--format", format, "--output", "mine", **other)
        assert message in refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == [card.name]


def test_what_is_no_artifact_is_refused(refused, to, models):
    assert "holds no task.card.safetensors to compare it with" in refused(
        *to("verify", models / "edge")
    )
    assert "no such file: nowhere" in refused(*to("verify", "nowhere"))
    words = to("export", "nowhere", "--format", "peft", "--output", "adapter")
    assert "no such file: nowhere" in refused(*words)
