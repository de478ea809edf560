"""Rows of a data set on the hub, read by `datasets` from its parquet files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from lorax_gen.data.readers import Row
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class HubData:
    """Where a data set is on the hub."""

    path: str
    """`organisation/name` of the repository."""
    config: str | None
    revision: str
    """A commit: the rows never change."""
    splits: Mapping[str, str]
    """The hub's name of our `train` and `test`."""


def load_hub_rows(name: str, data: HubData, split: str) -> Iterator[tuple[str, Row]]:
    """Yields `(place, row)` of a split, downloaded or from the cache of `datasets`.

    Raises UserError where the hub cannot be reached and the cache has nothing, with the name of
    the local file that would do.
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
            f"file {name}.{split}.jsonl or {name}.{split}.parquet and name its directory"
        ) from None
    for number, row in enumerate(rows):
        yield f"{data.path}, row {number} of {data.splits[split]}", row
