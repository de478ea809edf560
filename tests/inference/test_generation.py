"""What is written comes a few tokens at a time, only grows, and ends where it should.

Most models here are scripted: what they write behind each prompt is told in advance, in pieces.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorax_gen import generate_text
from lorax_gen.errors import UserError
from lorax_gen.inference import generation
from lorax_gen.inference.generation import CHUNK, stream_text
from lorax_gen.mesh.sharding import (
    MeshConfig,
    keep_decoding,
    make_mesh,
    put_batch,
    row_shards,
    tree_shardings,
)
from lorax_gen.method.lora import take_example
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import DecoderConfig, Execution, kernel_shapes
from lorax_gen.models.model import Model
from tests.tiny import adapter_of

TEXTS = ["apple", "say the color of the bell", "five"]
EOS = "<eos>"
SIZE = 320  # of the vocabulary of scripted models, one for all: they share their programs
SCRIPTED = DecoderConfig(
    vocab_size=SIZE,
    hidden_size=SIZE,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
)


@pytest.fixture(scope="module")
def model(tiny_world_system):
    return tiny_world_system.edge


def byte_tokenizer(pieces=(), **options):
    """Byte-level BPE that encodes every text as its bytes; `pieces` are tokens on top of them.

    Pieces are text or bytes; one that is a single byte already is a token.
    """
    letters = byte_letters()
    ids = {letters[byte]: byte for byte in range(256)} | {EOS: 256}
    for piece in map(as_bytes, pieces):
        ids.setdefault("".join(letters[byte] for byte in piece), len(ids))
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, **options)


def byte_letters():
    """The printable letter that byte-level tokenizers write each byte as."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def fallback_tokenizer():
    """As LLaMA 2's: tokens of text (here one), and one for each byte of all other text."""
    ids = {f"<0x{byte:02X}>": byte for byte in range(256)} | {EOS: 256, "a": 257}
    tokenizer = Tokenizer(models.BPE(ids, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def as_bytes(piece):
    return piece.encode() if isinstance(piece, str) else piece


def follow(tokenizer, scripts):
    """A model without layers to speak of, each token of which has one that follows it.

    Behind a text that ends in the token `start` it writes `scripts[start]`, then the end of text.
    """
    head = np.zeros((SIZE, SIZE), np.float32)
    eos = tokenizer.eos_token_id
    head[:, eos] = 0.5
    seen = set()
    for start, ids in scripts.items():
        assert not seen & {start, *ids}, "of a token there is but one that follows it"
        seen |= {start, *ids}
        for token, following in zip([start, *ids], [*ids, eos], strict=True):
            head[token, following] = 1.0
    shapes = kernel_shapes(SCRIPTED)
    layers = {name: jnp.zeros((1, *shape)) for name, shape in shapes.items()}
    norms = {name: jnp.ones((1, SIZE)) for name in ("attn_norm", "mlp_norm")}
    params = {
        "embed": jnp.eye(SIZE),
        "final_norm": jnp.ones(SIZE),
        "lm_head": jnp.asarray(head),
        "layers": layers | norms,
    }
    return Model(SCRIPTED, params, tokenizer)


def scripted(scripts, **options):
    """A model that writes `scripts[letter]`, a list of pieces, behind a text that ends in it."""
    scripts = {ord(start): [as_bytes(p) for p in pieces] for start, pieces in scripts.items()}
    pieces = [piece for script in scripts.values() for piece in script if len(piece) > 1]
    rest = [f"{i}!{i}" for i in range(SIZE - 257 - len(pieces))]
    tokenizer = byte_tokenizer([*pieces, *rest], **options)
    letters = byte_letters()
    ids = {
        start: [tokenizer.convert_tokens_to_ids("".join(letters[b] for b in piece)) for piece in s]
        for start, s in scripts.items()
    }
    return follow(tokenizer, ids)


def stream(model, texts, **options):
    """All that is yielded of each text; checks what holds for any stream."""
    yields = list(stream_text(model, texts, **options))
    for row in range(len(texts)):
        for before, after in itertools.pairwise(yields):
            assert after[row].startswith(before[row])
    return list(zip(*yields, strict=True))


def ends(length):
    """How many of `length` tokens have been written at each yield."""
    return [1, *range(1 + CHUNK, length, CHUNK), length]


# --- what is written -----------------------------------------------------------------------------


def test_text_is_continued_row_by_row_without_special_tokens(model):
    expected = []
    logits = jax.jit(model)
    for text in TEXTS:
        ids = model.tokenizer(text)["input_ids"]
        start = len(ids)
        while len(ids) < start + 3 and model.tokenizer.eos_token_id not in ids:
            padded = np.array([ids + [0] * (12 - len(ids))], np.int32)
            ids.append(int(logits(padded)[0, len(ids) - 1].argmax()))
        expected.append(model.tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert generate_text(model, TEXTS, max_new_tokens=3) == expected
    assert all(expected)


def test_no_more_tokens_are_written_than_asked_for():
    script = "bcdefghijklmnopqrstuvwxyz"
    model = scripted({"a": list(script)})
    for length in (1, 2, CHUNK, 1 + CHUNK, 2 + CHUNK, 2 * CHUNK, 25):
        assert generate_text(model, ["a"], max_new_tokens=length) == [script[:length]]
        (yielded,) = stream(model, ["a"], max_new_tokens=length)
        assert [len(text) for text in yielded] == sorted(set(ends(length)))
    assert generate_text(model, ["a"], max_new_tokens=40) == [script]  # then the text ends


def test_of_no_texts_nothing_is_written(model):
    assert generate_text(model, []) == []
    assert list(stream_text(model, [])) == []


OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.5, "seed": 1},
    "restricted": {"temperature": 3.0, "top_k": 50, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def babbler(random_params):
    """Writes bytes and pieces at random: half characters, and what no character begins with."""
    pieces = [f"{c}{d}" for c in "abcdefgh" for d in "abcdefgh"][: SIZE - 257]
    config = dataclasses.replace(SCRIPTED, hidden_size=16)
    return Model(config, random_params(config), byte_tokenizer(pieces))


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_yielded_only_grows_and_ends_as_the_whole(name, babbler):
    options = OPTIONS[name] | {"max_new_tokens": 30, "stop": ["ab", "é", "haf"]}
    texts = ["a", "bc", "d", "€"]
    rows = stream(babbler, texts, **options)
    assert [row[-1] for row in rows] == generate_text(babbler, texts, **options)
    assert len({row[-1] for row in rows}) == len(texts)


def test_the_seed_decides_what_is_drawn(model):
    options = {"max_new_tokens": 8, "temperature": 2.0}
    first, again, other = (generate_text(model, TEXTS, seed=s, **options) for s in (0, 0, 1))
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))
    assert first != generate_text(model, TEXTS, max_new_tokens=8)


def test_restrictions_reach_the_drawing(model):
    greedy = generate_text(model, TEXTS, max_new_tokens=8)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        found = generate_text(model, TEXTS, max_new_tokens=8, temperature=5.0, **options)
        assert found == greedy


# --- ends ----------------------------------------------------------------------------------------

LETTERS = "bcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    "stop, expected",
    [
        (["q"], "bcdefghijklmnop"),
        (["b"], ""),  # the first token
        (["fgh"], "bcde"),  # across tokens
        (["bc"], ""),  # across the first two yields
        ([LETTERS[CHUNK : CHUNK + 2]], LETTERS[:CHUNK]),  # across chunks
        ([LETTERS[4 : 2 * CHUNK + 6]], LETTERS[:4]),  # over several
        (["gh", "de", "yz"], "bc"),  # the earliest
        (["def", "de"], "bc"),  # one in the other
        (["cx", "mm", "zz"], LETTERS),  # none is written
        (["yz"], LETTERS[:-2]),  # just before the end
    ],
)
def test_a_stop_string_ends_a_text_and_is_no_part_of_it(stop, expected):
    model = scripted({"a": list(LETTERS)})
    (yielded,) = stream(model, ["a"], max_new_tokens=30, stop=stop)
    assert yielded[-1] == expected


