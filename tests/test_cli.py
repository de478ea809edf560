"""The command line: what it says, what it writes, and one line for whatever is wrong."""

import copy
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from lorax_gen import cli, load_card, load_model
from lorax_gen.models.huggingface import save_model
from lorax_gen.recipes import registry as methods
from lorax_gen.training.loop import fit
from tests.data import rows
from tests.tiny import (
    PROMPTS,
    linear_experiment,
    make_generator,
    one_word_edge,
    write_generator,
    write_system,
)

PROMPT = PROMPTS[0]
CHAT = "{{ bos_token }} thing {% for turn in messages %}{{ turn['content'] }} {% endfor %}bell :"


@pytest.fixture(scope="module")
def models(tiny_world_system, tmp_path_factory):
    """A folder of `cloud`, `edge` and `generator`, of models that do not go with them, of one that
    goes on for ever (`talker`) and of one that chats (`chatter`)."""
    system = tiny_world_system._replace(edge=one_word_edge(tiny_world_system))
    config = dataclasses.replace(system.cloud.config, max_position_embeddings=40)
    system = system._replace(cloud=dataclasses.replace(system.cloud, config=config))
    ours, other = (make_generator(system, seed, edge_targets=("gate", "up")) for seed in (0, 2))
    folder = write_system(tmp_path_factory.mktemp("models"), system, ours)
    write_generator(folder / "generator2", other, system)
    params = {**system.edge.params, "final_norm": 2 * system.edge.params["final_norm"]}
    save_model(folder / "edge2", dataclasses.replace(system.edge, params=params))
    save_model(folder / "foreign", system.edge)
    config = json.loads((folder / "foreign" / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (folder / "foreign" / "config.json").write_text(json.dumps(config))
    save_model(folder / "talker", dataclasses.replace(tiny_world_system.edge, stop_ids=(1,)))
    tokenizer = copy.deepcopy(system.edge.tokenizer)
    tokenizer.chat_template = CHAT
    save_model(folder / "chatter", dataclasses.replace(system.edge, tokenizer=tokenizer))
    return folder


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """`call(*words) -> (exit code, stdout, stderr)`, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(call):
    """`refused(*words) -> message` of a command that ends with exit code 2 and one line."""

    def refused(*words):
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert err.startswith("lorax-gen: error: ") and err.count("\n") == 1 and err[-1] == "\n"
        return err.removeprefix("lorax-gen: error: ")

    return refused


@pytest.fixture
def specialize(models):
    """The words of a command that specialises the tiny edge."""

    def words(prompt=PROMPT, *more, **other):
        names = {"cloud": "cloud", "edge": "edge", "generator": "generator"} | other
        options = [word for role, name in names.items() for word in (f"--{role}", models / name)]
        return ["specialize", prompt, *options, *more]

    return words


@pytest.fixture
def card(call, specialize, tmp_path):
    assert call(*specialize())[0] == 0
    return tmp_path / "task.card.safetensors"


@pytest.fixture
def linear(monkeypatch):
    """The method `lora` trains four weights, at once, whatever its config says of models."""

    def experiment(config):
        made = linear_experiment(config.run)
        return dataclasses.replace(made, optimizer=config.optimizer)

    method = methods.RECIPES["lora"]._replace(experiment=experiment)
    monkeypatch.setitem(methods.RECIPES, "lora", method)


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, mentioned",
    [
        ([], ["demo", "train", "specialize", "generate", "export", "verify", "evaluate"]),
        (["demo"], ["--run-dir", "--questions", "--seed"]),
        (["train"], ["CONFIG", "--run-dir", "world-lora"]),
        (["train", "world"], ["--run-dir", "--generator.top-k", "--run.steps", "--mesh.fsdp"]),
        (["train", "world-edge"], ["--hidden-size", "--optimizer.learning-rate"]),
        (["specialize"], ["PROMPT", "--output", "--merged", "--cloud", "--edge", "--generator"]),
        (["generate"], ["QUESTION", "--card", "--context", "--model", "--max-new-tokens"]),
        (["generate"], ["--chat", "--temperature", "--top-k", "--top-p", "--seed", "--stop"]),
        (["export"], ["ARTIFACT", "--format", "peft", "gguf-lora", "--output", "--dtype"]),
        (["verify"], ["ARTIFACT", "--edge", "--generator", "--dtype"]),
        (["evaluate"], ["--lora", "--split", "--questions", "--seed", "--run-dir"]),
        (["evaluate"], ["TASK", "--modes", "--data-dir", "--limit", "--shots", "--card"]),
    ],
    ids=" ".join,
)
def test_help_names_the_options(call, words, mentioned):
    code, out, err = call(*words, "--help")
    assert (code, err) == (0, "")
    for word in mentioned:
        assert word in out


@pytest.mark.parametrize("words", [["specialise", "x"], ["train"], ["demo", "--seed", "x"], []])
def test_a_wrong_command_ends_with_code_2(call, words):
    code, out, err = call(*words)
    assert code == 2 and not out and err


# --- specialize, then generate -------------------------------------------------------------------


def test_a_specialised_edge_answers_through_its_card(call, specialize, models, tmp_path):
    code, out, err = call(*specialize(PROMPT, "--merged", tmp_path / "merged"))
    assert (code, err) == (0, "")
    path = tmp_path / "task.card.safetensors"
    assert out == f"card: task.card.safetensors\nmerged edge model: {tmp_path}/merged\n"
    options = ["--card", path, "--generator", models / "generator", "--max-new-tokens", 3]
    code, by_card, err = call("generate", "apple :", "bell :", "--model", models / "edge", *options)
    assert (code, err) == (0, "")
    lines = by_card.splitlines()
    assert [line[: line.index(":")] for line in lines] == ["apple ", "bell "]
    assert all(len(line.split()) == 3 for line in lines)  # one word, then the text ended
    _, merged, _ = call("generate", "apple :", "bell :", "--model", tmp_path / "merged")
    assert merged == by_card
    _, plain, _ = call("generate", "apple :", "bell :", "--model", models / "edge")
    assert plain != by_card
    assert load_card(path).edge == load_model(models / "edge").fingerprint
    for file in (tmp_path / "merged").iterdir():
        assert str(models).encode() not in file.read_bytes()


def test_a_context_stands_before_every_question(call, models):
    _, out, _ = call("generate", "apple :", "--model", models / "edge", "--context", "red box")
    _, same, _ = call("generate", "red box apple :", "--model", models / "edge")
    assert out.split(":")[1] == same.split(":")[1]


def test_a_prompt_comes_from_a_file_or_from_standard_input(call, specialize, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    for i, prompt in enumerate((PROMPT, "@prompt.txt", "-")):
        assert call(*specialize(prompt, "--output", f"{i}"))[0] == 0
    cards = [(tmp_path / f"{i}").read_bytes() for i in range(3)]
    assert cards[0] == cards[1] == cards[2]


# --- generate ------------------------------------------------------------------------------------


@pytest.fixture
def generate(call, models):
    """`generate(*words)`: what is printed for them."""

    def generate(*words, model="edge"):
        code, out, err = call("generate", *words, "--model", models / model)
        assert (code, err) == (0, "")
        return out

    return generate


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


# --- export and verify ---------------------------------------------------------------------------


@pytest.fixture
def to(models):
    """The words of a command about an artifact of the tiny edge."""

    def words(command, artifact, *more, **other):
        names = {"edge": "edge", "generator": "generator"} | other
        options = [word for role, name in names.items() for word in (f"--{role}", models / name)]
        return [command, artifact, *options, *more]

    return words


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


def test_verify_prints_a_line_for_each_form(call, card, to):
    code, out, err = call(*to("verify", card))
    assert (code, err) == (0, "")
    forms = ["edge without it", "gates, one row each", "merged", "merged, written and read"]
    for form in (*forms, "adapter, written and read"):
        [line] = [line for line in out.splitlines() if line.strip().startswith(f"{form}  ")]
        assert line.split()[-1] == ("%" if form == "edge without it" else "ok")
    assert "differs" not in out


def test_verify_takes_what_export_wrote(call, card, to):
    for format in ("merged", "peft"):
        words = to("export", card, "--format", format, "--output", format)
        assert call(*words)[0] == 0
        code, out, err = call(*to("verify", format))
        assert (code, err) == (0, "") and "differs" not in out


def test_verify_ends_with_code_1_where_a_form_differs(call, card, specialize, to, tmp_path):
    words = to("export", card, "--format", "merged", "--output", "merged", "--dtype", "bfloat16")
    assert call(*words)[0] == 0
    assert call(*to("verify", "merged"))[0] == 0
    (tmp_path / "merged" / card.name).unlink()
    assert call(*specialize(PROMPTS[2], "--output", tmp_path / "merged" / card.name))[0] == 0
    code, out, err = call(*to("verify", "merged"))
    assert (code, err) == (1, "")
    [line] = [line for line in out.splitlines() if "differs" in line.split()]
    assert "the directory" in line


# --- what is wrong, in one line ------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt is empty"),
        ("thing " * 60, "a prompt of 61 tokens is longer than the limit of 38"),
        ("@nowhere.txt", "cannot read the prompt file nowhere.txt"),
        ("@.", "cannot read the prompt file"),
    ],
    ids=["empty", "long", "missing file", "directory"],
)
def test_a_prompt_that_cannot_be_read_is_refused(refused, specialize, tmp_path, prompt, message):
    assert message in refused(*specialize(prompt))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other, message",
    [
        ({"edge": "nowhere"}, "no model directory at"),
        ({"cloud": "generator"}, "generator/config.json is of architecture none"),
        ({"edge": "foreign"}, "architecture MambaForCausalLM; supported are LlamaForCausalLM"),
        ({"cloud": "edge"}, "pass the cloud model that it was trained with"),
        ({"generator": "edge"}, "edge is not a generator"),
        ({"generator": "nowhere"}, "no generator directory at"),
    ],
)
def test_models_that_do_not_go_together_are_refused(refused, specialize, tmp_path, other, message):
    assert message in refused(*specialize(**other))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--output", "--merged"])
def test_an_existing_output_is_refused_before_anything_is_written(
    refused, specialize, tmp_path, option
):
    (tmp_path / "mine").mkdir()
    assert "mine already exists" in refused(*specialize(PROMPT, option, "mine"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_card_that_does_not_fit_is_refused(refused, card, models):
    def generate(edge="edge", generator="generator"):
        options = ["--model", models / edge, "--generator", models / generator, "--card", card]
        return refused("generate", "apple :", *options)

    assert "this card was made with the pool" in generate(generator="generator2")
    assert "this card was made for the edge model" in generate(edge="edge2")
    card.write_bytes(card.read_bytes()[:-1])
    assert "task.card.safetensors is not a whole safetensors file" in generate()
    card.unlink()
    assert "no such file: " in generate()


def test_generate_without_a_question_is_refused(refused, models):
    assert "no question given" in refused("generate", "--model", models / "edge")


@pytest.mark.parametrize("questions", [["apple :"], ["apple :", "bell :"]], ids=["one", "two"])
@pytest.mark.parametrize(
    "options, message",
    [
        (["--chat"], "no chat template; leave out --chat"),
        (["--temperature", "-1"], "temperature=-1.0: choose 0 (greedy) or more"),
        (["--top-k", "0"], "top_k=0: choose at least 1"),
        (["--top-p", "1.5"], "top_p=1.5: choose a share above 0, up to 1"),
        (["--max-new-tokens", "0"], "max_new_tokens=0: choose at least 1"),
        (["--max-new-tokens", "9999"], "more than the 2048 positions of the model"),
        (["--stop", ""], "a stop string is empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_of_generate_is_refused(refused, models, questions, options, message):
    assert message in refused("generate", *questions, "--model", models / "edge", *options)


def test_an_adapter_of_another_model_is_refused(call, refused, card, to, models):
    assert call(*to("export", card, "--format", "peft", "--output", "adapter"))[0] == 0
    words = ["generate", "apple :", "--card", "adapter", "--model", models / "cloud"]
    assert "is the adapter for another model?" in refused(*words)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"edge": "edge2"}, "this card was made for the edge model"),
        ({"generator": "generator2"}, "this card was made with the pool"),
        ({"edge": "nowhere"}, "no model directory at"),
        ({"generator": "nowhere"}, "no generator directory at"),
    ],
)
def test_what_an_artifact_was_not_made_for_is_refused(refused, card, to, tmp_path, other, message):
    assert message in refused(*to("verify", card, **other))
    for format in ("merged", "peft"):
        words = to("export", card, "--format", format, "--output", "mine", **other)
        assert message in refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == [card.name]


def test_export_refuses_an_existing_output(refused, card, to, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for format in ("merged", "peft"):
        words = to("export", card, "--format", format, "--output", "mine")
        assert "mine already exists" in refused(*words)
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_is_no_artifact_is_refused(refused, to, models):
    assert "holds no task.card.safetensors to compare it with" in refused(
        *to("verify", models / "edge")
    )
    assert "no such file: nowhere" in refused(*to("verify", "nowhere"))
    words = to("export", "nowhere", "--format", "peft", "--output", "adapter")
    assert "no such file: nowhere" in refused(*words)


def test_evaluate_refuses_a_directory_that_holds_something_else(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("mine")
    for task in ("world", "arc_easy"):
        message = refused("evaluate", task, "--run-dir", "mine")
        assert "mine exists and is no evaluation to go on with" in message
    assert (tmp_path / "mine" / "report.json").read_text() == "mine"


@pytest.mark.parametrize(
    "words, message",
    [
        (["arc_esy"], "unknown benchmark 'arc_esy'; did you mean arc_easy"),
        (["world", "arc_easy"], "world is evaluated by itself"),
        (["gpt4tools", "arc_easy"], "gpt4tools is evaluated by itself"),
        (["gpt4tools"], "give --data-dir"),
        (["boolq", "--modes", "card"], "mode card needs --card"),
        (["boolq", "--modes", "plane", "--data-dir", "."], "unknown mode 'plane'"),
        (["boolq", "--modes", "plain", "--data-dir", "."], "no file boolq.test.jsonl"),
        (["boolq", "--modes", "plain", "--data-dir", "nowhere"], "no such data directory"),
        (["boolq", "--modes", "plain"], "cannot load aps/super_glue from the hub"),
        (["world", "--questions", "0"], "questions=0: choose 1 or more"),
        (["boolq", "--seed", "-1"], "seed=-1: choose 0 or more"),
        (["boolq", "--limit", "-1"], "limit=-1: choose 1 or more"),
        (["boolq", "--tokens-per-batch", "0"], "tokens_per_batch=0: choose 1 or more"),
        (["boolq", "--fsdp", "3"], "cannot be laid over"),
        (["boolq", "--tensor", "0"], "cannot be laid over"),
    ],
    ids=" ".join,
)
def test_an_evaluation_that_cannot_be_is_refused(refused, words, message):
    assert message in refused("evaluate", *words)


def test_evaluate_prints_benchmarks_by_modes_and_goes_on_where_it_stopped(call, models, tmp_path):
    for split, first in (("test", 0), ("train", 9)):
        for name in ("arc_easy", "winogrande"):
            rows.write_lines(
                tmp_path / f"{name}.{split}.jsonl", rows.make_rows(name, 4 + first // 3, first)
            )
    words = ["evaluate", "arc_easy", "winogrande", "--data-dir", ".", "--run-dir", "run"]
    words += ["--shots", 1, "--modes", "plain", "icl", "lora_gen", "--limit", 3]
    words += [f"--{role}={models / role}" for role in ("cloud", "edge", "generator")]
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    for word in ("ARC-e", "WinoG", "AVE", "HAR", "edge, 1-shot", "edge + LoRA-Gen", "cpu"):
        assert word in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    item = tmp_path / "run" / "items" / "arc_easy.lora_gen.jsonl"
    lines = item.read_text().splitlines()
    assert len(lines) == 1 + 3
    for mode in ("plain", "icl", "lora_gen"):
        found = report["modes"][mode]
        shares = [found["benchmarks"][name]["acc"] for name in ("arc_easy", "winogrande")]
        assert found["average"] == pytest.approx(sum(shares) / 2)
    means = (tmp_path / "run" / "report.csv").read_text().splitlines()
    assert sum(line.startswith("AVE,") for line in means) == 3

    item.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # as if killed while writing
    code, _, err = call(*words)
    assert (code, err) == (0, "")
    assert sorted(item.read_text().splitlines()[1:]) == sorted(lines[1:])
    assert str(tmp_path) not in (tmp_path / "run" / "report.json").read_text()


def test_the_demo_refuses_a_directory_that_holds_something_else(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no demo" in refused("demo", "--run-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --- train ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("method: lora\nranks: 4", "unknown key ranks; did you mean rank?"),
        ("method: lora\nrank: four", 'wrong value type for field "rank"'),
        ("method: loras", "method is 'loras'; expected one of"),
        ("method: [", "mine.yaml is not valid YAML"),
        ("method: lora\nedge: nowhere", "no model directory at nowhere"),
    ],
)
def test_a_wrong_config_is_refused(refused, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refused("train", "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_an_unknown_config_is_refused(refused):
    assert refused("train", "wrold") == "no config file wrold; did you mean world?\n"


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--optimizer.learning-rate", "-1", "both must be positive"),
        ("--data.families", "sorts", "unknown family 'sorts'"),
        ("--ranks", "4", "--ranks"),
    ],
)
def test_a_wrong_override_is_refused(call, option, value, message):
    code, out, err = call("train", "world-lora", option, value)
    assert code == 2 and not out
    assert message in " ".join(err.replace("│", " ").split())  # without the frame


def test_overrides_end_in_the_run_directory(call, linear, tmp_path):
    options = ["--run.steps", 2, "--optimizer.learning-rate", "2e-2", "--targets", "gate", "up"]
    code, out, err = call("train", "world-lora", *options, "--run-dir", "here")
    assert (code, out, err) == (0, "released: here/released\n", "")
    written = yaml.safe_load((tmp_path / "here" / "config.yaml").read_text())
    assert written["method"] == "lora"
    assert written["run"]["steps"] == 2
    assert written["optimizer"]["learning_rate"] == 0.02
    assert written["optimizer"]["warmup_steps"] == 100  # the config's
    assert written["targets"] == ["gate", "up"]
    assert written["rank"] == 8  # the default


def test_a_written_config_is_one_to_train_from(call, linear, tmp_path):
    assert call("train", "world-lora", "--run.steps", 2, "--run-dir", "one")[0] == 0
    assert call("train", "one/config.yaml", "--run-dir", "two")[0] == 0
    one, two = (tmp_path / name / "config.yaml" for name in ("one", "two"))
    assert one.read_text() == two.read_text()


def test_a_run_lives_under_its_configs_name_or_where_it_is_told(call, linear, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: lora\nrun: {steps: 1}\n")
    assert call("train", "mine.yaml")[1] == "released: runs/mine/released\n"
    assert call("train", "--run-dir", "there", "mine.yaml")[1] == "released: there/released\n"


def test_the_directory_of_another_run_is_refused(call, refused, linear):
    words = ["train", "world-lora", "--run-dir", "here", "--run.steps"]
    assert call(*words, 1)[0] == 0
    assert "here already holds another run" in refused(*words, 2)
    assert call(*words, 1)[:2] == (0, "released: here/released\n")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stopped_run_says_how_to_go_on(call, linear, monkeypatch, number, code):
    words = ["train", "world-lora", "--run.steps", 3, "--run-dir", "here"]

    def stop_first(experiment, *rest):
        def batch(step):
            if step == 1:
                os.kill(os.getpid(), number)
            return experiment.batch(step)

        return fit(dataclasses.replace(experiment, batch=batch), *rest)

    with monkeypatch.context() as patch:
        patch.setattr("lorax_gen.training.loop.fit", stop_first)
        stopped = call(*words)
    line = "lorax-gen: stopped at step 2 of 3, state saved; the same command resumes the run\n"
    assert stopped == (code, "", line)
    assert call(*words) == (0, "released: here/released\n", "")


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lorax_gen", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
