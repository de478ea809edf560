"""llama.cpp beside this project, and models in its format whose tensors are in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorax_gen.models.gguf_files import GGUFFile, dequantised
from tests.models.gguf_models import add_value, gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")


def load(path: Path, **options):
    """A model of llama.cpp, its cache in fp32, without kernels for particular processors."""
    default = llama_cpp.llama_cpp.llama_model_default_params

    def plain():
        params = default()
        params.use_extra_bufts = False
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain)
        return llama_cpp.Llama(
            str(path), n_ctx=256, n_batch=256, n_threads=2, type_k=0, type_v=0, logits_all=True,
            verbose=False, **options,
        )  # fmt: skip


def logits(model, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def encode(model, text: str) -> list[int]:
    return model.tokenize(text.encode(), add_bos=True, special=True)


def write_vocabulary(path: Path, metadata: dict, architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_in_fp32(file: GGUFFile, path: Path) -> Path:
    """The same model with its tensors dequantised, so that llama.cpp computes in fp32 too."""
    writer = gguf.GGUFWriter(path, file.metadata["general.architecture"])
    skipped = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, value in file.metadata.items():
        if key not in skipped:
            add_value(writer, key, value)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(dequantised(tensor)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
