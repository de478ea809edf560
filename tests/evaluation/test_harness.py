"""lm-evaluation-harness gets from our class what it gets from its own, on the same files."""

import builtins
import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from lorax_gen import generate_text, load_card, load_generator, load_model, save_card, specialize
from lorax_gen.errors import UserError
from lorax_gen.evaluation import harness
from lorax_gen.frames import Frame
from tests.tiny import PROMPTS, make_generator, write_system

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lorax-gen[harness]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from lorax_gen.evaluation.harness_model import HarnessModel, generation_options

CLOSE = 1e-3
PAIRS = [
    ("apple :", " alpha"),
    ("apple :", " beta gamma"),
    ("apple :", " delta"),
    ("the color of the bell is ", "red"),  # its space belongs to what follows
    ("", "the apple is red"),
    ("", " blue"),
    (" ".join(["bell"] * 50), " " + " ".join(["apple blue"] * 12)),  # longer than 64
    ("sort the things . look at the size of the thing", " tiny = alpha , small = beta"),
]
TEXTS = ["the apple is red", "five : six", " ".join(["apple bell lamp"] * 60), "king"]


@pytest.fixture(scope="module")
def generator(tiny_world_system):
    return make_generator(tiny_world_system)


@pytest.fixture(scope="module")
def directory(tiny_world_system, generator, tmp_path_factory):
    """Models and generator as files, and a card."""
    path = write_system(tmp_path_factory.mktemp("harness"), tiny_world_system, generator)
    card = specialize(PROMPTS[0], load(path, "cloud"), load(path, "edge"), generator)
    save_card(path / "task.card.safetensors", card)
    return path


def load(path, name):
    return load_model(path / name)


def make(directory, **options):
    names = {name: str(directory / name) for name in ("edge", "cloud", "generator")}
    return HarnessModel(**names | options)


@pytest.fixture(scope="module")
def ours(directory):
    return make(directory, max_length=64)


@pytest.fixture(scope="module")
def theirs(directory):
    """lm-eval's own backend, on torch."""
    for name in ("torch", "accelerate"):
        pytest.importorskip(name, reason="needs torch: pip install -e '.[parity]'")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(directory / "edge"), device="cpu", dtype="float32", batch_size=2, max_length=64)


def requests(kind, arguments, document=lambda i: i):
    return [
        Instance(kind, {}, each, 0, ("task", document(i), 1)) for i, each in enumerate(arguments)
    ]


# --- beside lm-eval's own backend ----------------------------------------------------------------


