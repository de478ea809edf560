"""Table 9 of the paper: meta tokens and a pool, or LoRA factors directly from the meta states.

python experiments/table_9.py
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant("direct", "direct generation", method="direct"),
    Variant("meta", "meta tokens, router and pool"),
]

if __name__ == "__main__":
    run_experiment("table_9", "Direct generation or meta tokens", VARIANTS, paper="9")
