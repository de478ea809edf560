"""Three learning rates for every baseline, one seed each: the best ones are those of Table 2.

python experiments/learning_rates.py --seeds 0
"""

from common import Variant, run_experiment
from table_2 import VARIANTS as METHODS

RATES = (1e-3, 3e-3, 1e-2)


def at(variant: Variant, rate: float) -> Variant:
    changes = {**variant.changes, "optimizer.learning_rate": rate}
    return Variant(
        f"{variant.name}-{rate:g}", f"{variant.label}, {rate:g}", variant.method, changes,
        variant.steps,
    )  # fmt: skip


VARIANTS = [
    at(each, rate) for each in METHODS if each.method and each.mode is None for rate in RATES
]

if __name__ == "__main__":
    run_experiment("learning_rates", "Learning rates", VARIANTS)
