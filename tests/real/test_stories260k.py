"""A real trained model writes the text that its own program writes, byte for byte."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lorax_gen import generate_text, load_model
from tests.real.real_tokenizers import read_pieces
from tests.real.stories260k import convert, read_checkpoint, split_pairs

# A step of llama2.c reads one token and writes the next, so 200 steps from BOS write 200 tokens.
STEPS = 200
BOS = 1


@pytest.fixture(scope="module")
def source(shared_data):
    return shared_data / "checkpoints/stories260K"


@pytest.fixture(scope="module")
def story(source) -> bytes:
    """The text of llama2.c's program, greedy, with no prompt."""
    return (source / "expected_greedy_200.txt").read_bytes()


@pytest.fixture(scope="module")
def model(stories260k):
    return load_model(stories260k)


@pytest.fixture(scope="module")
def logits(model):
    """Logits `[T, V]` of token ids `[T]` as an array of numpy, in one compiled program."""
    compiled = jax.jit(model)
    return lambda ids: np.asarray(compiled(np.asarray([ids], np.int32))[0])


@pytest.fixture(scope="module")
def story_ids(model, story) -> list[int]:
    return model.tokenizer(story.decode())["input_ids"]


# --- the model -----------------------------------------------------------------------------------


def test_greedy_decoding_writes_the_expected_story(model, story):
    (text,) = generate_text(model, [""], max_new_tokens=STEPS)
    assert text.encode() == story


def test_decoding_without_a_cache_writes_the_same_tokens(logits, story_ids):
    """Everything is read again for each token, in one fixed length; the rest is padding."""
    ids = np.zeros(STEPS + 1, np.int32)
    ids[0] = BOS
    for step in range(STEPS):
        ids[step + 1] = logits(ids)[step].argmax()
    assert ids.tolist() == story_ids


def test_prompts_of_a_batch_are_each_continued_as_the_story_goes_on(model, story):
    """The beginnings of the story, of different lengths, lead into the rest of it."""
    sentences = story.decode().split(". ")
    prompts = [". ".join(sentences[:count]) + "." for count in (1, 4, 2)]
    texts = generate_text(model, prompts, max_new_tokens=50)
    for prompt, text in zip(prompts, texts, strict=True):
        rest = story.decode().removeprefix(prompt)
        assert len(text) > 80
        assert rest.lstrip().startswith(text.lstrip())  # decoding drops a space in front


def test_transformers_computes_the_same_logits(logits, stories260k, story_ids):
    torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(stories260k)
    with torch.no_grad():
        expected = theirs(torch.tensor([story_ids])).logits[0].numpy()
    np.testing.assert_allclose(logits(story_ids), expected, rtol=0, atol=2e-4)


# --- its tokenizer -------------------------------------------------------------------------------


def llama2c_encode(text: str, pieces: list[tuple[str, float]]) -> list[int]:
    """As the program does it: letters first, then over and over the best pair of neighbours."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    row = []
    for letter in ("▁" if text else "") + text.replace(" ", "▁"):
        row += [ids[letter]] if letter in ids else [byte + 3 for byte in letter.encode()]
    while True:
        pairs = [
            (pieces[ids[pair]][1], -i)
            for i in range(len(row) - 1)
            if (pair := pieces[row[i]][0] + pieces[row[i + 1]][0]) in ids
        ]
        if not pairs:
            return [BOS, *row]
        at = -max(pairs)[1]
        row[at : at + 2] = [ids[pieces[row[at]][0] + pieces[row[at + 1]][0]]]


def test_the_story_is_as_many_tokens_as_steps(model, story, story_ids):
    assert len(story_ids) == STEPS + 1
    assert story_ids[0] == BOS
    assert model.tokenizer.decode(story_ids, skip_special_tokens=True).encode() == story


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a little girl named Lily.",
        "",
        " ",
        "  two  spaces   three ",
        "a\nb\tc\r\n",
        "naïve señor — “quoted” 日本語 🙂",
        "0123456789 <0x41> #{}@^",
    ],
)
def test_texts_are_encoded_as_llama2c_does(model, source, text):
    ids = model.tokenizer(text)["input_ids"]
    assert ids == llama2c_encode(text, read_pieces(source / "tok512.bin"))
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_those_of_sentencepiece(model):
    assert len(model.tokenizer) == model.config.vocab_size == 512
    assert model.tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) == (1, 2)


# --- the converter -------------------------------------------------------------------------------


def test_every_number_of_the_checkpoint_is_used_once(source):
    size, tensors = read_checkpoint(source / "stories260K.bin")
    assert size["vocab"] == 512
    assert sum(tensor.size for tensor in tensors.values()) == 260_032


def test_rotated_pairs_become_rotated_halves():
    rows = np.arange(12)[:, None]  # two heads of six rows
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert split_pairs(rows, head_dim=6)[:, 0].tolist() == expected


def test_a_checkpoint_of_the_wrong_length_is_refused(source, tmp_path):
    content = (source / "stories260K.bin").read_bytes()
    (tmp_path / "stories260K.bin").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="its header tells of"):
        convert(tmp_path, tmp_path / "target")


def test_the_command_converts(source, tmp_path):
    command = [sys.executable, "-m", "tests.real.stories260k", source, tmp_path / "model"]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert load_model(tmp_path / "model").config.num_hidden_layers == 5
