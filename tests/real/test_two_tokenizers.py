"""Cloud and edge models with tokenizers of their own: prompt in one, answers in the other."""

import dataclasses

import pytest

from lorax_gen import generate_text, load_model, save_model, specialize, stream_text
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import load_tokenizer
from tests.tiny import make_generator

PROMPT = "You are a helpful assistant. Say whether the sentence is happy 😀 or sad."
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def system(tiny_world_system, llama3_directory, llama2_directory, random_params):
    """A cloud that reads LLaMA 3's tokens and an edge that writes LLaMA 2's."""

    def model(directory):
        tokenizer = load_tokenizer(directory)
        config = DecoderConfig(vocab_size=len(tokenizer), **SMALL)
        return Model(config, random_params(config), tokenizer)

    cloud, edge = model(llama3_directory), model(llama2_directory)
    spec = dataclasses.replace(tiny_world_system.spec, cloud=cloud.config, edge=edge.config)
    return tiny_world_system._replace(cloud=cloud, edge=edge, spec=spec)


def test_a_prompt_read_by_one_tokenizer_changes_what_the_other_writes(system, tmp_path):
    generator = make_generator(system)
    card = specialize(PROMPT, system.cloud, system.edge, generator)
    merged = card.merge(system.edge, generator)
    texts = ["The sun shines.", "雨が降る"]
    before, after = (generate_text(m, texts, max_new_tokens=12) for m in (system.edge, merged))
    assert all(old != new for old, new in zip(before, after, strict=True))
    # The merged directory carries the edge's own tokenizer.
    save_model(tmp_path / "merged", merged)
    loaded = load_model(tmp_path / "merged")
    assert loaded.tokenizer(texts[0])["input_ids"] == system.edge.tokenizer(texts[0])["input_ids"]
    assert generate_text(loaded, texts, max_new_tokens=12) == after


def test_text_of_byte_tokens_streams_in_whole_characters(system):
    """A random model writes half characters; what has been shown is never taken back."""
    shown = ""
    for [text] in stream_text(system.edge, ["雨"], max_new_tokens=64, temperature=3.0, seed=1):
        assert text.startswith(shown)
        shown = text
    assert shown
