"""A name is a directory, a shipped model or one of the hub; what is wrong is said in one line."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from lorax_gen import assets, hub, load_model
from lorax_gen.errors import UserError
from lorax_gen.hub import find_directory, find_gguf, is_hub_name, public_name
from lorax_gen.models.huggingface import save_model

NAME = "maker/model-1.1"


def refused(kind, message="403 Client Error.\n\nmore about it"):
    """An error of the hub's, with as much of a response as it looks at."""
    return kind(message, response=SimpleNamespace(headers={}, request=None))


@pytest.fixture
def answer(monkeypatch):
    """`answer(path or error)` is the hub; returns what it will be asked."""

    def set_answer(value):
        asked = []

        def snapshot_download(name, **options):
            asked.append(options | {"name": name})
            if isinstance(value, BaseException):
                raise value
            return str(value)

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        return asked

    return set_answer


@pytest.fixture
def no_hub(answer):
    return answer(AssertionError("the hub was asked"))


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        find_directory(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- without the hub -----------------------------------------------------------------------------


def test_a_local_directory_comes_first(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NAME, "world/cloud"):  # even where the hub or the package has one of that name
        (tmp_path / name).mkdir(parents=True)
        assert find_directory(name).resolve() == tmp_path / name
    assert find_directory(tmp_path / NAME) == find_directory(str(tmp_path / NAME))
    assert not no_hub


def test_then_a_shipped_one(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_directory("world/edge") == assets.ASSETS / "world" / "edge"
    assert not no_hub


@pytest.mark.parametrize("name", ["/no/such/place", "./no/such", "one", "a/b/c", "a b/c", "~/m"])
def test_what_can_be_no_hub_name_is_a_missing_directory(name, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(name, "generator")
    assert message == f"no generator directory at {name}; give one, or a hub name such as org/name"
    assert not no_hub


def test_a_revision_is_of_the_hub(no_hub, tmp_path, monkeypatch):
    """One that is given for a directory would be passed over in silence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    for name in (NAME, "world/edge"):
        message = refusal(name, revision="v2")
        assert message == f"{name} is a directory; a revision (v2) is of a model on the hub"


def test_a_file_is_no_directory(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker").mkdir()
    (tmp_path / NAME).write_text("")
    assert refusal(NAME) == f"{NAME} is a file; expected a model directory"
    assert not no_hub


# --- with it -------------------------------------------------------------------------------------


def test_the_hub_is_asked_last_and_for_the_revision(answer, tmp_path):
    asked = answer(tmp_path)
    assert find_directory(NAME, revision="v2") == tmp_path
    assert find_directory(NAME) == tmp_path
    assert [(a["name"], a["revision"]) for a in asked] == [(NAME, "v2"), (NAME, None)]


def test_tensors_configs_and_tokenizers_are_fetched_and_no_pickles(answer, tmp_path):
    wanted = [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    ]  # fmt: skip
    unwanted = [
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth",
        "model.pt", "training_args.bin", "model.ckpt", "optimizer.pkl", "tf_model.h5",
        "flax_model.msgpack", "model.gguf", "modeling_own.py", "README.md", "onnx/model.onnx",
    ]  # fmt: skip
    asked = answer(tmp_path)
    find_directory(NAME)
    patterns = asked[0]["allow_patterns"]
    assert list(filter_repo_objects(wanted + unwanted, allow_patterns=patterns)) == wanted


@pytest.mark.parametrize(
    "error, message",
    [
        (refused(errors.GatedRepoError), f"{NAME} is gated: accept its licence"),
        (refused(errors.RepositoryNotFoundError), f"no model {NAME}: neither a directory nor on"),
        (refused(errors.RevisionNotFoundError), f"{NAME} on the hub has no revision 'v2'"),
        (
            errors.LocalEntryNotFoundError("a\nb"),
            "the hub cannot be reached and has no copy in the cache",
        ),
        (refused(errors.HfHubHTTPError), f"cannot get {NAME} from the hub: 403 Client Error."),
        (errors.HFValidationError("bad\nname"), f"cannot get {NAME} from the hub: bad"),
        (ConnectionError("no route\nat all"), f"cannot get {NAME} from the hub: no route"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TimeoutError(), f"cannot get {NAME} from the hub: TimeoutError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses_is_said_in_a_line(error, message, answer):
    answer(error)
    assert message in refusal(NAME, revision="v2")


def test_an_interruption_is_no_error_of_the_hubs(answer):
    answer(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        find_directory(NAME)


def test_a_model_of_the_hub_loads_under_its_name(answer, tmp_path, tiny_world_system):
    save_model(tmp_path / "snapshot", tiny_world_system.edge)
    asked = answer(tmp_path / "snapshot")
    model = load_model(NAME, revision="v2")
    assert model.name == NAME
    assert model.fingerprint == tiny_world_system.edge.fingerprint
    assert asked[0]["revision"] == "v2"


# --- names in artifacts --------------------------------------------------------------------------


def test_a_name_in_an_artifact_tells_of_no_machine_user_or_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "edge").mkdir(parents=True)
    names = {
        "": "",
        "org/name": "org/name",
        "world/edge": "world/edge",
        "edge/": "edge",
        "runs/a/released": "runs/a/released",
        "../other/edge": "../other/edge",
        "models/edge": "./models/edge",  # a directory, not a name on the hub
        "./models/gone": "./models/gone",
        "/home/me/edge/": "edge",
        "~/edge": "edge",
        "s3://bucket/edge": "edge",
        r"C:\me\edge": "edge",
        ".": tmp_path.name,
    }
    for given, public in names.items():
        assert public_name(given) == public_name(public) == public, given


def test_a_name_on_the_hub_is_neither_a_directory_nor_a_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "edge").mkdir(parents=True)
    assert is_hub_name("org/name")
    for name in ("models/edge", "./models/gone", "world/edge", "edge", "../a", "/a/b", "a/b/c"):
        assert not is_hub_name(name)


# --- the real one, offline (see conftest.py) -----------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_a_model_is_missing_that_is_not_in_the_cache(cache):
    message = refusal(NAME, "cloud model")
    assert message.startswith(f"no cloud model directory at {NAME}, and the hub cannot be reached")


def test_offline_a_model_is_found_in_the_cache(cache):
    folder = cache / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (folder / "refs" / revision).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
    assert find_directory(NAME) == folder / "snapshots" / ("a" * 40)
    assert find_directory(NAME, revision="v2") == folder / "snapshots" / ("b" * 40)


def test_a_gguf_file_of_the_hub_is_fetched_alone(answer, tmp_path):
    (tmp_path / "Q4").mkdir()
    (tmp_path / "Q4" / "m[1].gguf").touch()
    asked = answer(tmp_path)
    assert find_gguf(f"{NAME}::Q4/m[1].gguf", revision="v2") == tmp_path / "Q4" / "m[1].gguf"
    assert (asked[0]["name"], asked[0]["revision"]) == (NAME, "v2")
    files = ["Q4/m[1].gguf", "Q4/m1.gguf", "Q8/m[1].gguf", "config.json"]
    patterns = asked[0]["allow_patterns"]
    assert list(filter_repo_objects(files, allow_patterns=patterns)) == files[:1]
    with pytest.raises(UserError, match=rf"{NAME} has no file other\.gguf"):
        find_gguf(f"{NAME}::other.gguf")


def test_parts_of_a_gguf_file_are_fetched_together(answer, tmp_path):
    (tmp_path / "m-00002-of-00003.gguf").touch()
    asked = answer(tmp_path)
    find_gguf(f"{NAME}::m-00002-of-00003.gguf")
    parts = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    files = [*parts, "m-00001-of-00002.gguf", "n-00001-of-00003.gguf", "m.gguf"]
    patterns = asked[0]["allow_patterns"]
    assert list(filter_repo_objects(files, allow_patterns=patterns)) == parts


def test_a_gguf_file_is_a_path_first(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker").mkdir()
    (tmp_path / "maker" / "m.gguf").touch()
    assert find_gguf("maker/m.gguf") == find_gguf("maker::m.gguf") == Path("maker/m.gguf")
    assert public_name("maker/m.gguf") == "./maker/m.gguf"
    assert public_name(tmp_path / "maker" / "m.gguf") == "m.gguf"
    assert public_name(f"{NAME}::m.gguf") == f"{NAME}::m.gguf"
    assert is_hub_name(f"{NAME}::m.gguf") and not is_hub_name("maker/m.gguf")
    with pytest.raises(
        UserError, match=r"no such file: m\.gguf; one on the hub is named org/name::"
    ):
        find_gguf("m.gguf")
    with pytest.raises(UserError, match=r"no such file: maker/n\.gguf"):
        find_directory("maker/n.gguf")
