"""`lorax-gen train CONFIG`: its options are the fields of the config."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Annotated

import tyro

from lorax_gen import files
from lorax_gen.cli import stop
from lorax_gen.cli.parse import UserPath, parse_config


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a generator, a baseline or a language model from a config.

    CONFIG is a YAML file or a shipped config: world (the generator), world-lora, world-loramoe and
    world-mixlora (the baselines), world-cloud and world-edge (the language models). Any field can
    be overridden: lorax-gen train CONFIG --help shows them. An interrupted run resumes with the
    same command, also on another mesh. With several hosts, start the same command on each.
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config."""
    run_dir: UserPath | None = None
    """Run directory; default runs/<name of the config>."""

    def run(self) -> int:
        return run_config(self.config, [], self.run_dir)


RunDir = Annotated[UserPath, tyro.conf.arg(help="Run directory.")]


def run_config(name: str, overrides: list[str], run_dir: files.AnyPath | None = None) -> int:
    """Trains a named config, with options that override its fields."""
    with stop.exit_on_sigterm():
        return _train(name, overrides, run_dir)


def _train(name: str, overrides: list[str], run_dir: files.AnyPath | None) -> int:
    from lorax_gen import config as configs
    from lorax_gen.mesh.hosts import Hosts, initialize, is_first
    from lorax_gen.recipes.registry import RECIPES, load_config
    from lorax_gen.training.loop import Interrupted, fit

    method, config = load_config(name)
    parsed = parse_config(
        config,
        overrides,
        f"lorax-gen train {name}",
        type(config).__doc__,
        run_dir=(RunDir, run_dir or Path("runs") / files.to_path(name).stem),
        hosts=(Hosts, Hosts()),
    )
    initialize(parsed.hosts)
    resolved = {"method": method, **configs.to_dict(parsed.config)}
    try:
        released = fit(RECIPES[method].experiment(parsed.config), parsed.run_dir, resolved)
    except Interrupted as interrupted:
        if is_first():
            print(f"lorax-gen: {interrupted}; the same command resumes the run", file=sys.stderr)
        return 0 if interrupted.signal == signal.SIGTERM else 128 + signal.SIGINT
    if is_first():
        print(f"released: {released}")
    return 0