def test_a_stop_string_may_lie_inside_a_token():
    model = scripted({"a": ["bcd", "efg\nhi", "\n\nj"]})
    for stop, expected in (("f", "bcde"), ("g\nh", "bcdef"), ("i\n\n", "bcdefg\nh"), ("de", "bc")):
        assert generate_text(model, ["a"], stop=[stop]) == [expected]


def test_each_row_stops_by_itself():
    model = scripted({"a": list("bcdefghijklmn"), "o": list("pqrs"), "t": list("uvwxyz")})
    found = generate_text(model, ["a", "o", "t"], max_new_tokens=20, stop=["ef", "wx"])
    assert found == ["bcd", "pqrs", "uv"]


def test_rows_that_have_ended_are_computed_no_further(monkeypatch):
    """By a stop token or a stop string, and the rows that fill a batch up."""
    long = "bcdefghijkl"
    model = scripted({"0": list("123"), "A": list("BCDEFGHIJKL"), "a": list(long)})
    finished, advance = [], generation.advance

    def spy(params, config, state, **options):
        finished.append(np.asarray(state.finished).tolist())
        return advance(params, config, state, **options)

    monkeypatch.setattr(generation, "advance", spy)
    options = {"max_new_tokens": 3 * CHUNK, "stop": ["DE"]}
    assert generate_text(model, ["0", "a", "A"], **options) == ["123", long, "BC"]
    assert finished == [[False, False, False, True], [True, False, True, True]]
    finished.clear()
    assert generate_text(model, ["0", "0", "A"], **options) == ["123", "123", "BC"]
    assert len(finished) == 1


