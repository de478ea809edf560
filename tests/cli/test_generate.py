"""`lorax-gen generate`: what is printed for questions, and which options are refused."""

import dataclasses
import io
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from lorax_gen import cli, generate_text, load_generator, load_model, save_generator
from lorax_gen.frames import Frame
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model
from tests.tiny import PROMPTS


def test_a_context_stands_before_every_question(call, models):
    _, out, _ = call("generate", "apple :", "--edge", models / "edge", "--context", "red box")
    _, same, _ = call("generate", "red box apple :", "--edge", models / "edge")
    assert out.split(":")[1] == same.split(":")[1]


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory, random_params):
    """A model of bytes, which continues a text with a new line at its end in another way."""
    letters = sorted(ByteLevel.alphabet())  # which has another order in each process
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    config = DecoderConfig(256, 16, 16, 1, 2, 1, 8)
    path = tmp_path_factory.mktemp("bytes") / "model"
    save_model(path, Model(config, random_params(config, 3), tokenizer))
    return path


def test_the_same_text_is_continued_however_it_is_given(call, bytes_model, tmp_path, monkeypatch):
    """As in Python, and printed as the text with its continuation and nothing else."""
    text = "### Response:\n"
    [written] = generate_text(load_model(bytes_model), [text], max_new_tokens=6)
    assert written != generate_text(load_model(bytes_model), [text.strip()], max_new_tokens=6)[0]
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    for given in (text, "@prompt.txt", "-"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n"))
        words = ["generate", given, "--model", bytes_model, "--max-new-tokens", 6]
        assert call(*words) == (0, f"{text}{written}\n", "")
    words = ["generate", "--model", bytes_model, "--max-new-tokens", 6, "--", "@@x", "-y"]
    _, out, _ = call(*words)
    assert out.startswith("@x") and "\n-y" in out


def test_what_is_between_context_and_question_is_said(call, bytes_model):
    def generate(*words):
        return call("generate", *words, "--model", bytes_model, "--max-new-tokens", 6)[1]

    found = {}
    for given in ("", " ", "\n\n"):
        found[given] = generate("apple", "--context", "red box", "--separator", given)
        assert found[given] == generate(f"red box{given}apple").removeprefix(f"red box{given}")
    assert len(set(found.values())) == 3
    assert generate("apple", "--context", "red box") == found[" "]


@pytest.mark.parametrize(
    "words, message",
    [
        (["-", "-"], "- is given twice"),
        (["a", "-", "--context", "-"], "- is given twice"),
        (["a", "--chat", "--separator", ""], "--separator has no use with --chat"),
        (["@missing"], "cannot read the prompt file missing"),
        (["a", "--context", "@missing"], "cannot read the prompt file missing"),
        (["caf\udce9"], "the text is not UTF-8"),
        (["a", "--stop", "caf\udce9"], "the text is not UTF-8"),
        (["a", "--card", "caf\udce9"], "the text is not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(refused, models, words, message):
    assert message in refused("generate", "--edge", models / "edge", *words)


def test_an_answer_that_the_terminal_cannot_show_is_an_error(models, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "café", "--edge", str(models / "edge")])
    assert stop.value.code == 2
    assert "cannot show 'é' in ascii; set PYTHONIOENCODING=utf-8" in capfd.readouterr().err


def test_a_single_text_is_streamed_as_it_would_be_printed(generate):
    """`talker` never ends a text, so there are several pieces to it."""
    texts, options = ["apple :", "bell :", "apple :"], ("--max-new-tokens", 30)
    together = generate(*texts, *options, model="talker").splitlines()
    assert len(together[0].split()) == 2 + 30
    assert [generate(text, *options, model="talker")[:-1] for text in texts] == together


def test_a_stop_string_ends_an_answer(generate):
    options = ("--max-new-tokens", 30)
    [*_, third, fourth, _] = words = generate("apple :", *options, model="talker").split()
    for questions in (["apple :"], ["apple :", "bell :"]):
        out = generate(*questions, *options, "--stop", third, fourth, model="talker")
        line = out.splitlines()[0].split()
        cut = min(words.index(third, 2), words.index(fourth, 2))
        assert line == words[:cut]


def test_what_is_drawn_follows_the_seed(generate):
    def draw(seed, *options):
        words = ["apple :", "--max-new-tokens", 12, "--temperature", 2, "--seed", seed, *options]
        return generate(*words, model="talker")

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    greedy = generate("apple :", "--max-new-tokens", 12, model="talker")
    assert draw(0, "--top-k", 1) == draw(1, "--top-p", "1e-6") == greedy


def test_chat_puts_questions_into_the_template(generate):
    bare = generate("thing apple red box bell :", model="chatter")
    out = generate("red box", "--chat", "--context", "apple", model="chatter")
    assert out.removeprefix("red box ") == bare.removeprefix("thing apple red box bell : ")


def test_an_adapter_answers_as_its_card(call, card, generate, models):
    options = ["--edge", models / "edge", "--generator", models / "generator"]
    code, out, err = call("export", card, "--format", "peft", "--output", "adapter", *options)
    assert (code, out, err) == (0, "peft: adapter\n", "")
    questions = ["apple :", "bell :"]
    by_card = generate(*questions, "--card", card, "--generator", models / "generator")
    assert generate(*questions, "--card", "adapter", "--generator", "nowhere") == by_card
    assert generate(*questions) != by_card


def test_a_card_that_does_not_fit_is_refused(refused, card, models):
    def generate(edge="edge", generator="generator"):
        options = ["--edge", models / edge, "--generator", models / generator, "--card", card]
        return refused("generate", "apple :", *options)

    assert "this card was made with the pool" in generate(generator="generator2")
    assert "this card was made for the edge model" in generate(edge="edge2")
    card.write_bytes(card.read_bytes()[:-1])
    assert "task.card.safetensors is not a complete safetensors file" in generate()
    card.unlink()
    assert "no such file: " in generate()


def test_generate_without_a_question_is_refused(refused, models):
    assert "no question given" in refused("generate", "--edge", models / "edge")


@pytest.mark.parametrize("questions", [["apple :"], ["apple :", "bell :"]], ids=["one", "two"])
@pytest.mark.parametrize(
    "options, message",
    [
        (["--chat"], "no chat template; leave out --chat"),
        (["--temperature", "-1"], "temperature=-1.0: choose 0 (greedy) or more"),
        (["--top-k", "0"], "top_k is 0; expected int >= 1"),
        (["--top-p", "1.5"], "top_p=1.5: choose a probability above 0, up to 1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; expected int >= 1"),
        (["--max-new-tokens", "9999"], "more than the 2048 positions of the model"),
        (["--stop", ""], "a stop string is empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_of_generate_is_refused(refused, models, questions, options, message):
    assert message in refused("generate", *questions, "--edge", models / "edge", *options)


def test_an_adapter_of_another_model_is_refused(call, refused, card, to, models):
    assert call(*to("export", card, "--format", "peft", "--output", "adapter"))[0] == 0
    words = ["generate", "apple :", "--card", "adapter", "--edge", models / "cloud"]
    assert "is the adapter for another model?" in refused(*words)


def test_the_edge_has_an_older_name(call, models):
    """`--model` is what `--edge` was called."""
    by_edge, by_model = (
        call("generate", "apple :", option, models / "talker") for option in ("--edge", "--model")
    )
    assert by_edge == by_model
    assert by_edge != call("generate", "apple :", "--edge", models / "edge")


# --- frames --------------------------------------------------------------------------------------

FRAME = Frame("thing {input} box :")
TURN = Frame("thing {input} box :", "", turn=True)
ASKED = ["apple", "bell"]


@pytest.fixture
def framed(call, models, tmp_path):
    """`framed(frame)`: the name of a card of a generator with a frame; it names all it needs."""

    def framed(frame):
        for name in ("cloud", "edge"):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(models / name)
        generator = load_generator(models / "generator")
        metadata = generator.metadata | {"frame": frame.stored()}
        save_generator(tmp_path / "framed", dataclasses.replace(generator, metadata=metadata))
        options = ["--cloud", "cloud", "--edge", "edge", "--generator", "framed"]
        assert call("specialize", PROMPTS[0], *options)[0] == 0
        return "task.card.safetensors"

    return framed


def answers(call, *words):
    """What follows each question of `ASKED`."""
    code, out, err = call("generate", *words, "--max-new-tokens", 3)
    assert (code, err) == (0, "")
    return [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("frame", [FRAME, TURN], ids=["text", "turn"])
def test_questions_go_into_the_frame_of_a_card_and_are_shown_as_typed(call, framed, frame):
    card = framed(frame)
    read = answers(call, *map(frame.wrap, ASKED), "--raw", "--card", card)
    found = answers(call, *ASKED, "--card", card)
    assert [words[0] for words in found] == ASKED
    assert [words[1:] for words in found] == [words[4:] for words in read]
    assert answers(call, *ASKED, "--raw", "--card", card) != found


def test_a_merged_model_and_an_adapter_have_the_frame_of_their_card(call, framed):
    card = framed(FRAME)
    found = answers(call, *ASKED, "--card", card)
    for format in ("merged", "peft"):
        assert call("export", card, "--format", format, "--output", format)[0] == 0
    assert answers(call, *ASKED, "--edge", "merged") == found
    assert answers(call, *ASKED, "--card", "peft") == found
    raw = answers(call, *ASKED, "--card", card, "--raw")
    assert answers(call, *ASKED, "--edge", "merged", "--raw") == raw != found


@pytest.mark.parametrize(
    "frame, text",
    [(FRAME, "red thing apple box :"), (TURN, "thing red apple box :")],
    ids=["text", "turn"],
)
def test_a_context_goes_before_a_frame_or_into_a_turn(call, framed, frame, text):
    card = framed(frame)
    [asked] = answers(call, "apple", "--context", "red", "--card", card)
    [read] = answers(call, text, "--raw", "--card", card)
    assert asked[1:] == read[5:]


@pytest.mark.parametrize(
    "words, option", [(["--chat"], "--chat"), (["--context", "red", "--separator", ""], "--sep")]
)
def test_a_template_or_separator_besides_a_frame_is_refused(call, refused, framed, words, option):
    card = framed(FRAME)
    message = refused("generate", "apple", "--card", card, *words)
    assert message.startswith(option) and "the frame 'thing {input} box :'" in message
    assert "give --raw to use texts without that frame" in message
    if option == "--sep":
        assert call("generate", "apple", "--card", card, *words, "--raw")[0] == 0


def test_a_frame_that_leaves_inputs_alone_is_none_to_generate(call, framed):
    """Such as that of a mixture of benchmarks and bare rows."""
    card = framed(Frame(benchmarks=False))
    words = ["generate", "apple", "--card", card, "--context", "red"]
    assert call(*words, "--separator", " ") == call(*words) == call(*words, "--raw")


def test_an_adapter_whose_name_leads_to_another_edge_is_refused(call, refused, framed, models):
    card = framed(FRAME)
    assert call("export", card, "--format", "peft", "--output", "adapter")[0] == 0
    Path("edge").unlink()
    Path("edge").symlink_to(models / "edge2")
    message = refused("generate", "apple", "--card", "adapter")
    assert "this adapter was made for the edge model 'edge' (" in message
    assert "leads to is 'edge' (" in message
    assert call("generate", "apple", "--card", "adapter", "--edge", "edge")[0] == 0  # it is meant


def test_a_card_alone_is_enough_where_it_was_made(call, framed, refused):
    card = framed(FRAME)
    assert call("verify", card)[0] == 0
    assert call("export", card, "--format", "merged", "--output", "merged")[0] == 0
    assert call("verify", "merged")[0] == 0
    Path("edge").unlink()
    for words in (["generate", "apple", "--card", card], ["verify", card], ["verify", "merged"],
                  ["export", card, "--format", "peft", "--output", "adapter"]):  # fmt: skip
        message = refused(*words)
        assert "names the edge 'edge', which is neither here nor beside it; give it as" in message
