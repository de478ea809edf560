"""An artifact leads to its generator and models, or one line says what to give."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from lorax_gen import (
    assets,
    load_card,
    load_generator,
    load_model,
    save_adapter,
    save_card,
    specialize,
)
from lorax_gen.artifacts.generator import make_generator as make
from lorax_gen.artifacts.generator import save_generator
from lorax_gen.artifacts.identity import Identities, identify
from lorax_gen.artifacts.lookup import SHIPPED, Found, find_system
from lorax_gen.artifacts.peft import CONFIG
from lorax_gen.errors import UserError
from tests.tiny import PROMPTS, make_generator, write_system


@pytest.fixture
def project(tiny_world_system, tmp_path, monkeypatch):
    """The current directory: `models/cloud`, `models/edge`, the run `runs/a` of a generator that
    was trained with them by relative paths, and `task.card`."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    write_system(Path("models"), tiny_world_system)
    cloud, edge = load_model("models/cloud"), load_model("models/edge")
    base = make_generator(tiny_world_system)
    identities = Identities(cloud=identify(cloud, reads=True), edge=identify(edge, reads=False))
    generator = make(base.config, base.params, base.stats,
                     cloud=cloud.config, edge=edge.config, models=identities)  # fmt: skip
    save_generator("runs/a/released", generator)
    card = specialize(PROMPTS[0], cloud, edge, load_generator("runs/a/released"))
    save_card("task.card", card)
    return Path.cwd()


def there(found):
    return [Path(name).resolve() for name in found]


def parts(project):
    return [project / "runs/a/released", project / "models/cloud", project / "models/edge"]


def test_artifacts_hold_names_as_they_were_given(project):
    names = load_card("task.card").names
    assert names.generator == "runs/a/released"
    assert (names.cloud, names.edge) == ("./models/cloud", "./models/edge")
    models = json.loads(Path("runs/a/released/config.json").read_text())["models"]
    assert {role: model["name"] for role, model in models.items()} == {
        "cloud": "./models/cloud", "edge": "./models/edge",
    }  # fmt: skip
    assert "name" not in json.loads(Path("runs/a/released/config.json").read_text())


def test_where_it_was_made_a_card_or_a_generator_is_enough(project):
    assert there(find_system("task.card")) == parts(project)
    assert there(find_system(generator="runs/a/released")) == parts(project)
    assert there(find_system(generator=project / "runs/a/released")) == parts(project)


def test_elsewhere_the_models_beside_it_are_found(project, tmp_path, monkeypatch):
    shutil.copytree("runs/a/released", "generator")
    monkeypatch.chdir(tmp_path)
    assert there(find_system("project/task.card")) == parts(project)
    found = find_system(generator=project / "generator")
    assert there(found) == [project / "generator", *parts(project)[1:]]


def test_the_run_of_a_generator_says_where_its_models_are(project, tiny_world_system, tmp_path):
    """As they are written there, where the generator has but the last parts of their names."""
    away = tmp_path / "away"
    write_system(away, tiny_world_system)
    models = {name: load_model(away / name) for name in ("cloud", "edge")}
    base = make_generator(tiny_world_system)
    identities = Identities(
        cloud=identify(models["cloud"], reads=True), edge=identify(models["edge"], reads=False)
    )
    generator = make(base.config, base.params, base.stats, models=identities,
                     **{name: model.config for name, model in models.items()})  # fmt: skip
    save_generator("runs/b/released", generator)
    assert b"away" not in Path("runs/b/released/config.json").read_bytes()
    message = "runs/b/released names the cloud 'cloud', which is neither here nor beside it; give"
    with pytest.raises(UserError, match=message):
        find_system(generator="runs/b/released")
    Path("runs/b/config.yaml").write_text(f"cloud: {away}/cloud\nedge: {away}/edge\n")
    wanted = [project / "runs/b/released", away / "cloud", away / "edge"]
    assert there(find_system(generator="runs/b/released")) == wanted
    card = specialize(PROMPTS[0], *models.values(), load_generator("runs/b/released"))
    save_card("b.card", card)
    assert there(find_system("b.card")) == wanted


def test_what_is_given_comes_first(project):
    assert find_system("task.card", "x", "y", "z") == Found("x", "y", "z")
    found = find_system("task.card", edge="mine")
    assert (found.edge, there(found)[:2]) == ("mine", parts(project)[:2])
    assert find_system(generator="runs/a/released", cloud="c", edge="e").edge == "e"


def test_without_an_artifact_they_are_those_of_the_shipped_world(project):
    assert find_system()._asdict() == SHIPPED
    assert find_system(edge="org/name") == Found("world/generator", "world/cloud", "org/name")


@pytest.mark.parametrize("name", ["cloud", "edge"])
def test_the_shipped_generator_has_the_shipped_models_whatever_is_here(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    found = find_system(generator="world/generator")
    assert [assets.resolve(each) for each in found] == [
        assets.resolve(each) for each in SHIPPED.values()
    ]


def test_a_name_on_the_hub_is_left_to_the_hub_unless_a_directory_has_it(project):
    card = load_card("task.card")
    save_card("hub.card", dataclasses.replace(card, names=type(card.names)(edge="org/edge")))
    assert find_system("hub.card", "x", "y").edge == "org/edge"
    Path("org/edge").mkdir(parents=True)
    assert find_system("hub.card", "x", "y").edge == "org/edge"
    shutil.rmtree("models")  # a path is never asked for on the hub
    with pytest.raises(UserError, match=r"task.card names the cloud '\./models/cloud', which is"):
        find_system("task.card")


def test_what_is_not_found_is_named_with_what_to_give(project):
    shutil.rmtree("models/edge")
    shutil.rmtree("runs")
    message = (
        "task.card names the {} {!r}, which is neither here nor beside it; give it as {} (--{})"
    )
    for need, name in (("edge", "./models/edge"), ("generator", "runs/a/released")):
        with pytest.raises(UserError) as error:
            find_system("task.card", need=[need])
        assert str(error.value) == message.format(need, name, need, need)
    assert find_system("task.card", need=["cloud"]).edge is None
    save_card(
        "old.card",
        dataclasses.replace(load_card("task.card"), names=type(load_card("task.card").names)()),
    )
    with pytest.raises(UserError, match=r"old.card does not name the edge that it was made with; "):
        find_system("old.card", need=["edge"])


def test_an_adapter_names_its_edge_and_needs_no_generator(project):
    generator = load_generator("runs/a/released")
    tree = load_card("task.card").lora(generator)
    edge = load_model("models/edge")
    for name, base in (("ours", edge.name), ("hub", "org/edge"), ("none", ""), ("far", "/x/edge")):
        save_adapter(name, tree, edge.config, base_model=base)
    need = ["generator", "edge"]
    assert find_system("ours", need=need) == Found(None, None, "./models/edge")
    assert find_system("hub", need=need).edge == "org/edge"
    with pytest.raises(UserError, match="none does not name the edge that it was made with"):
        find_system("none", need=need)
    with pytest.raises(UserError, match="far names the edge 'edge', which is neither here"):
        find_system("far", need=need)
    (project / "none" / CONFIG).write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        find_system("none", need=need)
