"""Table 2 of the paper: every method beside the others.

    python experiments/table_2.py
    python experiments/table_2.py --cloud DIR --edge DIR --data DIR      # the paper's benchmarks

Baselines that read no prompt, those with the prompt in the edge's context, and LoRA-Gen with its
control. All have the learning rate of LoRA-Gen; `learning_rates.py` compares three for each.
`lorax-gen report` draws Figure 1 of the paper, score against latency, of this report.
"""

from common import Variant, run_experiment

from lorax_gen.data.world import FAMILIES

BASELINES = {"lora": "LoRA", "loramoe": "LoRAMoE", "mixlora": "MixLoRA"}


def tuned(method: str, prompted: bool) -> Variant:
    changes = {"in_context": True} if prompted else {}
    name = f"{method}_icl" if prompted else method
    label = f"edge + {BASELINES[method]}{', prompted' if prompted else ''}"
    return Variant(name, label, method=method, changes=changes, steps=1500)


VARIANTS = [
    Variant("plain", "edge, no prompt", method=None, mode="plain"),
    Variant("icl", "edge, prompted", method=None, mode="icl"),
    *[tuned(method, False) for method in BASELINES],
    *[tuned(method, True) for method in BASELINES],
    Variant(
        "lorahub",
        "edge + LoraHub",
        method=None,
        mode="lorahub",
        parts=tuple(
            Variant(family, family, method="lora", changes={"data.families": [family]}, steps=1500)
            for family in FAMILIES
        ),
    ),
    Variant("autocompressor", "edge + AutoCompressor", method="autocompressor", steps=1500),
    Variant("direct", "edge + direct generation", method="direct", steps=6000),
    Variant("lora_gen", "edge + LoRA-Gen", steps=6000),
    Variant("shuffled", "  other prompt", steps=6000, mode="shuffled"),
    Variant("cloud_icl", "cloud, prompted", method=None, mode="cloud_icl"),
]

if __name__ == "__main__":
    run_experiment("table_2", "Methods", VARIANTS, paper="2")