def test_stop_tokens_end_a_text_whichever_comes_first():
    model = scripted({"a": list("bcdefghijklmnop")})
    for letters, expected in (("g", "bcdef"), ("mgk", "bcdef"), ("o", "bcdefghijklmn")):
        ids = (model.tokenizer.eos_token_id, *map(ord, letters))
        stopping = dataclasses.replace(model, stop_ids=ids)
        assert generate_text(stopping, ["a"], max_new_tokens=30) == [expected]


@pytest.fixture
def token_by_token(monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 1)


def test_the_beginning_of_a_stop_string_is_held_back(token_by_token):
    model = scripted({"a": ["x", "y", "b", "c", "d", "yz"]})
    (yielded,) = stream(model, ["a"], stop=["bce", "db"])
    assert yielded == ("x", "xy", "xy", "xy", "xybc", "xybcdyz", "xybcdyz")
    (yielded,) = stream(model, ["a"], stop=["yzq"])  # the text ends in half of one: it is no stop
    assert yielded == ("x", "x", "xyb", "xybc", "xybcd", "xybcd", "xybcdyz")


def test_half_a_character_is_held_back(token_by_token):
    model = scripted({"a": [bytes([byte]) for byte in "é€😀".encode()]})
    (yielded,) = stream(model, ["a"])
    assert yielded == ("", "é", "é", "é", "é€", "é€", "é€", "é€", "é€😀", "é€😀")
    (yielded,) = stream(model, ["a"], max_new_tokens=4)  # ends in the middle of one
    assert yielded[:-1] == ("", "é", "é")
    assert yielded[-1].rstrip("\ufffd") == "é"


def test_a_stop_string_may_end_in_half_a_token():
    """`€` in two tokens, the second of which goes on."""
    first, rest = "€".encode()[:2], "€".encode()[2:]
    model = scripted({"a": ["b", first, rest + b"cd", "e"]})
    (yielded,) = stream(model, ["a"], stop=["€c"])
    assert yielded[-1] == "b"


def test_bytes_that_begin_no_character_are_written_as_one_that_says_so(token_by_token):
    model = scripted({"a": [b"\xff", b"b", b"\xc3", b"c"]})
    (yielded,) = stream(model, ["a"])
    assert yielded == ("", "\ufffdb", "\ufffdb", "\ufffdb\ufffdc", "\ufffdb\ufffdc")


def test_two_stop_strings_end_a_text_once_and_for_all(token_by_token):
    """What a row repeats behind its end makes no stop string of it that begins earlier."""
    model = scripted({"a": ["b", "c", "d"], "0": list("12345678")})
    stop = ["cd", "bcdd"]
    first, second = stream(model, ["a", "0"], stop=stop)
    assert first[-1] == "b"
    assert second[-1] == "12345678"


