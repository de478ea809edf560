"""Resolves names to directories: local, URLs, shipped such as `world/cloud`, or hub names; and to
GGUF files in them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorax_gen import assets, files
from lorax_gen.errors import UserError

GGUF = ".gguf"
INSIDE = "::"  # between the name of a model and a file in it
GGUF_PART = re.compile(r"(.*-)\d{5}(-of-\d{5}\.gguf)")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Tensors, configs and tokenizers; no other framework's weights and no pickles.
WITHOUT_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
PATTERNS = (*WITHOUT_WEIGHTS, "*.safetensors")


# Absolute paths, also those of Windows and of a home directory, and URLs.
_ABSOLUTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|/|~|[a-zA-Z]:[\\/]")


def without_folders(name: str) -> str:
    """A name; of an absolute path or a URL only the last component."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if _ABSOLUTE.match(name) else name


def public_name(name: str | os.PathLike) -> str:
    """The name of a model as artifacts may hold it: that of the hub, a shipped one or a relative
    path, as the user gave it; of an absolute path or a URL only the last component.

    A relative path that could be a name on the hub begins with `./`.
    """
    text = os.fspath(name)
    if not text or _ABSOLUTE.match(text):
        return without_folders(text)
    path = os.path.normpath(text)
    if not path.strip("./"):  # a directory above the current one
        return Path(path).resolve().name
    is_path = text.startswith("./") or Path(path).exists()
    return f"./{path}" if is_path and HUB_NAME.fullmatch(path) else path


def is_hub_name(name: str) -> bool:
    """Whether a name can only be one on the hub: neither a path nor a shipped model."""
    name = name.partition(INSIDE)[0] if is_gguf(name) else name
    return HUB_NAME.fullmatch(name) is not None and not assets.resolve(name).exists()


def find_directory(
    name: str | files.AnyPath,
    what: str = "model",
    revision: str | None = None,
    patterns: Sequence[str] = PATTERNS,
) -> Path:
    """The local directory of a name; `what` it holds is for messages.

    Tried in this order: a directory, copied from its store if it is in one; a shipped one; the hub,
    downloaded and cached (`$HF_HOME`, `$HF_TOKEN` and `$HF_HUB_OFFLINE` as in huggingface_hub).

    Args:
      patterns: of the files that are needed, where they must be copied or downloaded.

    Raises UserError if there is none, the hub refuses or cannot be reached, or a `revision` is
    given for what is not on the hub.
    """
    if not str(name):
        raise UserError(f"the name of the {what} is empty; give a directory or a hub name")
    found = assets.resolve(name)
    if found.is_dir() and revision is not None:
        raise UserError(f"{name} is a directory; a revision ({revision}) is of a {what} on the hub")
    if found.is_dir():
        return files.local_copy(found, patterns)
    if found.exists():
        raise UserError(f"{name} is a file; expected a {what} directory")
    if str(name).endswith(GGUF):
        raise UserError(f"no such file: {name}; one on the hub is named org/name::file.gguf")
    if not HUB_NAME.fullmatch(str(name)):
        raise UserError(f"no {what} directory at {name}; give one, or a hub name such as org/name")
    try:
        return Path(
            snapshot_download(
                str(name), revision=revision, allow_patterns=list(patterns), max_workers=4
            )
        )
    except RevisionNotFoundError:
        raise UserError(f"{name} on the hub has no revision {revision!r}") from None
    except GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its licence on huggingface.co, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"no {what} {name}: neither a directory nor on the hub, or private (`hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"no {what} directory at {name}, and the hub cannot be reached and has no copy in the "
            "cache; connect, or give a local directory"
        ) from None
    except Exception as error:  # connection errors of the library underneath
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot get {name} from the hub: {reason}") from None


def is_gguf(name: str | files.AnyPath) -> bool:
    """Whether a name is that of a GGUF file, `model.gguf` or `org/name::model.gguf`, and not of a
    directory."""
    return os.fspath(name).endswith(GGUF) and not assets.resolve(name).is_dir()


def find_gguf(name: str | files.AnyPath, revision: str | None = None) -> Path:
    """The local path of a GGUF file, its other parts beside it.

    Args:
      name: a path or URL, or a directory or hub name, `::` and the file's path in it.

    Raises UserError as `find_directory`, and where there is no such file.
    """
    text = os.fspath(name)
    parent, inside, file = text.rpartition(INSIDE)
    if inside and (Path(file).is_absolute() or ".." in Path(file).parts):
        raise UserError(f"{text}: {file} is not below {parent}; expected a file's name")
    if not inside:
        path = files.to_path(name)
        if not path.is_file():
            raise UserError(f"no such file: {text}; one on the hub is named org/name::file.gguf")
        parent, file = os.fspath(path.parent), path.name
    elif not is_hub_name(parent):  # also of a directory inside it
        path = files.to_path(parent) / file
        parent, file = os.fspath(path.parent), path.name
    # Of a model that is split, all parts; brackets and others in a name are only themselves.
    part = GGUF_PART.fullmatch(file)
    pattern = glob.escape(part[1]) + "*" + glob.escape(part[2]) if part else glob.escape(file)
    path = find_directory(parent, revision=revision, patterns=(pattern,)) / file
    if not path.is_file():
        raise UserError(f"{parent} has no file {file}; expected one of its .gguf files")
    return path
