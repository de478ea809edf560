"""`lorax-gen plan`: options of the devices before the config are heard (see tests/planning too)."""

import json

import pytest


@pytest.mark.filterwarnings("error::UserWarning")  # users would see those of tyro
def test_options_may_come_before_the_config(call, tmp_path):
    words = ["--topology", "gpu:8", "--output", "before.json"]
    code, out, err = call("plan", *words, "paper")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "before.json").read_text())["devices"] == 8
    assert call("plan", "paper", "--topology", "gpu:8")[:2] == (0, out)
