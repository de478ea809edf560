"""What is exported is what others load, says where it comes from, and is whole or absent."""

import dataclasses
import functools
import hashlib
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from lorax_gen import UserError, export, generate_text, load_adapter, load_card, load_model
from lorax_gen.artifacts.export import CARD, model_card, specialised
from lorax_gen.frames import Frame, read_frame
from lorax_gen.models import decoder
from tests.tiny import PROMPTS

COMPOSITIONS = ["factors", "products"]
FORMATS = ["merged", "peft", "gguf-lora"]
TOKENS = np.random.default_rng(0).integers(0, 100, (3, 12))


@functools.partial(jax.jit, static_argnums=1)
def logits(params, config, tokens):
    return decoder.logits(params, config, decoder.hidden_states(params, config, tokens))


def needed(format):
    if format == "gguf-lora":
        pytest.importorskip("gguf", reason="needs the extra: pip install 'lorax-gen[gguf]'")


def gguf_tensors(path):
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return metadata, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.fixture
def write(made, tmp_path):
    """`write(artifact, format, **options)`: where the artifact of `made` is then."""

    def write(artifact, format, **options):
        needed(format)
        generator = made.generators.get(artifact.removesuffix(".card"))
        path = tmp_path / "out" / f"mine.{format}"
        export(made.folder / artifact, path, format, made.edge, generator, **options)
        return path

    return write


def no_generator():
    raise AssertionError("an adapter needs no generator")


# --- what others load ----------------------------------------------------------------------------


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_merged_directory_is_the_merged_edge(composition, made, write):
    loaded = load_model(write(f"{composition}.card", "merged"), None)
    merged = made.cards[composition].merge(made.edge, made.generators[composition])
    chex.assert_trees_all_equal(loaded.params, merged.params)
    assert loaded.config == made.edge.config
    assert loaded.stop_ids == made.edge.stop_ids
    assert loaded.fingerprint not in (made.edge.fingerprint, "")


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_an_exported_adapter_is_the_lora_of_the_card(composition, made, write):
    path = write(f"{composition}.card", "peft")
    lora = made.cards[composition].lora(made.generators[composition])
    chex.assert_trees_all_equal(load_adapter(path, made.edge.config), lora)
    raw = json.loads((path / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "edge"


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_an_exported_gguf_is_the_lora_of_the_card(composition, made, write):
    metadata, tensors = gguf_tensors(write(f"{composition}.card", "gguf-lora"))
    lora = made.cards[composition].lora(made.generators[composition])
    assert len(tensors) == 2 * 2 * len(lora)
    for i in range(2):
        for side in "ab":
            value = tensors[f"blk.{i}.ffn_down.weight.lora_{side}"]
            np.testing.assert_array_equal(value, lora["down"][side][i].T)
    assert metadata["general.name"] == "mine"
    assert metadata["adapter.lora.alpha"] == lora["down"]["a"].shape[-1]


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_transformers_answers_as_the_merged_edge(composition, made, write):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write(f"{composition}.card", "merged")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    merged = made.cards[composition].merge(made.edge, made.generators[composition])
    ours = logits(merged.params, merged.config, TOKENS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)
    assert np.abs(ours - logits(made.edge.params, merged.config, TOKENS)).max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer(PROMPTS[0]).input_ids == made.edge.tokenizer(PROMPTS[0]).input_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_in_fp32_the_tensors_are_rounded_once(dtype, made, write):
    path = write("factors.card", "merged", dtype=dtype)
    merged = made.cards["factors"].merge(made.edge, made.generators["factors"])
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), merged.params)
    loaded = load_model(path, None).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {dtype}
    chex.assert_trees_all_equal(loaded, rounded)
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype


