"""Trees of arrays as files: what cannot be read is named."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax_gen.errors import UserError
from lorax_gen.tensors import flatten, read_tensors, unflatten


def test_a_tree_is_its_named_leaves():
    tree = {"a": {"b": np.ones(2), "c": {"d": np.zeros(3)}}, "e": np.ones(1)}
    assert list(flatten(tree)) == ["a.b", "a.c.d", "e"]
    again = unflatten(flatten(tree))
    assert again["a"]["c"]["d"] is tree["a"]["c"]["d"] and again.keys() == tree.keys()


@pytest.mark.parametrize("names", [["a", "a.b"], ["a.b", "a"], ["a.b.c", "a.b"], ["a.b", "a.b.c"]])
def test_a_name_that_is_also_the_beginning_of_another_is_refused(names):
    with pytest.raises(UserError, match="'a"):
        unflatten(dict.fromkeys(names, np.ones(1)))


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    save_file({"a.b": np.ones(2).astype(jnp.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: a\.b is stored as F8_E4M3, which"):
        read_tensors(tmp_path / "x.safetensors")
