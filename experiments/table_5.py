"""Table 5 of the paper: how many experts the pool has.

    python experiments/table_5.py

In the world with K = 4, so that all of 4 experts are kept.
"""

from common import Variant, run_experiment

VARIANTS = [Variant(f"n{n}", f"n = {n}", changes={"generator.n_experts": n}) for n in (4, 8, 12)]

if __name__ == "__main__":
    run_experiment("table_5", "Experts in the pool", VARIANTS, paper="5")
