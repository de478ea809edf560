"""Benchmarks are not run here, but every one can be: what it imports is there."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NEEDS = {"llama_cpp_side": "llama_cpp", "real_model": "torch", "torch_reference": "torch"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_imports(path, monkeypatch):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem], reason=f"needs {NEEDS[path.stem]}")
    monkeypatch.syspath_prepend(FOLDER)
    runpy.run_path(str(path), run_name="imported")
