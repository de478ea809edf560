"""`lorax-gen lm-eval`: the arguments are lm-eval's own."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Run lm-evaluation-harness (pip install 'lorax-gen[harness]') on our models.

    All arguments are its own; the model is called lorax_gen, and --model_args knows edge, card,
    prompt, cloud, generator, dtype and others.

    Example: lorax-gen lm-eval --model lorax_gen --model_args edge=org/name --tasks piqa
    """

    def run(self) -> int:
        return run([])


def run(arguments: list[str]) -> int:
    """Hands the arguments to lm-eval's own command line."""
    from lorax_gen.evaluation.harness import main

    return main(arguments)
