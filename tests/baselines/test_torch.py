"""LoRAMoE and MixLoRA against the same written in torch on models of `transformers`: loss and
gradients, balance losses included. Same weights, fp32, no dropout; rows are padded unequally.

The torch side is written as the baselines' papers are: a loop over experts, each of which is a
network of its own. Needs torch (pip install -e '.[parity]').
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")

import torch
from torch import nn

from lorax_gen.baselines.loramoe import LoraMoeConfig
from lorax_gen.baselines.mixlora import MixLoraConfig
from lorax_gen.models.checkpoint_files import read_params
from lorax_gen.models.config_json import read_config
from lorax_gen.models.model import Model
from lorax_gen.recipes import loramoe, mixlora
from lorax_gen.recipes.tuning import tuning_loss
from lorax_gen.tensors import flatten
from tests.golden.make import COMMON, case, random_model, save

CASES = {
    "llama": case("llama", "float32"),
    "opt": case("opt", "float32", tie_word_embeddings=True),  # no gate, biases everywhere
}
LORAMOE = loramoe.LoraMoeTraining(
    adapter=LoraMoeConfig(n_experts=4, rank=3, alpha=6.0),
    balance=0.3,
    balance_delta=0.2,
    balance_tasks=("some",),
)
MIXLORA = mixlora.MixLoraTraining(
    adapter=MixLoraConfig(n_experts=5, top_k=2, rank=3, alpha=6.0), balance=0.3
)
ROWS, LENGTH = 5, 9


def make_batch():
    """Answers of 1 to 3 tokens after questions of unequal lengths; noise pads the rows."""
    rng, time = np.random.default_rng(0), np.arange(LENGTH)
    end = rng.permutation(np.arange(LENGTH + 1 - ROWS, LENGTH + 1))[:, None]
    begin = end - rng.integers(1, 4, (ROWS, 1))
    return {
        "tokens": rng.integers(0, COMMON["vocab_size"], (ROWS, LENGTH)).astype(np.int32),
        "answer": (begin <= time) & (time < end),
        "group": np.array([True, False, True, True, False]),
    }


def fill(shapes):
    """Parameters with nothing at its initial value."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.float32(rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5), shapes
    )


# --- in torch ------------------------------------------------------------------------------------


class Expertised(nn.Module):
    """LoRAMoE around a linear layer."""

    def __init__(self, base, own, scale, sums):
        super().__init__()
        self.base, self.own, self.scale, self.sums = base, own, scale, sums

    def forward(self, x):
        weights = torch.softmax(x @ self.own["router"], -1)
        self.sums.append(weights.reshape(ROWS, LENGTH - 1, -1))
        y = self.base(x)
        for i in range(weights.shape[-1]):
            y = y + weights[..., i : i + 1] * self.scale * (x @ self.own["a"][i] @ self.own["b"][i])
        return y


class Adapted(nn.Module):
    """A plain LoRA around a linear layer."""

    def __init__(self, base, own, scale):
        super().__init__()
        self.base, self.own, self.scale = base, own, scale

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.own["a"] @ self.own["b"])


class Mixture(nn.Module):
    """MixLoRA: complete feed-forward networks, two of them for each token."""

    def __init__(self, kernels, act, router, experts, scale, routed):
        super().__init__()
        self.kernels, self.act, self.router = nn.ModuleDict(kernels), act, router
        self.experts, self.scale, self.routed = experts, scale, routed

    def expert(self, i, x):
        def kernel(name, h):
            a, b = self.experts[name]["a"][i], self.experts[name]["b"][i]
            return self.kernels[name](h) + self.scale * (h @ a @ b)

        if "gate" in self.kernels:
            return kernel("down", self.act(kernel("gate", x)) * kernel("up", x))
        return kernel("down", self.act(kernel("up", x)))

    def forward(self, x):
        p = torch.softmax(x @ self.router, -1)
        kept, chosen = torch.topk(p, 2, dim=-1)
        kept = kept / kept.sum(-1, keepdim=True)
        self.routed.append((p.reshape(ROWS, LENGTH - 1, -1), chosen.reshape(ROWS, LENGTH - 1, 2)))
        y = torch.zeros_like(x)
        for i in range(p.shape[-1]):
            weight = torch.where(chosen == i, kept, 0.0).sum(-1, keepdim=True)
            y = y + weight * self.expert(i, x)
        return y


def layers_of(model):
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def kernels_of(layer):
    """`{name: (module that has it, attribute)}` of a layer of LLaMA or OPT."""
    attention = layer.self_attn
    out = "o_proj" if hasattr(attention, "o_proj") else "out_proj"
    found = {name: (attention, f"{name}_proj") for name in "qkv"} | {"o": (attention, out)}
    if hasattr(layer, "mlp"):
        return found | {name: (layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    return found | {"up": (layer, "fc1"), "down": (layer, "fc2")}


def leaf_tensors(tree):
    return jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), tree)


