"""The command line: a file for each command, with its options and what it prints.

What needs jax is imported when a command runs, so that `--help` is quick.
"""

from lorax_gen.cli.main import main

__all__ = ["main"]
