"""The command line: one file per command, with its options and its output.

Modules that need jax are imported when a command runs, so that `--help` is fast.
"""

from lorax_gen.cli.main import main

__all__ = ["main"]
