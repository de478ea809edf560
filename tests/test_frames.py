"""The text around an input: named frames, a chat template, a text of one's own."""

import copy

import pytest

from lorax_gen.errors import UserError
from lorax_gen.frames import IO, PLAIN, Frame, make_frame
from lorax_gen.tokenizers import word_level

CHAT = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}[bot] "


@pytest.fixture
def tokenizer():
    return word_level(["a"])


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_named_frames_and_ones_own(tokenizer):
    assert make_frame("plain", tokenizer) == PLAIN == Frame("{input}", " ")
    assert make_frame("io", tokenizer) == IO
    assert IO.pair("grass", "green") == ("Input: grass\nOutput:", " green")
    own = make_frame("Q: {input} {x}\nA:\n", tokenizer)
    assert own.pair("{input} {0}", "y") == ("Q: {input} {0} {x}\nA:\n", "y")


def test_a_chat_template_becomes_the_text_around_a_turn(tokenizer):
    frame = make_frame("chat", with_template(tokenizer, CHAT))
    assert frame == Frame("<s>[user] {input}\n[bot] ", "", turn=True)
    assert frame.pair("grass", "green") == ("<s>[user] grass\n[bot] ", "green")
    assert frame.prompted("Name its colour.", "grass") == (
        "<s>[user] Name its colour.\n\ngrass\n[bot] "
    )
    assert frame.shot("grass", "green") == "Input: grass\nOutput: green"


def test_a_prompt_in_context_comes_before_a_frame_that_is_no_chat():
    assert IO.prompted("Name its colour.", "grass") == ("Name its colour.\n\nInput: grass\nOutput:")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}",  # nothing around it
        "{{ messages[0]['content'] | length }}: {{ messages[0]['content'] }}",
        "{{ messages[0]['content'] | upper }}",
        "nothing",
    ],
)
def test_a_template_that_does_more_is_refused(tokenizer, template):
    with pytest.raises(UserError, match="does more than put text around"):
        make_frame("chat", with_template(tokenizer, template))


@pytest.mark.parametrize(
    "name, message",
    [("oi", "unknown frame 'oi'"), ("", "unknown frame ''"), ("{input}{input}", "2 times")],
)
def test_an_unknown_frame_is_refused(tokenizer, name, message):
    with pytest.raises(UserError, match=message):
        make_frame(name, tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(UserError, match="chat template"):
        make_frame("chat", tokenizer)