def test_what_was_yielded_stays_where_bytes_are_tokens_of_their_own(token_by_token):
    """LLaMA 2's way: half a character makes those before it unreadable, as long as it is half."""
    tokenizer = fallback_tokenizer()
    start = tokenizer.convert_tokens_to_ids("a")
    model = follow(tokenizer, {start: list("€é".encode())})
    (yielded,) = stream(model, ["a"])
    assert yielded == ("", "", "€", "€", "€é", "€é")
    (yielded,) = stream(model, ["a"], max_new_tokens=4)
    assert yielded[-1].startswith("€")


# --- batches -------------------------------------------------------------------------------------


def random_lora(config, *lead):
    rng = np.random.default_rng(1)
    return {
        name: {
            "a": jnp.asarray(rng.normal(0, d_in**-0.5, (*lead, d_in, 3)), jnp.float32),
            "b": jnp.asarray(rng.normal(0, 0.5, (*lead, 3, d_out)), jnp.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(config).items()
    }


def test_each_text_is_continued_as_if_alone(model):
    options = {"max_new_tokens": 10}
    alone = [generate_text(model, [text], **options)[0] for text in TEXTS]
    assert generate_text(model, TEXTS, **options) == alone  # three are filled up to four
    assert generate_text(model, TEXTS + TEXTS[::-1][:2], **options) == alone + alone[::-1][:2]


def test_token_ids_are_continued_as_they_are(model):
    ids = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    assert generate_text(model, ids) == generate_text(model, TEXTS)
    bare = generate_text(model, [row[1:] for row in ids])  # without the <bos> of every text
    assert bare != generate_text(model, TEXTS)


def test_a_row_draws_the_same_in_a_batch_of_any_size(model):
    options = {"max_new_tokens": 10, "temperature": 2.0}
    three = generate_text(model, TEXTS, **options)
    assert generate_text(model, TEXTS[:1], **options) == three[:1]
    assert generate_text(model, TEXTS[:2], **options) == three[:2]


def test_a_lora_per_example_is_that_of_its_text(model):
    """Three texts, each with a LoRA of its own, as each text alone with that LoRA for all."""
    loras = random_lora(model.config, model.config.num_hidden_layers, len(TEXTS))
    options = {"max_new_tokens": 10}
    together = generate_text(model, TEXTS, adapter=Adapter(rows=loras), **options)
    alone = [
        generate_text(model, [text], adapter=Adapter(take_example(loras, i)), **options)
        for i, text in enumerate(TEXTS)
    ]
    assert [together] == [[text for (text,) in alone]]
    plain = generate_text(model, TEXTS, **options)
    assert all(one != other for one, other in zip(together, plain, strict=True))


def test_texts_of_a_bucket_share_their_programs(model):
    def programs():
        return generation.prefill._cache_size(), generation.advance._cache_size()

    def sampled(texts, **options):
        generate_text(model, texts, temperature=options.pop("temperature", 0.9), **options)

    sampled(["apple"] * 3, max_new_tokens=20, top_p=0.9)
    before = programs()
    sampled(["say the color of each bell"] * 4, max_new_tokens=9, top_p=0.5, seed=5)
    sampled(["the " * 20, "bell", "five"], max_new_tokens=32, top_p=0.7, temperature=1.1)
    assert programs() == before
    sampled(["the " * 40] * 3, max_new_tokens=20, top_p=0.9)  # a longer bucket
    assert programs() == (before[0] + 1, before[1] + 1)


# --- chat ----------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def test_a_chat_puts_texts_into_the_template(monkeypatch):
    model = scripted({"a": list("bcd"), "x": list("yz")}, chat_template=TEMPLATE)
    read, prefill = [], generation.prefill

    def spy(params, config, tokens, lengths, **options):
        rows = zip(np.asarray(tokens), lengths, strict=True)
        read.append([bytes(row[:length].tolist()).decode() for row, length in rows])
        return prefill(params, config, tokens, lengths, **options)

    monkeypatch.setattr(generation, "prefill", spy)
    assert generate_text(model, ["x", "yes"], chat=True) == ["bcd", "bcd"]
    assert generate_text(model, ["x", ""], chat=True, system="be brief") == ["bcd", "bcd"]
    assert generate_text(model, ["x", "x"]) == ["yz", "yz"]
    assert read == [
        ["[user:x]a", "[user:yes]a"],
        ["[system:be brief][user:x]a", "[system:be brief][user:]a"],
        ["x", "x"],
    ]


def test_a_chat_without_a_template_is_refused(model):
    with pytest.raises(UserError, match="no chat template; leave out --chat"):
        generate_text(model, TEXTS, chat=True)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: choose at least 1"),
        ({"temperature": -0.5}, r"temperature=-0\.5: choose 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature=nan: choose"),
        ({"temperature": float("inf")}, "temperature=inf: choose"),
        ({"top_k": 0}, "top_k=0: choose at least 1"),
        ({"top_p": 0.0}, r"top_p=0\.0: choose a probability above 0, up to 1"),
        ({"top_p": 1.5}, r"top_p=1\.5: choose"),
        ({"top_p": float("nan")}, "top_p=nan: choose"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
    ],
)
def test_an_option_out_of_range_is_named(options, message, model):
    with pytest.raises(UserError, match=message) as error:
        generate_text(model, TEXTS, **options)
    assert "\n" not in str(error.value)


def test_a_single_string_is_no_batch(model):
    with pytest.raises(UserError, match=r"texts is a string, .* pass \[text\]"):
        generate_text(model, "apple")


def test_a_text_without_tokens_is_refused():
    model = scripted({"a": ["b"]})
    with pytest.raises(UserError, match="the text '' has no tokens to continue"):
        generate_text(model, ["a", ""])


def test_an_empty_text_is_continued_where_the_tokenizer_begins_one(model):
    assert generate_text(model, [""], max_new_tokens=2) != [""]


def test_a_text_too_long_for_the_model_is_refused_with_both_numbers():
    model = scripted({"a": list("bcd")})
    model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, max_position_embeddings=12)
    )
    assert generate_text(model, ["x" * 8 + "a"], max_new_tokens=3) == ["bcd"]
    with pytest.raises(UserError, match=r"a text of 9 tokens and 4 new ones .* the 12 positions"):
        generate_text(model, ["a", "x" * 8 + "a"], max_new_tokens=4)