@pytest.mark.parametrize("document", [lambda i: i, lambda i: i // 3], ids=["alone", "together"])
def test_loglikelihoods_are_those_of_the_torch_backend(ours, theirs, document):
    asked = requests("loglikelihood", PAIRS, document)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_loglikelihoods_are_those_of_the_torch_backend(ours, theirs):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert found[2] < 3 * min(found[0], found[1])  # several windows, each token counted once


def test_texts_are_continued_as_by_the_torch_backend(ours, theirs):
    short, long = {"until": ["\n"], "max_gen_toks": 6}, {"until": ["x"], "max_gen_toks": 20}
    arguments = [(text, short) for text in TEXTS] + [(text, long) for text in TEXTS]
    asked = requests("generate_until", arguments)
    found = ours.generate_until(asked, disable_tqdm=True)
    word = found[-1].split()[2]  # stop at a word that is known to come
    asked += requests("generate_until", [(TEXTS[-1], {"until": [word], "max_gen_toks": 20})])
    found = ours.generate_until(asked, disable_tqdm=True)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert found[-1] == found[-2].split(word)[0] != found[-2]


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory, tiny_world_system):
    """A task of multiple choice and one of writing, from a file of questions."""
    path = tmp_path_factory.mktemp("task")
    questions = [
        pair for each in tiny_world_system.world.tasks[::40] for pair in each.questions[:4]
    ]
    rows = [
        {"question": question, "choices": [answer, "zebra", "alpha", "one"], "gold": 0}
        for question, answer in questions
    ]
    (path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path / "test.jsonl")},
            "cache_dir": str(path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choose = common | {
        "task": "world_choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write = common | {
        "task": "world_write",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, config in (("choose", choose), ("write", write)):
        (path / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return path, len(rows), [choose, write]


def answers(results, name):
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def test_a_specialised_model_is_asked_as_any_other(directory, task, tiny_world_system):
    _, count, tasks = task
    harness.register()

    def run(**options):
        names = {name: str(directory / name) for name in ("edge", "cloud", "generator")}
        return simple_evaluate(
            model="lorax_gen",
            model_args=names | options,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),  # reading all of them takes long
            bootstrap_iters=0,
            batch_size=1,
            device="cuda:0",  # lm-eval's default; jax has its own
        )

    plain = run()
    card = run(card=str(directory / "task.card.safetensors"))
    prompt = run(prompt=PROMPTS[0])
    scores = [
        np.array(answers(each, "world_choose"), float)[..., 0] for each in (plain, card, prompt)
    ]
    assert scores[0].shape == (count, 4)
    np.testing.assert_allclose(scores[1], scores[2], atol=1e-5)
    assert np.abs(scores[0] - scores[1]).max() > 0.01
    assert plain["results"]["world_choose"]["acc,none"] == (scores[0].argmax(1) == 0).mean()
    assert card["config"]["model_sha"] == prompt["config"]["model_sha"]
    assert card["config"]["model_sha"] != plain["config"]["model_sha"]
    written = [text for (text,) in answers(plain, "world_write")]
    asked = [sample["doc"]["question"] for sample in plain["samples"]["world_write"]]
    assert written == generate_text(tiny_world_system.edge, asked, max_new_tokens=3)


def test_the_command_is_lm_evals_own_with_our_model_in_it(directory, task, tmp_path, capsys):
    path, count, _ = task
    arguments = [
        "--model", "lorax_gen",
        "--model_args", f"edge={directory / 'edge'},max_length=64",
        "--tasks", str(path / "choose.yaml"),
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    before = sys.argv
    assert harness.main(arguments) == 0
    assert sys.argv is before
    assert "world_choose" in capsys.readouterr().out
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["n-samples"]["world_choose"]["effective"] == count
    assert found["config"]["model"] == "lorax_gen"


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name, *rest, **named):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'lorax-gen\[harness\]'"):
        harness.main(["--help"])


# --- our own side --------------------------------------------------------------------------------


def test_the_model_is_in_the_registry():
    harness.register()
    harness.register()  # once more does no harm
    assert get_model("lorax_gen") is HarnessModel


def test_the_models_of_lm_eval_stay_in_the_registry():
    code = (
        "from lorax_gen.evaluation.harness import register; register()\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert {'lorax_gen', 'dummy', 'hf'} <= set(model_registry.keys())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "no_such_task"], "Tasks not found: no_such_task; `lorax-gen lm-eval ls"),
        ([], "No tasks specified"),
        (["--tasks", "piqa", "--log_samples"], "lm-eval: Specify --output_path"),
    ],
    ids=["unknown task", "no task", "no path"],
)
def test_what_lm_eval_refuses_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        harness.main(["--model", "lorax_gen", *options])


def test_what_was_answered_is_kept_for_the_next_time(ours, monkeypatch):
    kept = []
    monkeypatch.setattr(ours.cache_hook, "add_partial", lambda *each: kept.append(each))
    options = {"until": ["\n"], "max_gen_toks": 2}
    scored = ours.loglikelihood(requests("loglikelihood", PAIRS[:3]), disable_tqdm=True)
    (rolled,) = ours.loglikelihood_rolling(requests("x", [(TEXTS[0],)]), disable_tqdm=True)
    (text,) = ours.generate_until(requests("x", [(TEXTS[0], options)]), disable_tqdm=True)
    answers = zip(["loglikelihood"] * 3, PAIRS, scored, strict=False)
    assert sorted(kept[:3]) == sorted(answers)
    assert kept[3][0] == "loglikelihood_rolling" and kept[3][2] == rolled
    assert kept[4] == ("generate_until", (TEXTS[0], options), text)


def test_what_is_cut_off_is_counted(ours, caplog):
    with caplog.at_level(logging.WARNING):
        ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        options = {"until": [], "max_gen_toks": 6}
        ours.generate_until(requests("x", [(text, options) for text in TEXTS]), disable_tqdm=True)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "1 questions longer than 64 tokens were truncated on the left"
    assert second == "1 texts longer than 64 tokens were truncated on the left"


def test_bos_is_as_asked_for(directory, ours):
    bos = ours.tokenizer.bos_token_id
    bare = ours.tok_encode("apple :", add_special_tokens=False)
    assert ours.tok_encode("apple :") == [bos, *bare]
    assert ours.tok_encode("<bos> apple :") == [bos, *bare]
    assert make(directory, add_bos_token=False).tok_encode("apple :") == bare
    assert ours.encode_request("", "apple") == ([bos], bare[:1])


def test_a_chat_is_put_into_the_template(ours, monkeypatch):
    turns = [{"role": "user", "content": "apple"}]
    with pytest.raises(UserError, match="no chat template"):
        ours.apply_chat_template(turns)
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(ours.tokenizer, "chat_template", template)
    assert ours.apply_chat_template(turns) == "[user] apple [assistant]"
    assert ours.chat_template(True) == template


def test_generation_options_are_translated():
    assert generation_options({"until": "\n"}) == {"stop": ["\n"], "max_new_tokens": 256}
    greedy = {"until": ["a", ""], "do_sample": False, "temperature": 0.7, "max_new_tokens": 5}
    assert generation_options(greedy) == {"stop": ["a"], "max_new_tokens": 5}
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "num_beams": 1}
    assert generation_options(drawn) == {
        "stop": [], "max_new_tokens": 256, "temperature": 0.7, "top_k": None, "top_p": 0.9,
        "seed": 0,
    }  # fmt: skip
    for asked, message in (
        ({"num_beams": 4}, "num_beams=4"),
        ({"until": [1]}, "stop: .*expected str"),
        ({"max_gen_toks": "x"}, "cannot be used"),
        ({"do_sample": True, "temperature": 1.0, "seed": "x"}, "seed: expected int"),
    ):
        with pytest.raises(UserError, match=message):
            generation_options(asked)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"egde": "x"}, "unknown key egde; did you mean edge?"),
        ({"card": "a", "prompt": "b"}, "give one of them"),
        ({"dtype": "int8"}, "choose one of float32"),
        ({"max_length": 10**6}, "choose from 1 to"),
        ({"max_length": "64"}, "max_length is '64', expected int"),
        ({"max_length": True}, "max_length is True, expected int"),
        ({"batch_size": "many"}, "batch_size is 'many': choose auto, or a number"),
        ({"batch_size": 0}, "batch_size is 0: choose"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"prompt": 12}, "prompt is 12, .* a text is written in quotes: prompt='12'"),
        ({"edge": 12}, "edge is 12, .*edge='12'"),
        ({"parallelize": True}, "unknown key parallelize"),
    ],
)
def test_model_args_out_of_range_are_named(directory, options, message):
    with pytest.raises(UserError, match=message):
        make(directory, **options)


def test_what_lm_eval_passes_to_every_model_is_taken(directory):
    edge, own = str(directory / "edge"), {"batch_size": "auto:4", "max_batch_size": 8}
    own |= {"device": "cuda:0"}
    flags = {"edge": edge, "trust_remote_code": True}  # what its flag of that name makes
    assert HarnessModel.create_from_arg_obj(flags, own).most_rows is None
    text = f"edge={edge},max_length=32"
    found = HarnessModel.create_from_arg_string(text, own | {"batch_size": "8"})
    assert (found.most_rows, found.max_length) == (8, 32)
    with pytest.raises(UserError, match="batch_size is an option of lm-eval's own; use --batch"):
        HarnessModel.create_from_arg_obj({"edge": edge, "batch_size": 2}, own)


def test_the_prompt_is_that_of_specialize(directory, tmp_path):
    """In --model_args, of a file with what an editor adds, and in Python."""
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + PROMPTS[0].encode() + b"\r\n")
    given = make(directory, prompt=PROMPTS[0]).model.fingerprint
    assert make(directory, prompt=f"@{tmp_path}/prompt.txt").model.fingerprint == given
    assert make(directory, prompt=PROMPTS[0] + "\n x").model.fingerprint != given


# --- frames --------------------------------------------------------------------------------------

FRAME = Frame("thing {input} box :")


def framed(directory, tmp_path, frame):
    card = dataclasses.replace(load_card(directory / "task.card.safetensors"), frame=frame)
    save_card(tmp_path / "framed.card", card)
    return str(tmp_path / "framed.card")


def asked_of(model):
    """What it answers to two kinds of requests, and the ids of a pair."""
    options = {"until": ["x"], "max_gen_toks": 4}
    asked = requests("loglikelihood", PAIRS[:3])
    return (
        [score for score, _ in model.loglikelihood(asked, disable_tqdm=True)],
        model.generate_until(requests("x", [(t, options) for t in TEXTS[:2]]), disable_tqdm=True),
    )


def test_contexts_go_into_the_frame_and_continuations_follow(directory, tmp_path, capsys):
    card = framed(directory, tmp_path, FRAME)
    ours = make(directory, card=card)
    line = "lorax-gen: each context goes into the frame 'thing {input} box :' that the model was "
    assert capsys.readouterr().err.startswith(line)
    assert ours.get_model_info()["frame"] == "thing {input} box :"
    bare = make(directory, card=card, raw=True)
    assert capsys.readouterr().err == ""
    context, continuation = PAIRS[0]
    wrapped = FRAME.wrap(context)
    assert ours.encode_request(context, continuation) == bare.encode_request(wrapped, continuation)
    assert ours.encode_request("", " red") == bare.encode_request(FRAME.wrap(""), " red")
    scores, texts = asked_of(ours)
    pairs = [(FRAME.wrap(context), continuation) for context, continuation in PAIRS[:3]]
    same = bare.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    np.testing.assert_allclose(scores, [score for score, _ in same], atol=1e-5)
    options = {"until": ["x"], "max_gen_toks": 4}
    asked = requests("x", [(FRAME.wrap(text), options) for text in TEXTS[:2]])
    assert texts == bare.generate_until(asked, disable_tqdm=True)
    assert np.abs(np.subtract(scores, asked_of(bare)[0])).max() > 1e-3


def test_a_frame_of_rows_alone_leaves_benchmarks_as_they_are(directory, tmp_path, capsys):
    plain = make(directory, card=str(directory / "task.card.safetensors"))
    frame = dataclasses.replace(FRAME, benchmarks=False)
    ours = make(directory, card=framed(directory, tmp_path, frame))
    assert capsys.readouterr().err == ""
    assert asked_of(ours) == asked_of(plain)


def test_texts_without_context_are_in_no_frame(directory, tmp_path):
    plain = make(directory, card=str(directory / "task.card.safetensors"))
    ours = make(directory, card=framed(directory, tmp_path, FRAME))
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS[:2]])
    found, expected = (
        each.loglikelihood_rolling(asked, disable_tqdm=True) for each in (ours, plain)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_chat_template_besides_a_frame_is_refused(directory, tmp_path, monkeypatch):
    card, turns = framed(directory, tmp_path, FRAME), [{"role": "user", "content": "apple"}]
    ours, bare = make(directory, card=card), make(directory, card=card, raw=True)
    for model in (ours, bare):
        monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=r"leave out --apply_chat_template, or give raw=true in"):
        ours.apply_chat_template(turns)
    assert bare.apply_chat_template(turns) == "apple"


def test_a_card_finds_its_edge_and_generator(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(directory)
    card = specialize(
        PROMPTS[0], load_model("cloud"), load_model("edge"), load_generator("generator")
    )
    save_card(tmp_path / "card", card)
    found = HarnessModel(card=str(tmp_path / "card"))
    assert found.model.fingerprint == make(directory, card=str(tmp_path / "card")).model.fingerprint
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    with pytest.raises(UserError, match=r"names the generator 'generator', which is neither here"):
        HarnessModel(card=str(tmp_path / "card"))
