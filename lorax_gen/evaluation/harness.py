"""lm-evaluation-harness on our models: any of its tasks, on a model as it is or specialised.

    lorax-gen lm-eval --model lorax_gen --model_args edge=org/name,dtype=bfloat16 --tasks piqa
    lorax-gen lm-eval --model lorax_gen --model_args edge=org/name,card=task.card.safetensors,...

All arguments are lm-eval's own (`--help` lists them); `harness_model.HarnessModel` says what
`--model_args` knows.
"""

from __future__ import annotations

import sys

from lorax_gen.errors import UserError

NAME = "lorax_gen"


def register() -> None:
    """Makes `lorax_gen` a model of lm-eval's in this process, beside its own.

    Raises UserError where lm-eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  (it names its own only while the registry is empty)
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError(
            "lm-evaluation-harness is not installed; pip install 'lorax-gen[harness]'"
        ) from None
    if NAME not in model_registry:
        model_registry.register(NAME, target="lorax_gen.evaluation.harness_model:HarnessModel")


def main(arguments: list[str]) -> int:
    """Runs lm-eval's command line with our model in its registry; returns the exit code.

    Raises UserError for a task that it does not have.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]  # it reads no other arguments
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise UserError(f"{error}; `lorax-gen lm-eval ls tasks` lists those there are") from None
    finally:
        sys.argv = before
    return 0
