"""Each mode has the edge read what it should, with the LoRA that it should have."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from lorax_gen import generate_text, specialize
from lorax_gen.data.agent import AgentItem, full_prompt
from lorax_gen.errors import UserError
from lorax_gen.evaluation import agent
from lorax_gen.evaluation.agent import evaluate_agent, prompts_read
from lorax_gen.evaluation.system import System
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
MODES = ("full", "request", "lora_gen", "lora_gen_shuffled")


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
    """`{tokens: its LoRA tree}` of all rows that were asked for."""
    out = {}
    for call in calls:
        for i, row in enumerate(call["rows"]):
            lora = call["lora"]
            out[tuple(row)] = lora and jax.tree.map(lambda leaf, i=i: leaf[:, i], lora)
    return out


def tokens(system, texts):
    return [tuple(system.edge.tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("mode", MODES)
def test_the_edge_reads_what_the_mode_says(system, calls, mode):
    report = evaluate_agent(system, ITEMS, mode)
    text = full_prompt if mode == "full" else lambda item: item.request
    assert set(by_row(calls)) == set(tokens(system, map(text, ITEMS)))
    assert all(call["stop"] == ("Observation:",) for call in calls)
    assert all(call["max_new_tokens"] == 512 for call in calls)
    assert all((call["lora"] is None) == (mode in MODES[:2]) for call in calls)
    whole = sum(map(len, tokens(system, map(full_prompt, ITEMS))))
    seen = sum(map(len, tokens(system, map(text, ITEMS))))
    assert report["compression"] == whole / seen
    assert report["edge_tokens"] == seen / 5
    assert ("reminder" in report["edge_sees"]) == (mode != "full")
    assert (report["mode"], report["items"], report["cut_items"]) == (mode, 5, 0)
    assert report["seconds"] > 0
    perfect = ("thought", "action", "arguments", "success", "iou", "average")
    assert report["scores"] == dict.fromkeys(perfect, 1.0)
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("mode", MODES[2:])
def test_every_request_has_the_lora_of_its_prompt_or_of_another(system, calls, mode):
    cards = specialize(PROMPTS, system.cloud, system.edge, system.generator)
    loras = dict(zip(PROMPTS, [card.lora(system.generator) for card in cards], strict=True))
    evaluate_agent(system, ITEMS, mode, tokens_per_batch=2 * (64 + 512), seed=3)
    assert len(calls) > 2
    prompts, found = prompts_read(ITEMS, mode, 3), by_row(calls)
    for item, prompt, row in zip(
        ITEMS, prompts, tokens(system, [item.request for item in ITEMS]), strict=True
    ):
        assert (prompt == item.prompt) == (mode == "lora_gen")
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found[row], loras[prompt])


def test_shuffled_prompts_are_those_of_others_by_the_seed():
    for seed in range(5):
        prompts = prompts_read(ITEMS, "lora_gen_shuffled", seed)
        assert prompts == prompts_read(ITEMS, "lora_gen_shuffled", seed)
        assert all(a != item.prompt for a, item in zip(prompts, ITEMS, strict=True))
        assert prompts[0] == prompts[3] and prompts[1] == prompts[4]  # of one prompt, one other
    with pytest.raises(UserError, match="nothing to shuffle"):
        prompts_read(ITEMS[:1] * 3, "lora_gen_shuffled", 0)


def test_means_are_over_items(system, calls):
    spoiled = [
        dataclasses.replace(item, output=CALL.format("Another")) if i < 2 else item
        for i, item in enumerate(ITEMS)
    ]
    scores = evaluate_agent(system, spoiled, "request")["scores"]
    expected = {"thought": 1, "action": 0.6, "arguments": 1, "success": 0.6, "iou": 1 - 0.4 / 3}
    expected["average"] = sum(expected.values()) / 5
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["request", "lora_gen_shuffled"])
def test_an_interrupted_run_goes_on_where_it_was(system, calls, mode, tmp_path, monkeypatch):
    options = {"tokens_per_batch": 2 * (32 + 512)}
    whole = evaluate_agent(system, ITEMS, mode, **options)
    asked, path = by_row(calls), tmp_path / "items.jsonl"
    calls.clear()
    write = continuations.generate_text

    def interrupted(*arguments, **named):
        if len(calls) == 1:
            raise KeyboardInterrupt
        return write(*arguments, **named)

    monkeypatch.setattr(continuations, "generate_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_agent(system, ITEMS, mode, path=path, **options)
    path.write_text(path.read_text() + '{"id": "item 3", "wri')  # half-written
    first = by_row(calls)
    assert len(first) == 2

    monkeypatch.setattr(continuations, "generate_text", write)
    calls.clear()
    finished = []
    report = evaluate_agent(system, ITEMS, mode, path=path, progress=finished.append, **options)
    rest = by_row(calls)
    assert not first.keys() & rest.keys() and first.keys() | rest.keys() == asked.keys()
    for row, lora in rest.items():
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), lora, asked[row])
    assert finished == [2, 2, 1]
    assert report | {"seconds": 0} == whole | {"seconds": 0}
    assert len(path.read_text().splitlines()) == 6

    calls.clear()  # and a finished one has nothing to do
    assert evaluate_agent(system, ITEMS, mode, path=path, **options) == report
    assert not calls
    with pytest.raises(UserError, match="stop"):
        evaluate_agent(system, ITEMS, mode, path=path, stop=(), **options)


def test_results_of_other_items_or_in_another_dtype_are_not_taken_for_these(
    system, calls, tmp_path
):
    path = tmp_path / "items.jsonl"
    evaluate_agent(system, ITEMS, "request", path=path)
    changed = [dataclasses.replace(ITEMS[0], output=CALL.format("Another")), *ITEMS[1:]]
    with pytest.raises(UserError, match="is of a run with items"):
        evaluate_agent(system, changed, "request", path=path)
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), system.edge.params)
    rounded = System(dataclasses.replace(system.edge, params=params))
    with pytest.raises(UserError, match="is of a run with edge_dtype"):
        evaluate_agent(rounded, ITEMS, "request", path=path)


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
    report = evaluate_agent(short, ITEMS, "full", max_new_tokens=8)
    texts = tokens(system, map(full_prompt, ITEMS))
    assert sorted(map(tuple, rows)) == sorted(text[-16:] for text in texts)
    assert report["cut_items"] == sum(len(text) > 16 for text in texts) > 2
    assert report["scores"]["average"] == 0
    with pytest.raises(UserError, match="leave no room"):
        evaluate_agent(short, ITEMS, "full", max_new_tokens=24)


@pytest.mark.parametrize("mode", ["full", "lora_gen"])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["alone", "mesh"])
def test_answers_are_those_of_the_model_specialised_to_the_prompt(system, mode, sizes, tmp_path):
    """Nothing stood in for: beside the card merged, one item at a time."""
    edge, path = system.edge, tmp_path / "items.jsonl"
    mesh = sizes and make_mesh(MeshConfig(*sizes), jax.devices("cpu")[:8])
    evaluate_agent(system, ITEMS, mode, path=path, max_new_tokens=4, stop=(), mesh=mesh)
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

    monkeypatch.setattr(agent, "gates_of_prompts", gates)
    report = evaluate_agent(short, ITEMS, "lora_gen")
    prompts = [system.cloud.tokenizer(item.prompt)["input_ids"] for item in ITEMS]
    assert read == [ids[-18:] for ids in prompts]  # two places are the meta tokens'
    assert report["cut_prompts"] == sum(len(ids) > 18 for ids in prompts) > 0
    assert report["prompt_tokens"] == np.mean([min(len(ids), 18) for ids in prompts])


@pytest.mark.parametrize(
    "items, mode, message",
    [
        (ITEMS, "plain", "choose one of full"),
        ([], "full", "no items"),
        (ITEMS + ITEMS[:1], "full", "the same id"),
        (ITEMS, "lora_gen", "needs a cloud model and a generator"),
    ],
)
def test_what_cannot_be_run_is_refused(system, items, mode, message):
    with pytest.raises(UserError, match=message):
        evaluate_agent(System(system.edge), items, mode)
