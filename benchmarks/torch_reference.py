"""A train step of LoRA-Gen in plain torch, on models of `transformers`: the peer and the reference.

Written from the paper's equations in idiomatic torch: frozen models with wrapped linear layers,
`inputs_embeds` and attention masks, a router that is a `Sequential`, loops over layers, logits at
every position of the edge and the loss of `labels`. It uses none of `lorax_gen`'s computations; the
constants come in an object with the fields of its `GeneratorConfig`. `benchmarks/train_step.py`
times it, `tests/training/test_oracle.py` compares the library's loss, gradients and parameters with
it.

Two switches change the work but not the result: `lm_head` calls the cloud as a causal LM, which
computes unused logits, and `repeat_prompts` reads a prompt once for each of its questions, as with
a data set of (prompt, question, answer) rows. Most code written for `transformers` does both; both
are off by default.

Dims beyond the legend (`lorax_gen.method`): D input width, F output width of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The kernels of a decoder layer, by the library's names.
PLACES = {
    **{name: ("self_attn", f"{name}_proj") for name in ("q", "k", "v", "o")},
    **{name: ("mlp", f"{name}_proj") for name in ("gate", "up", "down")},
}


def get_linear(layer: nn.Module, name: str) -> nn.Module:
    block, attribute = PLACES[name]
    return getattr(getattr(layer, block), attribute)


def set_linear(layer: nn.Module, name: str, module: nn.Module) -> None:
    block, attribute = PLACES[name]
    setattr(getattr(layer, block), attribute, module)


# --- frozen linear layers with a low-rank term ---------------------------------------------------


class Adapter(nn.Module):
    """y = W x + (alpha / r) B A drop(x): one trained LoRA, as in PEFT."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        device = base.weight.device
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_a = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.uniform_(self.lora_a.weight, -(base.in_features**-0.5), base.in_features**-0.5)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))
        return self.base(x) + F.linear(low, self.lora_b.weight.to(x.dtype)) * self.scale


class PerExample(nn.Module):
    """y = W x + s sum_j A_j B_j x with separate factors for each row, set before the call."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.scale = 1.0
        self.pairs: list[tuple[Tensor, Tensor]] = []  # of [B, D, R] and [B, R, F]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for a, b in self.pairs:
            y = y + torch.bmm(torch.bmm(x, a.to(x.dtype)), b.to(x.dtype)) * self.scale
        return y


def add_adapters(
    model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float, dropout: float
) -> list[dict[str, Adapter]]:
    """Puts an adapter on the named kernels of each layer of a causal LM."""
    adapters = []
    for layer in model.model.layers:
        own = {name: Adapter(get_linear(layer, name), rank, alpha, dropout) for name in targets}
        for name, adapter in own.items():
            set_linear(layer, name, adapter)
        adapters.append(own)
    return adapters


# --- the generator -------------------------------------------------------------------------------


class Experts(nn.Module):
    """A pool: N LoRA blocks for each named linear layer."""

    def __init__(self, linears: Mapping[str, nn.Linear], n: int, rank: int):
        super().__init__()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in linears.items():
            device, bound = linear.weight.device, linear.in_features**-0.5
            a = torch.empty(n, linear.in_features, rank, device=device).uniform_(-bound, bound)
            self.a[name] = nn.Parameter(a)
            self.b[name] = nn.Parameter(torch.zeros(n, rank, linear.out_features, device=device))


def make_router(width: int, config: Any, device: torch.device) -> nn.Sequential:
    """Eq. 3: BN(f2(SiLU(f1(T))))."""
    return nn.Sequential(
        nn.Linear(width, config.router_width),
        nn.SiLU(),
        nn.Linear(config.router_width, config.n_experts),
        nn.BatchNorm1d(config.n_experts, config.bn_eps, 1 - config.bn_momentum)
        if config.batch_norm
        else nn.Identity(),
    ).to(device)


def keep_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eq. 6, 7: softmax over all experts, the K largest, renormalised. `[P, K]` gates, indices."""
    top = logits.softmax(-1).topk(k, -1)
    return top.values / top.values.sum(-1, keepdim=True), top.indices


def balance_loss(gates: Tensor, coefficient: float) -> Tensor:
    """Eq. 9 of gates `[P, L, N]`: (std / mean)^2 of the experts' importance, mean over layers."""
    importance = gates.sum(0)
    return coefficient * (importance.std(-1, unbiased=False) / importance.mean(-1)).pow(2).mean()


