"""What eq. 8 sums: A and B each, as Figure 3 draws it, or products A B.

python experiments/composition.py
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant("products", "products: sum of A B"),
    Variant("factors", "factors: A and B each", changes={"generator.composition": "factors"}),
]

if __name__ == "__main__":
    run_experiment("composition", "Composition of the experts", VARIANTS)
