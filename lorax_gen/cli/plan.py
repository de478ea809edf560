"""`lorax-gen plan CONFIG`: the options of `train`, and the devices."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from typing import Annotated

import tyro
from msgspec import Meta

from lorax_gen.cli.parse import UserPath, parse_config


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for."""

    topology: str = "v5e:4x4"
    """TPU slice (v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4) or GPUs (gpu:8, gpu-a100:8, gpu-h200:8)."""
    utilisation: Annotated[float, Meta(gt=0, le=1)] = 0.4
    """Assumed fraction of the devices' peak FLOPs."""
    output: UserPath | None = None
    """Also write the report as JSON to this new file."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Check whether a training run fits devices that are not attached, and how long a step takes.

    For a TPU the real step is compiled for it (pip install 'lorax-gen[plan]'), for GPUs the memory
    is estimated. CONFIG and overrides are those of train; models are presets, such as llama3_8b, or
    directories. Exit code 1 when it does not fit.

    Example: lorax-gen plan paper --topology v5e:4x4 --edge qwen2_1_5b
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config."""
    target: Annotated[Target, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Target)

    def run(self) -> int:
        return run_config(self.config, [], self.target)


def run_config(name: str, overrides: list[str], target: Target = Target()) -> int:
    """Plans the run of a named config, with options that override its fields."""
    import jax

    from lorax_gen import files
    from lorax_gen.planning.plan import make_plan
    from lorax_gen.planning.table import print_plan
    from lorax_gen.recipes.registry import load_config

    jax.config.update("jax_platforms", "cpu")  # leave this machine's accelerators alone
    _, config = load_config(name)
    parsed = parse_config(
        config,
        overrides,
        f"lorax-gen plan {name}",
        Plan.__doc__,
        target=(Annotated[Target, tyro.conf.arg(name="")], target),
    )
    target = parsed.target
    if target.output is not None:
        files.must_be_new(target.output)
    try:
        report = make_plan(parsed.config, target.topology, target.utilisation)
    except KeyboardInterrupt:
        # Nothing is half-written, and to end in order would wait for the compiler, or crash in it.
        print("stopped", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    print_plan(report)
    if target.output is not None:
        with files.new_file(target.output) as path:
            files.write_json(path, report)
    return 0 if report["fits"] else 1
