"""`lorax-gen lm-eval`, with the arguments of lm-eval."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Run lm-evaluation-harness (pip install 'lorax-gen[harness]') on our models.

    All arguments are those of lm-eval; the model is lorax_gen, and --model_args takes edge, card,
    prompt, cloud, generator, dtype and others. A model that was specialised in a frame reads
    contexts in it; raw=true: as they are.

    Example: lorax-gen lm-eval --model lorax_gen --model_args edge=org/name --tasks piqa
    """

    def run(self) -> int:
        return run([])


def run(arguments: list[str]) -> int:
    """Passes the arguments to lm-eval's command line."""
    from lorax_gen.evaluation.harness import main

    return main(arguments)
