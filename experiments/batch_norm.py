"""BatchNorm over the logits, the last step of eq. 3: with and without.

python experiments/batch_norm.py
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant("on", "BatchNorm"),
    Variant("off", "none", changes={"generator.batch_norm": False}),
]

if __name__ == "__main__":
    run_experiment("batch_norm", "BatchNorm over the logits", VARIANTS)
