"""Real models and tokenizers, converted once per session; skipped where there is no data folder."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from lorax_gen.tokenizers import load_tokenizer
from tests.real import real_tokenizers
from tests.real.stories260k import convert


@pytest.fixture(scope="session")
def stories260k(shared_data, tmp_path_factory) -> Path:
    """Model directory of the trained checkpoint stories260K."""
    source = shared_data / "checkpoints/stories260K"
    return convert(source, tmp_path_factory.mktemp("models") / "stories260k")


@pytest.fixture(scope="session")
def llama2_directory(shared_data, tmp_path_factory) -> Path:
    return real_tokenizers.build_llama2(shared_data, tmp_path_factory.mktemp("llama2"))


@pytest.fixture(scope="session")
def llama3_directory(shared_data, tmp_path_factory) -> Path:
    return real_tokenizers.build_llama3(shared_data, tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="session")
def qwen_directory(shared_data, tmp_path_factory) -> Path:
    return real_tokenizers.build_qwen(shared_data, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def gemma_directory(tmp_path_factory) -> Path:
    """A small stand-in, which needs no data folder."""
    return real_tokenizers.build_gemma_like(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def llama2_tokenizer(llama2_directory) -> PreTrainedTokenizerBase:
    return load_tokenizer(llama2_directory)


@pytest.fixture(scope="session")
def llama3_tokenizer(llama3_directory) -> PreTrainedTokenizerBase:
    return load_tokenizer(llama3_directory)


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen_directory) -> PreTrainedTokenizerBase:
    return load_tokenizer(qwen_directory)


@pytest.fixture(scope="session")
def gemma_tokenizer(gemma_directory) -> PreTrainedTokenizerBase:
    return load_tokenizer(gemma_directory)
