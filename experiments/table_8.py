"""Table 8 of the paper: how logits become gates, KeepTOP-K (eq. 6-7) or Gumbel (eq. 4-5).

python experiments/table_8.py
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant("keep_top_k", "KeepTOP-K"),
    Variant("gumbel", "Gumbel", changes={"generator.strategy": "gumbel"}),
]

if __name__ == "__main__":
    run_experiment("table_8", "Routing", VARIANTS, paper="8")
