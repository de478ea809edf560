"""Table 6 of the paper: the coefficient of the balance loss, eq. 9.

    python experiments/table_6.py

Beside the paper's three, none at all.
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant(f"c{c}", f"c = {c}", changes={"generator.balance_coefficient": c})
    for c in (0.1, 0.01, 0.005, 0.0)
]

if __name__ == "__main__":
    run_experiment("table_6", "Coefficient of the balance loss", VARIANTS, paper="6")
