"""Table 7 of the paper: how many solved examples a prompt has.

    python experiments/table_7.py

In the world a prompt has a description, and in training up to so many examples after it; unseen
tasks are told by the description alone.
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant(
        f"shots{n}",
        f"up to {n}",
        changes={"data.max_shots": n, "data.prompt_length": 24 + 4 * n},
    )
    for n in (0, 1, 3, 5)
]

if __name__ == "__main__":
    run_experiment("table_7", "Examples in the prompts of training", VARIANTS, paper="7")
