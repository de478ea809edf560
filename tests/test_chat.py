"""A chat template is rendered as transformers does, and cannot take hours, memory or the disk."""

import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lorax_gen import chat
from lorax_gen.chat import render_chat
from lorax_gen.errors import UserError

TURNS = [
    {"role": "system", "content": "be brief\nand <kind> é"},
    {"role": "user", "content": "hello 'you' \U0001f600"},
    {"role": "assistant", "content": "yes "},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% if loop.index0 == 7 %}{% break %}{% endif %}"
    "{% endfor %}{% generation %}{{ messages | tojson }}{% endgeneration %}"
)


def make(template):
    tokenizer = Tokenizer(models.WordLevel({"<u>": 0, "<s>": 1, "</s>": 2}, unk_token="<u>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:2]], ids=["three turns", "one"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_chat_is_the_text_that_transformers_makes(template, turns, asked):
    tokenizer = make(template)
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
    assert render_chat(tokenizer, turns, add_generation_prompt=asked) == expected


def test_an_unfinished_answer_is_continued():
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = make(CHATML).apply_chat_template(TURNS, tokenize=False, **options)
    assert render_chat(make(CHATML), TURNS, **options) == expected
    assert expected.endswith("yes")


LONG = "{% for i in range(99999) %}" * 3 + "{% set x = i %}" + "{% endfor %}" * 3
GROWS = "{% set n = namespace(x='ab') %}" + "{% set n.x = n.x ~ n.x %}" * 60


@pytest.mark.parametrize(
    "template, message",
    [
        (LONG, "does not end within 2 second"),
        ("{{ 9 ** (9 ** 9) }}", "does not end within 2 second"),
        (GROWS, "needs more than 1,024 MiB"),
        ("{{ 'x' * 10 ** 10 }}", "needs more than 1,024 MiB"),
        ("{{ 'x' * 10 ** 8 }}", "writes 100,000,000 characters; the most are 1,0"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself too often"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '\\ud800' }}", "not UTF-8"),
    ],
    ids=lambda value: value[:24],
)
def test_a_template_cannot_go_beyond_its_limits(template, message, monkeypatch):
    if "does not end" in message:
        monkeypatch.setattr(chat, "SECONDS", 2.0)
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        render_chat(make(template), TURNS[:1])
    assert time.monotonic() - start < 15
    assert render_chat(make("{{ messages[0].role }}"), TURNS) == "system"  # the next one works


def test_a_long_turn_may_be_repeated():
    turn = {"role": "user", "content": "long " * 10**6}
    assert len(render_chat(make("{{ messages[0].content * 2 }}"), [turn])) == 10**7


def test_a_tokenizer_with_several_templates_and_none_to_take_is_refused():
    with pytest.raises(UserError, match="the chat template cannot be used"):
        render_chat(make({"one": CHATML, "two": CHATML}), TURNS)
