"""The shape of a decoder: sizes, and the switches that families differ in."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
from msgspec import Meta

from lorax_gen.config import Count, Positive, Size, check
from lorax_gen.errors import UserError
from lorax_gen.models.rope import Base, Rope, RopeScaling

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
# Far beyond any model. What is larger is a damaged file, and would use up the memory with shapes
# alone; the product of three is below 2**63.
Width = Annotated[int, Meta(ge=1, le=2**20)]
Depth = Annotated[int, Meta(ge=1, le=10_000)]
Vocabulary = Annotated[int, Meta(ge=1, le=2**24)]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, in the field names of Hugging Face's `config.json` where it has them.

    The switches below `hidden_act` are what families differ in; their defaults are LLaMA's.
    """

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Depth
    num_attention_heads: Width
    num_key_value_heads: Width
    head_dim: Width
    max_position_embeddings: Size = 2048
    rope_theta: Base = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu", "gelu_pytorch_tanh", "relu"] = "silu"
    biases: tuple[str, ...] = ()
    """Kernels that a bias is added to (Qwen2: q, k and v)."""
    mlp: Literal["gated", "plain"] = "gated"
    """down(act(gate x) * up x), or without a gate down(act(up x)) (OPT)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm: centred, and with a bias (OPT)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Queries and keys are rotated, or a learned table is added to the embeddings (OPT)."""
    position_offset: Count = 0
    """The row of that table for the first position (OPT: 2)."""
    word_embed_proj_dim: Width | None = None
    """Width of the embeddings, projected to D and, before the head, back; None: D (opt-350m)."""
    do_layer_norm_before: bool = True
    """Norms before attention, feed-forward and head; or only after each sum (opt-350m)."""
    sliding_rope: Rope | None = None
    """Of `sliding_attention` layers, if not `rope_theta` and `rope_scaling` (Gemma 3)."""
    rope_layers: tuple[bool, ...] = ()
    """Whether each layer rotates; empty: all do (SmolLM3)."""
    qk_norm: bool = False
    """Norms over the heads of q and of k, before they are rotated (Qwen3, Gemma 3)."""
    rms_norm_offset: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    embedding_scale: bool = False
    """Input embeddings are multiplied by sqrt(D) (Gemma)."""
    post_norms: bool = False
    """Norms after attention and feed-forward as well as before (Gemma 2)."""
    query_pre_attn_scalar: Positive | None = None
    """Scores are divided by its root; None: head_dim (Gemma 2)."""
    attn_logit_softcapping: Positive | None = None
    """Scores stay within this, by tanh (Gemma 2)."""
    final_logit_softcapping: Positive | None = None
    """Logits stay within this, by tanh (Gemma 2)."""
    sliding_window: Size | None = None
    """Positions that a `sliding_attention` layer sees, its own among them (Gemma 2, Qwen2)."""
    layer_types: tuple[str, ...] = ()
    """`sliding_attention` or `full_attention` for each layer; empty: all full."""

    def __post_init__(self):
        check(self)
        if self.num_attention_heads * self.head_dim > 2**20:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} of head_dim={self.head_dim} are "
                f"wider than any model; expected at most {2**20:,} together"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; grouped attention needs one"
            )
        if self.head_dim % 2 and self.positions == "rotary":
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embeddings need it even")
        if unknown := set(self.biases) - set(kernel_shapes(self)):
            raise UserError(
                f"biases names {min(unknown)!r}; the kernels are {[*kernel_shapes(self)]}"
            )
        in_order = tuple(name for name in kernel_shapes(self) if name in self.biases)
        object.__setattr__(self, "biases", in_order)
        unknown = set(self.layer_types) - {"sliding_attention", "full_attention"}
        if unknown or len(self.layer_types) not in (0, self.num_hidden_layers):
            raise UserError(
                f"layer_types has {len(self.layer_types)} entries {sorted(set(self.layer_types))}; "
                f"expected sliding_attention or full_attention for {self.num_hidden_layers} layers"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise UserError("layer_types has sliding_attention, but there is no sliding_window")
        if self.post_norms and not self.do_layer_norm_before:
            raise UserError("post_norms are beside norms before, but do_layer_norm_before is false")
        if len(self.rope_layers) not in (0, self.num_hidden_layers):
            raise UserError(
                f"rope_layers has {len(self.rope_layers)} entries for {self.num_hidden_layers} "
                "layers; expected one each, or none"
            )

    @property
    def embedding_size(self) -> int:
        """Width of the embeddings and of the head."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the positions that a query sees; None: all before it."""
        return tuple(self.sliding_window if sliding else None for sliding in self._sliding)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embedding of each layer."""
        full = Rope(self.rope_theta, self.rope_scaling)
        rotates = self.rope_layers or (True,) * self.num_hidden_layers
        return tuple(
            Rope(None) if not turns else self.sliding_rope or full if sliding else full
            for turns, sliding in zip(rotates, self._sliding, strict=True)
        )

    @property
    def _sliding(self) -> tuple[bool, ...]:
        types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        return tuple(kind == "sliding_attention" for kind in types)


MLP_KERNELS = ("gate", "up", "down")  # of the feed-forward network; a plain one has no gate


def kernel_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """`{name: (d_in, d_out)}` of one layer's kernels: what a LoRA of this decoder can sit on."""
    d, f = config.hidden_size, config.intermediate_size
    h = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    attention = {"q": (d, h), "k": (d, k), "v": (d, k), "o": (h, d)}
    gate = {"gate": (d, f)} if config.mlp == "gated" else {}
    return attention | gate | {"up": (d, f), "down": (f, d)}