def answer_loss(model, batch):
    tokens, answer = torch.tensor(batch["tokens"]).long(), torch.tensor(batch["answer"])
    scores = model(tokens[:, :-1], use_cache=False).logits
    nll = nn.functional.cross_entropy(scores.mT, tokens[:, 1:], reduction="none")
    return (nll * answer[:, 1:]).sum() / answer[:, 1:].sum()


def real_of(batch):
    """A token is real up to the end of its row's answer."""
    last = [int(np.flatnonzero(row)[-1]) for row in batch["answer"]]
    return torch.tensor([[t <= end for t in range(LENGTH - 1)] for end in last]).float()


def loramoe_in_torch(model, params, batch):
    scale, real = LORAMOE.adapter.alpha / LORAMOE.adapter.rank, real_of(batch)
    sums, own = [], leaf_tensors(params)
    for i, layer in enumerate(layers_of(model)):
        for name, (parent, attribute) in kernels_of(layer).items():
            if name in own:
                mine = {key: leaf[i] for key, leaf in own[name].items()}
                base = getattr(parent, attribute)
                setattr(parent, attribute, Expertised(base, mine, scale, sums))
    loss, spread = answer_loss(model, batch), []
    for weights in sums:  # of each kernel of each layer
        rows = []
        for b in range(ROWS):
            q = (weights[b] * real[b][:, None]).sum(0)
            same = [(i < 2) == bool(batch["group"][b]) for i in range(4)]
            rows.append(q * torch.tensor([1.2 if each else 0.8 for each in same]))
        z = torch.cat(rows)
        spread.append(z.var() / (z.mean() ** 2 + 1e-10))
    return loss, 0.3 * sum(spread) / len(spread), own


def mixlora_in_torch(model, params, batch):
    scale, real = MIXLORA.adapter.alpha / MIXLORA.adapter.rank, real_of(batch)
    routed, own = [], leaf_tensors(params)
    for i, layer in enumerate(layers_of(model)):
        kernels = kernels_of(layer)
        for name in own["attention"]:
            parent, attribute = kernels.pop(name)
            mine = {key: leaf[i] for key, leaf in own["attention"][name].items()}
            setattr(parent, attribute, Adapted(getattr(parent, attribute), mine, scale))
        experts = jax.tree.map(lambda leaf, i=i: leaf[i], own["experts"])
        modules = {
            name: getattr(parent, attribute) for name, (parent, attribute) in kernels.items()
        }
        act = layer.mlp.act_fn if hasattr(layer, "mlp") else layer.activation_fn
        mixture = Mixture(modules, act, own["router"][i], experts, scale, routed)
        if hasattr(layer, "mlp"):
            layer.mlp = mixture
        else:
            layer.fc1, layer.activation_fn, layer.fc2 = nn.Identity(), nn.Identity(), mixture
    loss, balances = answer_loss(model, batch), []
    for p, chosen in routed:
        p, chosen = p[real > 0], chosen[real > 0]
        n = p.shape[-1]
        f = torch.stack([(chosen == e).float().sum(-1).mean() for e in range(n)])
        balances.append(n * (f * p.mean(0)).sum())
    return loss, 0.3 * sum(balances) / len(balances), own


METHODS = {
    "loramoe": (loramoe, LORAMOE, loramoe_in_torch),
    "mixlora": (mixlora, MIXLORA, mixlora_in_torch),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CASES)
def test_losses_and_gradients_are_those_of_torch(family, method, tmp_path):
    recipe, config, in_torch = METHODS[method]
    model, batch = random_model(CASES[family], 0), make_batch()
    save(tmp_path, model, CASES[family])
    edge_config = read_config(tmp_path / "config.json")
    edge = Model(edge_config, read_params(tmp_path, edge_config), None)
    made = recipe.training(config, edge)
    params = fill(jax.eval_shape(made.init))

    loss, balance, own = in_torch(model, jax.device_get(params), batch)
    (loss + balance).backward()

    compute = jax.jit(
        jax.value_and_grad(tuning_loss(edge_config, made.adapter, made.balance), has_aux=True),
        static_argnames="axis_name",
    )
    (_, (_, metrics)), grads = compute(
        params, {}, {"edge": edge.params}, batch, None, axis_name=None
    )
    for name, expected in (("loss_lm", loss), ("loss_balance", balance)):
        print(f"{name}: {float(metrics[name]):.7f} and {expected.item():.7f}")
        assert float(metrics[name]) == pytest.approx(expected.item(), rel=1e-5)
    theirs = flatten(jax.tree.map(lambda x: x.grad.numpy(), own))
    for name, found in flatten(grads).items():
        assert np.linalg.norm(theirs[name]) > 1e-4, name
        difference = np.linalg.norm(found - theirs[name]) / np.linalg.norm(theirs[name])
        print(f"{name}: {difference:.1e}")
        assert difference < 1e-4, name