class LoraGen(nn.Module):
    """The full system, trained by `train_step`. Wraps layers of the models it is given.

    Args:
      cloud, edge: causal LMs of `transformers`; they are frozen here.
      config: the fields of `lorax_gen.method.GeneratorConfig`; its strategy is keep_top_k.
      lm_head, repeat_prompts: see above.
      embedding: `[D]`, initial value of the meta tokens.
    """

    def __init__(
        self,
        cloud: nn.Module,
        edge: nn.Module,
        config: Any,
        *,
        lm_head: bool = False,
        repeat_prompts: bool = False,
        embedding: Tensor | None = None,
    ):
        super().__init__()
        self.cloud, self.edge = cloud.requires_grad_(False), edge.requires_grad_(False)
        self.config, self.lm_head, self.repeat_prompts = config, lm_head, repeat_prompts
        width, layers = cloud.config.hidden_size, edge.config.num_hidden_layers
        device = cloud.get_input_embeddings().weight.device
        self.adapters = add_adapters(
            cloud, config.cloud_targets, config.cloud_rank, config.cloud_alpha, config.cloud_dropout
        )
        own = layers if config.meta_tokens == "per_layer" else 1
        meta = 0.02 * torch.randn(own, width, device=device)
        self.meta = nn.Parameter(meta if embedding is None else meta + embedding.float())
        routers = layers if config.router == "per_layer" else 1
        self.routers = nn.ModuleList(make_router(width, config, device) for _ in range(routers))
        pools = layers if config.pool == "per_layer" else 1
        first = edge.model.layers[0]
        linears = {name: get_linear(first, name) for name in config.edge_targets}
        self.pools = nn.ModuleList(
            Experts(linears, config.n_experts, config.rank) for _ in range(pools)
        )
        for layer in edge.model.layers:
            for name in config.edge_targets:
                set_linear(layer, name, PerExample(get_linear(layer, name)))

    def read(self, prompt: Tensor, lengths: Tensor) -> Tensor:
        """T^i, `[P, L, D]`: states at the meta tokens, which directly follow each prompt."""
        layers, rows = self.edge.config.num_hidden_layers, len(prompt)
        x = self.cloud.get_input_embeddings()(prompt)
        x = torch.cat([x, x.new_zeros(rows, layers, x.shape[-1])], 1)
        positions = lengths[:, None] + torch.arange(layers, device=prompt.device)
        row = torch.arange(rows, device=prompt.device)[:, None]
        x = x.index_put((row, positions), self.meta.to(x.dtype).expand(rows, layers, -1))
        mask = torch.arange(x.shape[1], device=prompt.device) < lengths[:, None] + layers
        inputs = {"inputs_embeds": x, "attention_mask": mask.long(), "use_cache": False}
        if self.lm_head:
            hidden = self.cloud(**inputs, output_hidden_states=True).hidden_states[-1]
        else:
            hidden = self.cloud.model(**inputs).last_hidden_state
        return hidden[row, positions]

    def route(self, states: Tensor) -> Tensor:
        """Logits `[P, L, N]` of meta states `[P, L, D]`."""
        states = states.float()
        if len(self.routers) == 1:
            return self.routers[0](states.flatten(0, 1)).unflatten(0, states.shape[:2])
        return torch.stack([f(states[:, i]) for i, f in enumerate(self.routers)], 1)

    def compose(self, i: int, kept: Tensor, indices: Tensor, repeats: int) -> None:
        """Eq. 8: sets the LoRA of layer i, made of the K experts kept for each prompt."""
        config, layer = self.config, self.edge.model.layers[i]
        pool = self.pools[i if len(self.pools) > 1 else 0]
        for name in config.edge_targets:
            a, b, weights = pool.a[name], pool.b[name], kept[..., None, None]
            if config.composition == "factors":
                dense = torch.zeros(len(kept), len(a), device=a.device).scatter(1, indices, kept)
                pairs = [tuple(torch.einsum("pn,nxy->pxy", dense, e) for e in (a, b))]
            else:
                pairs = [(a[j], weights[:, k] * b[j]) for k, j in enumerate(indices.unbind(1))]
            if repeats > 1:
                pairs = [tuple(e.repeat_interleave(repeats, 0) for e in pair) for pair in pairs]
            linear = get_linear(layer, name)
            linear.pairs, linear.scale = pairs, config.alpha / config.rank

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Eq. 10: the loss, its parts, and the gates `[P, L, N]`.

        A batch holds `prompt: [P, T]`, `prompt_lengths: [P]`, `tokens` and `answer: [B, T']`; row b
        belongs to prompt b // Q, and only padding follows its answer.
        """
        config, answer = self.config, batch["answer"]
        prompt, lengths = batch["prompt"], batch["prompt_lengths"]
        repeats = len(answer) // len(prompt)
        if self.repeat_prompts:
            prompt, lengths = (x.repeat_interleave(repeats, 0) for x in (prompt, lengths))
            repeats = 1
        logits = self.route(self.read(prompt, lengths))
        kept, indices = keep_top_k(logits, config.top_k)
        gates = torch.zeros_like(logits).scatter(-1, indices, kept)
        for i in range(logits.shape[1]):
            self.compose(i, kept[:, i], indices[:, i], repeats)
        # Everything after the last token of the answer is padding.
        mask = answer.flip(1).cumsum(1).flip(1) > 0
        labels = batch["tokens"].masked_fill(~answer, -100)
        lm = self.edge(
            batch["tokens"], attention_mask=mask.long(), labels=labels, use_cache=False
        ).loss
        cv = balance_loss(gates, config.balance_coefficient)
        return {"loss": lm + cv, "loss_lm": lm, "loss_cv": cv, "gates": gates}


class Tuned(nn.Module):
    """The plain baseline: one LoRA on a frozen causal LM."""

    def __init__(self, model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.adapters = add_adapters(model, targets, rank, alpha, 0.0)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["answer"].flip(1).cumsum(1).flip(1) > 0
        labels = batch["tokens"].masked_fill(~batch["answer"], -100)
        loss = self.model(
            batch["tokens"], attention_mask=mask.long(), labels=labels, use_cache=False
        ).loss
        return {"loss": loss}


# --- the step ------------------------------------------------------------------------------------


def make_optimizer(
    model: nn.Module,
    learning_rate: float = 2e-5,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW that decays all trained parameters but biases and BatchNorm."""
    spared = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.BatchNorm1d)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], learning_rate, betas)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    clip_norm: float = 1.0,
) -> dict[str, Tensor]:
    """One step; the outputs of `forward`, and the norm of the gradients before clipping."""
    model.train()
    optimizer.zero_grad(set_to_none=True)
    out = model(batch)
    out["loss"].backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()
    return {name: value.detach() for name, value in out.items()} | {"grad_norm": norm}


