"""What the edge layers share: nothing, the pool, the router, the meta token, all of it.

python experiments/sharing.py
"""

from common import Variant, run_experiment

VARIANTS = [
    Variant("own", "nothing"),
    *[
        Variant(name, label, changes={f"generator.{name}": "shared"})
        for name, label in (("pool", "pool"), ("router", "router"), ("meta_tokens", "meta token"))
    ],
    Variant(
        "all",
        "pool, router and meta token",
        changes={f"generator.{name}": "shared" for name in ("pool", "router", "meta_tokens")},
    ),
]

if __name__ == "__main__":
    run_experiment("sharing", "What the edge layers share", VARIANTS)
