"""Each answerer reads what it should, with the LoRA that it should have."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lorax_gen import generate_text, specialize
from lorax_gen.data.agent import AgentItem, full_prompt
from lorax_gen.errors import UserError
from lorax_gen.evaluation import answerers
from lorax_gen.evaluation.agent import AgentCases, evaluate_agent
from lorax_gen.evaluation.answerers import System
from lorax_gen.inference import continuations
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from tests.tiny import PROMPTS, make_generator

CALL = "Thought: Do I need to use a tool? Yes\nAction: {}\nAction Input: image/a.png\nObservation:"
ITEMS = [
    AgentItem(f"item {i}", PROMPTS[i % 3], request, CALL.format(f"Tool {i}"))
    for i, request in enumerate(
        [
            "the king has a red lamp . apple :",
            "bell :",
            "the miller has a stone . king :",
            "five :",
            "one :",
        ]
    )
]
MODES = ("icl", "plain", "lora_gen", "shuffled")


@pytest.fixture(scope="module")
def system(tiny_world_system):
    return System(
        tiny_world_system.edge, tiny_world_system.cloud, make_generator(tiny_world_system)
    )


@pytest.fixture(scope="module")
def right(system):
    """Right answers by the tokens that ask for them, behind the prompt or alone."""
    ids = system.edge.tokenizer
    return {
        tuple(ids(text)["input_ids"]): item.output
        for item in ITEMS
        for text in (item.request, full_prompt(item))
    }


@pytest.fixture
def calls(monkeypatch, right):
    """Answers are looked up instead of computed; what was asked for, batch by batch."""
    log = []

    def write(model, rows, **options):
        log.append({"rows": rows, **options})
        return [right[tuple(row)].removesuffix("Observation:") for row in rows]

    monkeypatch.setattr(continuations, "generate_text", write)
    return log


def by_row(calls):
    """`{tokens: its gates [L, N]}` of all rows that were asked for."""
    out = {}
    for call in calls:
        for i, row in enumerate(call["rows"]):
            adapter = call["adapter"]
            out[tuple(row)] = adapter and adapter.rows["gates"][:, i]
    return out


def tokens(system, texts):
    return [tuple(system.edge.tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("mode", MODES)
def test_the_edge_reads_what_the_mode_says(system, calls, mode):
    report = evaluate_agent(system.answerer(mode), ITEMS)
    text = full_prompt if mode == "icl" else lambda item: item.request
    assert set(by_row(calls)) == set(tokens(system, map(text, ITEMS)))
    assert all(call["stop"] == ("Observation:",) for call in calls)
    assert all(call["max_new_tokens"] == 512 for call in calls)
    assert all((call["adapter"] is None) == (mode in MODES[:2]) for call in calls)
    whole = sum(map(len, tokens(system, map(full_prompt, ITEMS))))
    seen = sum(map(len, tokens(system, map(text, ITEMS))))
    assert report["compression"] == whole / seen
    assert report["context_tokens"] == seen / 5
    assert ("reminder" in report["edge_sees"]) == (mode != "icl")
    assert report["cut_items"] == 0
    assert report["seconds"] > 0
    perfect = ("thought", "action", "arguments", "success", "iou")
    assert report["cells"] == {name: {"score": 1.0, "stderr": 0.0, "n": 5} for name in perfect}
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("mode", MODES[2:])
def test_every_request_has_the_lora_of_its_prompt_or_of_another(system, calls, mode):
    cards = specialize(PROMPTS, system.cloud, system.edge, system.generator)
    experts = system.generator.config.n_experts
    gates = dict(zip(PROMPTS, [card.dense_gates(experts) for card in cards], strict=True))
    evaluate_agent(system.answerer(mode), ITEMS, tokens_per_batch=2 * (64 + 512), seed=3)
    assert len(calls) > 2
    cases, found = AgentCases(ITEMS, 3), by_row(calls)
    prompts = cases.prompts() if mode == "lora_gen" else cases.other_prompts()
    for call in calls:
        np.testing.assert_array_equal(
            call["adapter"].shared["up"]["a"], system.generator.params["pool"]["up"]["a"]
        )
    for item, prompt, row in zip(
        ITEMS, prompts, tokens(system, [item.request for item in ITEMS]), strict=True
    ):
        assert (prompt == item.prompt) == (mode == "lora_gen")
        np.testing.assert_allclose(found[row], gates[prompt], atol=1e-5)


def test_shuffled_prompts_are_those_of_others_by_the_seed():
    for seed in range(5):
        prompts = AgentCases(ITEMS, seed).other_prompts()
        assert prompts == AgentCases(ITEMS, seed).other_prompts()
        assert all(a != item.prompt for a, item in zip(prompts, ITEMS, strict=True))
        assert prompts[0] == prompts[3] and prompts[1] == prompts[4]  # of one prompt, one other
    with pytest.raises(UserError, match="nothing to shuffle"):
        AgentCases(ITEMS[:1] * 3).other_prompts()


def test_means_are_over_items(system, calls):
    spoiled = [
        dataclasses.replace(item, output=CALL.format("Another")) if i < 2 else item
        for i, item in enumerate(ITEMS)
    ]
    cells = evaluate_agent(system.answerer("plain"), spoiled)["cells"]
    expected = {"thought": 1, "action": 0.6, "arguments": 1, "success": 0.6, "iou": 1 - 0.4 / 3}
    assert {name: found["score"] for name, found in cells.items()} == pytest.approx(expected)
    assert cells["action"]["stderr"] == pytest.approx(np.std([1, 1, 1, 0, 0], ddof=1) / 5**0.5)


@pytest.mark.parametrize("mode", ["plain", "shuffled"])
def test_an_interrupted_run_goes_on_where_it_was(system, calls, mode, tmp_path, monkeypatch):
    options = {"tokens_per_batch": 2 * (32 + 512)}
    answerer = system.answerer(mode)
    whole = evaluate_agent(answerer, ITEMS, **options)
    asked, path = by_row(calls), tmp_path / "items.jsonl"
    calls.clear()
    write = continuations.generate_text

    def interrupted(*arguments, **named):
        if len(calls) == 1:
            raise KeyboardInterrupt
        return write(*arguments, **named)

    monkeypatch.setattr(continuations, "generate_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_agent(answerer, ITEMS, path=path, **options)
    path.write_text(path.read_text() + '{"id": "item 3", "wri')  # half-written
    first = by_row(calls)
    assert len(first) == 2

    monkeypatch.setattr(continuations, "generate_text", write)
    calls.clear()
    finished = []
    report = evaluate_agent(answerer, ITEMS, path=path, progress=finished.append, **options)
    rest = by_row(calls)
    assert not first.keys() & rest.keys() and first.keys() | rest.keys() == asked.keys()
    for row, lora in rest.items():
        assert (lora is None) == (asked[row] is None)
        if lora is not None:
            np.testing.assert_allclose(lora, asked[row], atol=1e-5)
    assert finished == [2, 2, 1]
    assert report | {"seconds": 0} == whole | {"seconds": 0}
    assert len(path.read_text().splitlines()) == 6

    calls.clear()  # and a finished one has nothing to do
    assert evaluate_agent(answerer, ITEMS, path=path, **options) == report
    assert not calls
    with pytest.raises(UserError, match="stop"):
        evaluate_agent(answerer, ITEMS, path=path, stop=(), **options)


def test_results_of_other_items_or_in_another_dtype_are_not_taken_for_these(
    system, calls, tmp_path
):
    path = tmp_path / "items.jsonl"
    evaluate_agent(system.answerer("plain"), ITEMS, path=path)
    changed = [dataclasses.replace(ITEMS[0], output=CALL.format("Another")), *ITEMS[1:]]
    with pytest.raises(UserError, match="is of a run with items"):
        evaluate_agent(system.answerer("plain"), changed, path=path)
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), system.edge.params)
    rounded = System(dataclasses.replace(system.edge, params=params))
    with pytest.raises(UserError, match=r"is of a run with (model|dtype)"):
        evaluate_agent(rounded.answerer("plain"), ITEMS, path=path)


@pytest.mark.parametrize("by", ["positions", "max_length"])
def test_what_the_model_has_no_room_for_loses_its_beginning(system, monkeypatch, by):
    short = System(system.edge, max_length=24)
    if by == "positions":
        config = dataclasses.replace(system.edge.config, max_position_embeddings=24)
        short = System(dataclasses.replace(system.edge, config=config))
    rows = []

    def write(model, asked, **options):
        rows.extend(asked)
        return [""] * len(asked)

    monkeypatch.setattr(continuations, "generate_text", write)
    report = evaluate_agent(short.answerer("icl"), ITEMS, max_new_tokens=8)
    texts = tokens(system, map(full_prompt, ITEMS))
    assert sorted(map(tuple, rows)) == sorted(text[-16:] for text in texts)
    assert report["cut_items"] == sum(len(text) > 16 for text in texts) > 2
    assert all(found["score"] == 0 for found in report["cells"].values())
    with pytest.raises(UserError, match="leave no room"):
        evaluate_agent(short.answerer("icl"), ITEMS, max_new_tokens=24)


@pytest.mark.parametrize("mode", ["icl", "lora_gen"])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["alone", "mesh"])
def test_answers_are_those_of_the_model_specialised_to_the_prompt(system, mode, sizes, tmp_path):
    """Nothing stood in for: beside the card merged, one item at a time."""
    edge, path = system.edge, tmp_path / "items.jsonl"
    mesh = sizes and make_mesh(MeshConfig(*sizes), jax.devices("cpu")[:8])
    answerer = system.answerer(mode)
    evaluate_agent(answerer, ITEMS, path=path, max_new_tokens=4, stop=(), mesh=mesh)
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    written = {row["id"]: row["written"] for row in rows}
    assert len(set(written.values())) > 2
    for item in ITEMS:
        model, text = edge, full_prompt(item)
        if mode == "lora_gen":
            card = specialize(item.prompt, system.cloud, edge, system.generator)
            model, text = card.merge(edge, system.generator), item.request
        assert [written[item.id]] == generate_text(model, [text], max_new_tokens=4)


def test_a_prompt_too_long_for_the_cloud_loses_its_beginning(system, calls, monkeypatch):
    config = dataclasses.replace(system.cloud.config, max_position_embeddings=20)
    cloud = dataclasses.replace(system.cloud, config=config)
    short, read = dataclasses.replace(system, cloud=cloud), []

    def gates(rows, *rest, **options):
        read.extend(rows)
        return gates_of_prompts(rows, *rest, **options)

    monkeypatch.setattr(answerers, "gates_of_prompts", gates)
    report = evaluate_agent(short.answerer("lora_gen"), ITEMS)
    prompts = [system.cloud.tokenizer(item.prompt)["input_ids"] for item in ITEMS]
    assert read == [ids[-18:] for ids in prompts]  # two places are the meta tokens'
    assert report["cut_prompts"] == sum(len(ids) > 18 for ids in prompts) > 0
    assert report["prompt_tokens"] == np.mean([min(len(ids), 18) for ids in prompts])


@pytest.mark.parametrize("items, message", [([], "no items"), (ITEMS + ITEMS[:1], "the same id")])
def test_what_cannot_be_run_is_refused(system, items, message):
    with pytest.raises(UserError, match=message):
        evaluate_agent(system.answerer("icl"), items)