def test_a_large_merged_model_is_split(made, write):
    path = write("factors.card", "merged", max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    merged = made.cards["factors"].merge(made.edge, made.generators["factors"])
    chex.assert_trees_all_equal(load_model(path).params, merged.params)


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_is_exported_as_a_card_is(format, made, tmp_path, write):
    needed(format)
    export(made.folder / "adapter", tmp_path / "mine", format, made.edge, no_generator)
    own, by_card = tmp_path / "mine", write("factors.card", format)
    if format == "merged":
        chex.assert_trees_all_equal(load_model(own).params, load_model(by_card).params)
        assert not (own / CARD).exists()
    elif format == "peft":
        ours, theirs = (load_adapter(path, made.edge.config) for path in (own, by_card))
        chex.assert_trees_all_equal(ours, theirs)
    else:
        chex.assert_trees_all_equal(gguf_tensors(own)[1], gguf_tensors(by_card)[1])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_nothing_that_is_not_finite_is_written(format, number, made, tmp_path):
    needed(format)
    tree = jax.tree.map(np.array, load_adapter(made.folder / "adapter", made.edge.config))
    tree["up"]["b"][1, 0, 3] = number
    with pytest.raises(UserError, match=rf"LoRA for 'up', b, holds {number} at \[1, 0, 3\]"):
        export(tree, tmp_path / "mine", format, made.edge)
    assert not list(tmp_path.iterdir())


def test_a_merged_kernel_that_overflows_is_named(made, tmp_path):
    tree = jax.tree.map(np.array, load_adapter(made.folder / "adapter", made.edge.config))
    tree["up"] = {name: np.full_like(x, 1e30) for name, x in tree["up"].items()}
    with pytest.raises(UserError, match=r"would hold NaN or an infinity in layers\.up"):
        export(tree, tmp_path / "mine", "merged", made.edge)
    tree["up"] = {name: np.full_like(x, 1e3) for name, x in tree["up"].items()}
    with pytest.raises(
        UserError, match=r"layers\.up .* float16 cannot hold; choose dtype bfloat16"
    ):
        export(tree, tmp_path / "mine", "merged", made.edge, dtype="float16")
    assert not list(tmp_path.iterdir())
    export(tree, tmp_path / "mine", "merged", made.edge, dtype="bfloat16")


def test_no_path_enters_what_is_exported(made, tmp_path):
    edge = dataclasses.replace(made.edge, name=str(made.folder / "edge"))
    for format in FORMATS:
        needed(format)
        output = tmp_path / format
        export(made.folder / "adapter", output, format, edge)
        for path in [output, *output.rglob("*")]:
            assert path.is_dir() or str(made.folder).encode() not in path.read_bytes()


# --- what it says of itself ----------------------------------------------------------------------


def provenance_of(made, composition):
    card = made.cards[composition]
    return {
        "edge": {"name": "edge", "fingerprint": made.edge.fingerprint},
        "pool": made.generators[composition].pool_hash,
        "prompt_sha256": hashlib.sha256(PROMPTS[0].encode()).hexdigest(),
        "composition": card.composition,
        "experts_per_layer": 2,
    }


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("format", ["merged", "peft"])
def test_provenance_names_edge_pool_prompt_and_composition(format, composition, made, write):
    path = write(f"{composition}.card", format)
    found = json.loads((path / "provenance.json").read_text())
    assert found.pop("made_with").startswith("lorax-gen ")
    assert found == provenance_of(made, composition)


def test_a_gguf_names_them_too(made, write):
    metadata, _ = gguf_tensors(write("products.card", "gguf-lora"))
    found = {key: value for key, value in metadata.items() if key.startswith("lorax_gen.")}
    assert found.pop("lorax_gen.made_with").startswith("lorax-gen ")
    expected = provenance_of(made, "products")
    edge = expected.pop("edge")
    expected |= {f"edge_{key}": value for key, value in edge.items()}
    assert found == {f"lorax_gen.{key}": str(value) for key, value in expected.items()}


def test_the_model_card_names_them_for_the_hub(made, write):
    text = (write("products.card", "merged") / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora-gen"],
    }
    expected = provenance_of(made, "products")
    edge = expected.pop("edge")
    expected |= {f"edge {key}": value for key, value in edge.items()}
    for key, value in expected.items():
        assert f"| {key} | {value} |\n" in body


@pytest.mark.parametrize("in_context", [True, False])
def test_the_model_card_says_whether_the_prompt_is_needed(made, in_context):
    text = model_card(made.edge, {"in_context": True} if in_context else {})
    assert ("needs that prompt before each input" in text) == in_context
    assert ("needs no prompt" in text) != in_context


def test_the_model_card_of_an_edge_of_the_hub_links_to_it(made, tmp_path):
    edge = dataclasses.replace(made.edge, name="org/name")
    export(made.folder / "adapter", tmp_path / "merged", "merged", edge, no_generator)
    header = (tmp_path / "merged" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(header)["base_model"] == "org/name"
    export(made.folder / "adapter", tmp_path / "peft", "peft", edge, no_generator)
    raw = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "org/name"


@pytest.mark.parametrize("artifact", ["factors.card", "adapter"])
@pytest.mark.parametrize("format", FORMATS)
def test_no_file_names_a_path_of_this_machine(format, artifact, made, write, tmp_path):
    path = write(artifact, format)
    for file in [path] if path.is_file() else path.iterdir():
        content = file.read_bytes()
        for folder in (made.folder, tmp_path, made.folder.parent):
            assert str(folder).encode() not in content, file.name


def test_a_merged_directory_keeps_its_card(made, write):
    path = write("products.card", "merged")
    assert (path / CARD).read_bytes() == (made.folder / "products.card").read_bytes()
    assert load_card(path / CARD).composition == "products"


# --- in what frame it is asked -------------------------------------------------------------------

# The tokenizer prepends `<bos>`; the second frame begins with one, as those of chats do.
FRAMES = [
    Frame("thing {input} box :"),
    Frame("<bos> thing ``` {input} \n box :\n", "", turn=True, benchmarks=False),
]
ASKED = ["apple", "bell", "king of the garden"]


@pytest.fixture(params=FRAMES, ids=["text", "turn"])
def framed(request, made):
    """A card with a frame."""
    return dataclasses.replace(made.cards["factors"], frame=request.param)


def test_every_export_has_the_frame_of_its_card(framed, made, tmp_path):
    """And so has what is exported from an adapter again."""
    needed("gguf-lora")
    generator = made.generators["factors"]
    for format in FORMATS:
        export(framed, tmp_path / format, format, made.edge, generator)
    found = [
        load_model(tmp_path / "merged").frame,
        specialised(tmp_path / "peft", made.edge).frame,
        specialised(framed, made.edge, generator).frame,
        load_card(tmp_path / "merged" / CARD).frame,
    ]
    export(tmp_path / "peft", tmp_path / "again", "merged", made.edge)
    found.append(load_model(tmp_path / "again").frame)
    metadata, _ = gguf_tensors(tmp_path / "gguf-lora")
    found.append(read_frame(json.loads(metadata["lorax_gen.frame"])))
    assert found == [framed.frame] * len(found)


def test_nothing_speaks_of_a_plain_frame(write):
    for format in ("merged", "peft"):
        path = write("factors.card", format)
        assert "frame" not in json.loads((path / "provenance.json").read_text())
        assert format == "peft" or "frame" not in (path / "README.md").read_text()
    metadata, _ = gguf_tensors(write("factors.card", "gguf-lora"))
    assert not [key for key in metadata if "frame" in key]


def test_the_readme_shows_the_frame_as_it_is(framed, made, tmp_path):
    export(framed, tmp_path / "mine", "merged", made.edge, made.generators["factors"])
    text = (tmp_path / "mine" / "README.md").read_text()
    fence = "````" if "```" in framed.frame.template else "```"
    assert f"\n{fence}text\n{framed.frame.template}\n{fence}\n" in text


@pytest.fixture(scope="module")
def in_torch():
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[parity]'")
    return torch, peft


def continued(torch, model, ids):
    """The tokens that a torch model writes after a prompt, greedily."""
    found = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    return found[0, len(ids) :].tolist()


def test_all_exports_answer_alike_in_the_frame(framed, made, tmp_path, in_torch):
    """transformers on the merged directory and peft on the adapter, with ours on both."""
    from transformers import AutoModelForCausalLM

    torch, peft = in_torch
    generator = made.generators["factors"]
    for format in ("merged", "peft"):
        export(framed, tmp_path / format, format, made.edge, generator)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(made.folder / "edge", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    ours, by_peft = load_model(tmp_path / "merged"), specialised(tmp_path / "peft", made.edge)
    for asked in ASKED:
        ids = ours.encode(ours.frame.wrap(asked))
        assert ids == by_peft.encode(by_peft.frame.wrap(asked))
        assert ids.count(ours.tokenizer.bos_token_id) == 1
        written = continued(torch, merged, ids)
        assert written == continued(torch, adapted, ids)
        text = made.edge.tokenizer.decode(written, skip_special_tokens=True)
        for model in (ours, by_peft):
            [found] = generate_text(model, [model.frame.wrap(asked)], max_new_tokens=8)
            assert found == text


def test_the_readme_asks_as_we_do(framed, made, tmp_path, in_torch, capsys, monkeypatch):
    """Its program, run with transformers in the directory."""
    export(framed, tmp_path / "mine", "merged", made.edge, made.generators["factors"])
    readme = (tmp_path / "mine" / "README.md").read_text()
    [program] = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path / "mine")
    exec(program.replace("your input", "apple"), {})
    ours = load_model(".")
    [found] = generate_text(ours, [ours.frame.wrap("apple")], max_new_tokens=16)
    assert capsys.readouterr().out == f"{found}\n"


def test_objects_are_exported_as_their_files_are(made, write, tmp_path):
    card, generator = made.cards["factors"], made.generators["factors"]
    for format in FORMATS:
        needed(format)
        by_path = write("factors.card", format)
        export(card, tmp_path / by_path.name, format, made.edge, generator)
        files = [by_path] if by_path.is_file() else sorted(by_path.iterdir())
        for file in files:
            ours = tmp_path / by_path.name / file.relative_to(by_path)
            assert ours.read_bytes() == file.read_bytes(), file.name


# --- whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten(format, write, tmp_path):
    needed(format)
    mine = tmp_path / "out" / f"mine.{format}"
    mine.parent.mkdir()
    if format == "gguf-lora":
        mine.write_text("mine")
    else:
        mine.mkdir()
        (mine / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"mine.{format} already exists"):
        write("factors.card", format)
    assert (mine if mine.is_file() else mine / "notes.txt").read_text() == "mine"
    assert sum(1 for path in mine.parent.rglob("*") if path.is_file()) == 1


@pytest.mark.parametrize(
    "format, step",
    [
        ("merged", "lorax_gen.artifacts.export.save_card"),
        ("merged", "lorax_gen.artifacts.export.model_card"),
        ("merged", "lorax_gen.models.huggingface.write_params"),
        ("peft", "lorax_gen.artifacts.peft.write_tensors"),
        ("gguf-lora", "lorax_gen.artifacts.gguf.pair_neighbours"),
    ],
)
def test_a_failed_export_leaves_nothing_behind(format, step, write, tmp_path, monkeypatch):
    needed(format)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="no space left"):
        write("factors.card", format)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_fit_is_refused_before_anything_is_written(format, made, tmp_path):
    needed(format)
    card, generator = made.folder / "factors.card", made.generators["factors"]
    params = {**made.edge.params, "final_norm": made.edge.params["final_norm"] * 2}
    other = dataclasses.replace(made.edge, params=params)
    with pytest.raises(UserError, match="this card was made for the edge model"):
        export(card, tmp_path / "out", format, other, generator)
    with pytest.raises(UserError, match="this card was made with the pool"):
        export(card, tmp_path / "out", format, made.edge, made.generators["products"])
    with pytest.raises(UserError, match="no such file"):
        export(tmp_path / "nowhere", tmp_path / "out", format, made.edge, generator)
    with pytest.raises(UserError, match="is not a task card"):
        weights = made.folder / "edge" / "model.safetensors"
        export(weights, tmp_path / "out", format, made.edge, generator)
    assert not list(tmp_path.iterdir())
