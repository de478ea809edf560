"""Effect of int8 cloud kernels in the embedded world: on gates, experts and accuracy.

    python experiments/world_int8.py

Reads the world's 816 prompts, seen and unseen, with the shipped cloud in float32 and in int8.
Result: gates move by 0.39 % of their mass on average and 18.4 % at most, 97.8 % of the layers keep
their experts; accuracy on seen and unseen tasks is 1.000 and 0.908 with either.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console

import lorax_gen
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import FAMILIES, make_world
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.world import WorldQuiz
from lorax_gen.inference.cards import gates_of_prompts


def main() -> None:
    edge = lorax_gen.load_model("world/edge")
    generator = lorax_gen.load_generator("world/generator")
    quiz, console = WorldQuiz(make_world(0), FAMILIES), Console(highlight=False)
    gates = []
    for in_int8 in (False, True):
        cloud = lorax_gen.load_model("world/cloud", in_int8=in_int8)
        encoder = Encoder.of(cloud)
        prompts = [encoder.ids(prompt) for prompt in quiz.cases.texts]
        gates.append(gates_of_prompts(prompts, cloud, edge, generator))
        accuracy = quiz.accuracy(System(edge, cloud, generator).answerer("lora_gen"))
        seen, unseen = accuracy["accuracy/seen"], accuracy["accuracy/unseen"]
        console.print(f"{'int8' if in_int8 else 'float32'}: seen {seen:.3f}, unseen {unseen:.3f}")
    moved = np.abs(gates[0] - gates[1]).sum(-1) / 2  # of a mass of 1
    same = ((gates[0] > 0) == (gates[1] > 0)).all(-1).mean()
    console.print(f"gates move by {moved.mean():.2%}, {moved.max():.1%} at most")
    console.print(f"{same:.1%} of {moved.size:,} layers keep their experts")


if __name__ == "__main__":
    main()
