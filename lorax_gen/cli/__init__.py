"""The command line: a file for each command, with its options and what it prints."""

from lorax_gen.cli.main import main

__all__ = ["main"]