# --- the library's trees -------------------------------------------------------------------------

Place = tuple[tuple[str, ...], int | None, Tensor, bool]


def adapter_places(adapters: list[dict[str, Adapter]], *path: str) -> Iterator[Place]:
    for i, own in enumerate(adapters):
        for name, adapter in own.items():
            yield (*path, name, "a"), i, adapter.lora_a.weight, True
            yield (*path, name, "b"), i, adapter.lora_b.weight, True


def places(model: LoraGen) -> Iterator[Place]:
    """Maps trained parameters to leaves of the library's trees, which stack layers on axis 0.

    Yields path, layer (None: not stacked), parameter, and whether it is stored transposed.
    """
    yield ("meta_tokens",), None, model.meta, False
    yield from adapter_places(model.adapters, "cloud_lora")
    for i, router in enumerate(model.routers):
        layer = i if model.config.router == "per_layer" else None
        yield ("router", "w1"), layer, router[0].weight, True
        yield ("router", "b1"), layer, router[0].bias, False
        yield ("router", "w2"), layer, router[2].weight, True
        yield ("router", "b2"), layer, router[2].bias, False
        if model.config.batch_norm:
            yield ("router", "bn_scale"), layer, router[3].weight, False
            yield ("router", "bn_bias"), layer, router[3].bias, False
    for i, pool in enumerate(model.pools):
        layer = i if model.config.pool == "per_layer" else None
        for name in pool.a:
            yield ("pool", name, "a"), layer, pool.a[name], False
            yield ("pool", name, "b"), layer, pool.b[name], False


def statistics(model: LoraGen) -> Iterator[Place]:
    """As `places`, for BatchNorm's running statistics."""
    for i, router in enumerate(model.routers):
        layer = i if model.config.router == "per_layer" else None
        yield ("mean",), layer, router[3].running_mean, False
        yield ("var",), layer, router[3].running_var, False


@torch.no_grad()
def load(where: Iterator[Place], tree: Mapping) -> None:
    """Copies a tree of numpy arrays into the parameters of `places` or `statistics`."""
    for path, layer, parameter, transposed in where:
        value: Any = tree
        for name in path:
            value = value[name]
        value = torch.from_numpy(np.array(value if layer is None else value[layer], np.float32))
        parameter.copy_(value.T if transposed else value)


def collect(
    where: Iterator[Place], get: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> dict[str, np.ndarray]:
    """`{path joined by '.': array}` of `get(parameter)`, such as its gradient, layers stacked."""
    parts: dict[str, list[np.ndarray]] = {}
    for path, layer, parameter, transposed in where:
        value = get(parameter)
        value = torch.zeros_like(parameter) if value is None else value.detach()
        value = (value.T if transposed else value).cpu().numpy()
        parts.setdefault(".".join(path), []).append(value if layer is None else value[None])
    return {name: np.concatenate(values) for name, values in parts.items()}
