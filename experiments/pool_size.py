"""n: how many experts the pool has, beyond the three of Table 5.

python experiments/pool_size.py
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant(f"n{n}", f"n = {n}", changes={"generator.n_experts": n}) for n in (8, 16, 32, 64)
]

if __name__ == "__main__":
    run_experiment("pool_size", "Experts in the pool", VARIANTS)
