"""The command line: one file per command, with its options and its output.

Modules that need jax are imported when a command runs, so that `--help` is fast.
"""

from lorax_gen.cli import stop

stop.watch_from_the_start()  # the imports below take a moment

from lorax_gen.cli.main import main  # noqa: E402

__all__ = ["main"]
