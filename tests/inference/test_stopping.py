"""Where a text ends; more of it, as a stream and by properties, is in the tests beside this one."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lorax_gen.inference.stopping import Decoder, finished_text

WORDS = ["▁The", "▁capital", "▁is", "▁Par", "is", "▁", "\n", "<s>", "</s>", "<|end|>"]
IDS = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tokenizer():
    """As LLaMA 2's: a space is part of the word after it, and left out before the first."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="▁"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


def ids(text):
    return [IDS[word] for word in text.split(" ")]


@pytest.mark.parametrize(
    "written, alone, in_context",
    [
        ("▁Par is", "Paris", " Paris"),
        ("is ▁Par", "is Par", "is Par"),  # goes on with the last word of the prompt
        ("▁ ▁Par", " Par", "  Par"),
        ("▁Par </s>", "Par", " Par"),
    ],
)
@pytest.mark.parametrize("prompt", ["<s> ▁The ▁capital ▁is", "▁The"])
def test_a_continuation_has_the_space_that_its_prompt_gives_it(
    tokenizer, written, alone, in_context, prompt
):
    stop = (tokenizer.eos_token_id,)
    assert finished_text(Decoder(tokenizer, stop), ids(written), [])[0] == alone
    found, _ = finished_text(Decoder(tokenizer, stop, tuple(ids(prompt))), ids(written), [])
    assert found == in_context
    whole = tokenizer.decode(ids(f"{prompt} {written}"), skip_special_tokens=True)
    assert tokenizer.decode(ids(prompt), skip_special_tokens=True) + found == whole


@pytest.mark.parametrize(
    "stop, expected",
    [
        (["<|end|>"], " Paris"),
        (["is<|end|>"], " Par"),
        ([" Par"], ""),
        (["<|end|>\n"], " Paris"),
        (["</s>"], " Paris\n is"),  # the model's own end of text
        (["\n is</s>"], " Paris"),
    ],
)
def test_a_stop_string_is_found_in_context(tokenizer, stop, expected):
    decoder = Decoder(tokenizer, (tokenizer.eos_token_id,), tuple(ids("<s> ▁The ▁capital ▁is")))
    written = ids("▁Par is <|end|> \n ▁is </s> ▁The".replace("  ", " "))
    assert finished_text(decoder, written, stop) == (expected, True)
