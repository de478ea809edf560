"""The public names: there, loaded when they are asked for, and no more than is asked for."""

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import lorax_gen


def imported_for_type_checkers() -> dict[str, str]:
    """Name -> module, of the imports below `if TYPE_CHECKING`."""
    [block] = [
        node
        for node in ast.parse(Path(lorax_gen.__file__).read_text()).body
        if isinstance(node, ast.If)
    ]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_see_the_names_that_there_are():
    found = imported_for_type_checkers()
    assert sorted(found) == sorted(lorax_gen.__all__)
    for name, module in found.items():
        assert getattr(lorax_gen, name) is getattr(sys.modules[module], name)
    assert set(lorax_gen.__all__) <= set(dir(lorax_gen))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lorax_gen' has no attribute 'generat'"):
        _ = lorax_gen.generat


@pytest.mark.parametrize(
    "module, absent",
    [
        ("lorax_gen", "jax numpy flax transformers torch matplotlib tyro rich"),
        ("lorax_gen.method", "flax optax orbax transformers datasets torch matplotlib tyro rich"),
    ],
)
def test_a_module_imports_only_what_it_needs(module, absent):
    code = f"import sys, {module}\nprint(set({absent.split()}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_package_says_that_it_has_types():
    """PEP 561: without this file type checkers ignore its annotations."""
    assert (files(lorax_gen) / "py.typed").is_file()
