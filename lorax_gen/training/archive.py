"""Checkpoints in an object store that orbax cannot write to: any but Google's.

orbax writes them to a local directory, and each is uploaded as one object, `<step>.tar`. An upload
is atomic, so a killed process leaves complete checkpoints only.
"""

from __future__ import annotations

import tarfile
from concurrent.futures import Future, ThreadPoolExecutor

from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath


class Archive:
    """Mirrors a local directory of checkpoints to a store.

    Attributes:
      local: that directory, with one `<step>/` each; it starts with the checkpoints of the store.

    Raises UserError where one of them is damaged.
    """

    def __init__(self, store: AnyPath):
        self.store, self.local = store, files.staging(store)
        for path in self._objects():
            try:
                with tarfile.open(files.local_copy(path), "r:") as tar:
                    tar.extractall(self.local, filter="data")
            except (tarfile.TarError, ValueError, EOFError) as error:
                raise UserError(
                    f"{path} is damaged ({error}); remove it to resume from the one before"
                ) from None
        self.copied = self._steps()
        self.pool = ThreadPoolExecutor(1)
        self.copying: Future[None] = Future()
        self.copying.set_result(None)

    def copy(self) -> None:
        """Starts uploading new checkpoints and then deleting removed ones. The local
        checkpoints must not change until `wait` returns."""
        self.copying = self.pool.submit(self._copy)

    def wait(self) -> None:
        """Blocks until the store has the checkpoints; raises the error of a failed upload."""
        self.copying.result()

    def _copy(self) -> None:
        steps = self._steps()
        for step in sorted(steps - self.copied):
            name = self.store / f"{step}.tar"
            with files.replaced_file(name) as path, tarfile.open(path, "w") as tar:
                tar.add(self.local / step, step)
        for path in self._objects():
            if path.stem not in steps:
                path.unlink()
        self.copied = steps

    def _objects(self) -> list[AnyPath]:
        return [path for path in files.find(self.store, "*.tar") if path.stem.isdigit()]

    def _steps(self) -> set[str]:
        """Of complete checkpoints; others have a name that is not all digits."""
        return {path.name for path in self.local.iterdir() if path.name.isdigit()}
