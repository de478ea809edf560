"""Rows of a data set on the hub, read by `datasets` from its parquet files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from lorax_gen.data.readers import Row
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class HubData:
    """A data set on the hub."""

    path: str
    """`organisation/name` of the repository."""
    config: str | None
    revision: str
    """A commit, so that the rows never change."""
    splits: Mapping[str, str]
    """Maps `train` and `test` to the hub's names of the splits."""


def load_hub_rows(name: str, data: HubData, split: str) -> Iterator[tuple[str, Row]]:
    """Yields `(location, row)` of a split, downloaded or from the cache of `datasets`.

    Raises UserError where the hub cannot be reached and the cache has nothing; it names the local
    file to use instead.
    """
    import datasets

    try:
        rows = datasets.load_dataset(
            data.path, data.config, split=data.splits[split], revision=data.revision
        )
    except Exception as error:  # of datasets, of huggingface_hub, or of the connection
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot load {data.path} from the hub ({reason}); connect, or put its rows into a "
            f"file {name}.{split}.jsonl or {name}.{split}.parquet and name its "
            "directory (data.directory in a config, --data-dir of evaluate)"
        ) from None
    for number, row in enumerate(rows):
        yield f"{data.path}, row {number} of {data.splits[split]}", row
