"""K: how many of 32 experts are kept.

python experiments/kept_experts.py
"""

from common import Variant, run_experiment

VARIANTS = [Variant(f"k{k}", f"K = {k}", changes={"generator.top_k": k}) for k in (1, 2, 4, 8)]

if __name__ == "__main__":
    run_experiment("kept_experts", "Kept experts", VARIANTS)
