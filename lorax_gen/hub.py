"""Resolves names to directories: local, URLs, shipped such as `world/cloud`, or hub names."""

from __future__ import annotations

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
    is_path = text.startswith("./") or Path(path).is_dir()
    return f"./{path}" if is_path and HUB_NAME.fullmatch(path) else path


def is_hub_name(name: str) -> bool:
    """Whether a name can only be one on the hub: neither a directory nor a shipped model."""
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
