"""lm-evaluation-harness on our models: any of its tasks, on a model as loaded or specialised.

    lorax-gen lm-eval --model lorax_gen --model_args edge=org/name,dtype=bfloat16 --tasks piqa
    lorax-gen lm-eval --model lorax_gen --model_args edge=org/name,card=task.card.safetensors,...

All arguments are lm-eval's own (`--help` lists them); `harness_model.HarnessModel` documents those
of `--model_args`.
"""

from __future__ import annotations

import sys

from lorax_gen.errors import UserError

NAME = "lorax_gen"
# How lm-eval's errors about its own options begin.
MISTAKES = ("Specify --output_path", "If --samples", "When `fewshot_as_multiturn`", "seed ")


def register() -> None:
    """Registers `lorax_gen` as a model of lm-eval in this process.

    Raises UserError where lm-eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  (it adds its own only while the registry is empty)
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

    Raises UserError for a task that it does not have, and for options that lm-eval refuses.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]  # it reads its arguments from there alone
    try:
        cli_evaluate()
    except ValueError as error:
        if str(error).startswith(("Tasks not found", "No tasks specified", "Need to specify task")):
            raise UserError(f"{error}; `lorax-gen lm-eval ls tasks` lists all tasks") from None
        if str(error).startswith(MISTAKES):
            raise UserError(f"lm-eval: {error}") from None
        raise
    finally:
        sys.argv = before
    return 0