# --- on a mesh -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(8, 1, 1), (2, 2, 2)], ids=str)
def mesh(request):
    return make_mesh(MeshConfig(*request.param), jax.devices("cpu")[:8])


@pytest.fixture(scope="module")
def spread(model, mesh):
    """The model with its weights over the mesh."""
    params = jax.device_put(model.params, tree_shardings(model.params, mesh))
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize("leading", [(2,), (2, 3)], ids=["shared LoRA", "LoRA per example"])
def test_a_mesh_changes_no_text(leading, model, mesh, spread):
    rng = np.random.default_rng(0)
    lora = {
        name: {
            "a": rng.normal(size=(*leading, d_in, 2)).astype(np.float32),
            "b": rng.normal(size=(*leading, 2, d_out)).astype(np.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(model.config).items()
    }
    adapter = adapter_of(lora)
    for options in ({"adapter": adapter}, {"temperature": 2.0, "seed": 3, "adapter": adapter}):
        expected = generate_text(model, TEXTS, max_new_tokens=9, **options)
        assert generate_text(spread, TEXTS, max_new_tokens=9, mesh=mesh, **options) == expected


def test_caches_are_split_by_rows_and_heads(mesh, spread):
    rows = jnp.ones((8, 4), jnp.int32), jnp.full(8, 4, jnp.int32)
    state = generation.prefill(
        spread.decoding_params,
        spread.config,
        *put_batch(rows, mesh),
        slots=8,
        execution=Execution(constrain=keep_decoding(mesh)),
    )
    size = spread.config.head_dim, spread.config.num_key_value_heads
    held = (8 // row_shards(mesh), 8, size[1] // mesh.shape["tensor"], size[0])
    for leaf in jax.tree.leaves(state.cache):
        assert leaf.addressable_shards[0].data.shape == held


# --- stop strings and special tokens -------------------------------------------------------------

END, SEP = "<|im_end|>", "<|sep|>"


def chatty(script):
    """As `scripted` behind an `a`, with `END` and `SEP` as special tokens that end no text."""
    tokenizer = byte_tokenizer([])
    tokenizer.add_special_tokens({"additional_special_tokens": [END, SEP]})
    ids = [tokenizer.convert_tokens_to_ids(p) if len(p) > 1 else ord(p) for p in script]
    return follow(tokenizer, {ord("a"): ids})


@pytest.mark.parametrize(
    "script, stop, expected",
    [
        (["b", END, "c"], [END], "b"),  # a special token alone
        (["b", "c", END, "\n", "d"], [f"{END}\n"], "bc"),  # with text after it
        (["b", "c", END, "d"], [f"c{END}"], "b"),  # and before it
        (["b", SEP, "c", END, "d"], [END], "bc"),  # another one before it
        (["b", SEP, "c", END, "d"], [f"{SEP}c{END}"], "b"),  # from one to the other
        (["b", END, "c", "d"], ["end|>c"], "b"),  # begins within a special token's text
        (["b", END, "c", "d"], ["<|im"], "b"),
        (["b", SEP, "c", "d"], ["bc"], ""),  # of the text that is returned
        (["b", SEP, "c", "d"], ["zz", END], "bcd"),  # none is written
        (["b", "c"], [f"c{EOS}"], "b"),  # with the model's own end of text
        (["b", END, "c", SEP, "d"], ["d", SEP, f"{END}c"], "b"),  # the first to be complete
    ],
)
@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_a_stop_string_may_contain_special_tokens(script, stop, expected, chunk, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", chunk)
    (yielded,) = stream(chatty(script), ["a"], stop=stop)
    assert yielded[-1] == expected
    assert all(expected.startswith(text) for text in yielded)


def test_a_text_before_the_special_token_of_a_stop_string_is_held_back(token_by_token):
    (yielded,) = stream(chatty(["b", "c", END, "d"]), ["a"], stop=[f"c{END}\n"])
    assert yielded[:4] == ("b", "b", "b", "bcd")


def test_cleaning_of_spaces_takes_nothing_back(token_by_token):
    """`do n ' t` becomes `don't` when the last of it is written."""
    words = "a do n ' t go , he said . x".split()
    ids = {EOS: 0, **{word: i for i, word in enumerate(words, 1)}}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=True
    )
    model = follow(tokenizer, {1: [ids[word] for word in words[1:]]})
    (yielded,) = stream(model, ["a"])
    assert yielded[-1] == "don't go, he said. x"
    (yielded,) = stream(model, ["a"], stop=[", he"])
    assert yielded[-1] == "don't go"


def test_without_any_stop_token_a_text_goes_on_to_the_most_tokens():
    model = dataclasses.replace(scripted({"a": list("bcd")}), tokenizer=byte_tokenizer([]))
    model.tokenizer.eos_token = None
    model = dataclasses.replace(model, stop_ids=())
    assert model.stop_ids == ()
    (text,) = generate_text(model, ["a"], max_new_tokens=12)
    assert text.startswith("bcd")


def test_a_continuation_in_context_begins_with_its_space(model):
    (alone,) = generate_text(model, TEXTS[:1], max_new_tokens=4)
    (found,) = generate_text(model, TEXTS[:1], max_new_tokens=4, in_context=True)
    assert found == f" {alone}" != alone


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d", "a\udfff"])
def test_a_text_that_is_not_unicode_is_refused(model, text):
    for texts, options in (([text], {}), (["apple"], {"stop": [text]})):
        with pytest.raises(UserError, match="the text is not UTF-8"):
            generate_text(model, texts, **options)


@pytest.mark.parametrize("ids", [[1, SIZE], [-1, 5], [2**40]])
def test_token_ids_that_the_model_does_not_have_are_refused(ids):
    with pytest.raises(UserError, match=f"the model's vocabulary has {SIZE} ids from 0"):
        generate_text(scripted({"a": ["b"]}), [ids])


def test_token_ids_that_are_no_integers_are_refused(model):
    with pytest.raises(UserError, match="token ids should be integers"):
        generate_text(model, [[1, 1.5]])


def test_a_huge_text_is_refused_before_it_is_tokenised(model, monkeypatch):
    monkeypatch.setattr(type(model), "encode", None)
    with pytest.raises(UserError, match="a text of 20,000,000 characters is longer than 2,048 to"):
        generate_text(model, ["apple bell" * 2_000_000])
