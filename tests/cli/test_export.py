"""`lorax-gen export`."""

import pytest

from lorax_gen import load_card, load_model


def test_export_writes_each_format(call, card, to, tmp_path):
    pytest.importorskip("gguf", reason="needs the extra: pip install 'lorax-gen[gguf]'")
    files = {"merged": "model.safetensors", "peft": "adapter_model.safetensors", "gguf-lora": ""}
    for format, file in files.items():
        path = f"my.{format}"
        words = to("export", card, "--format", format, "--output", path, "--dtype", "bfloat16")
        assert call(*words) == (0, f"{format}: {path}\n", "")
        assert (tmp_path / path / file).is_file()
    assert load_model(tmp_path / "my.merged", None).params["embed"].dtype == "bfloat16"
    assert load_card(tmp_path / "my.merged" / card.name).edge == load_card(card).edge


def test_export_refuses_an_existing_output(refused, card, to, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for format in ("merged", "peft"):
        words = to("export", card, "--format", format, "--output", "mine")
        assert "mine already exists" in refused(*words)
    assert (tmp_path / "mine").read_text() == "mine"
