"""Our decoder beside what `transformers` computed; no torch here."""

from functools import partial

import jax
import numpy as np

from lorax_gen.models import decoder
from lorax_gen.models.decoder import Block, DecoderConfig, Params, unstack

TOLERANCE = 2e-4  # states reach 12 in size; errors stay below 1e-5


@partial(jax.jit, static_argnames="config")
def logits(params: Params, config: DecoderConfig, tokens) -> jax.Array:
    """`[B, T, V]`, by the layers scanned."""
    return decoder.logits(params, config, decoder.hidden_states(params, config, tokens))


@partial(jax.jit, static_argnames="config")
def hidden_states(params: Params, config: DecoderConfig, tokens) -> list[jax.Array]:
    """The L+1 states `[B, T, D]` that `output_hidden_states` names, one layer after the other."""
    embeddings = decoder.embed(params, config, tokens)
    states = [decoder.add_positions(embeddings, params.get("positions"), config, None)]
    ropes = decoder.rope_of_layers(config, tokens.shape[1])
    layers = unstack(params["layers"], config.num_hidden_layers)
    for layer, rope, window in zip(layers, ropes, config.windows, strict=True):
        block = Block(config, windows=(window,))
        state, _ = block.apply({"params": layer}, states[-1], None, None, rope)
        states.append(state)
    return [*states[:-1], decoder.final_norm(params, config, states[-1])]


def assert_matches(params: Params, config: DecoderConfig, expected: dict[str, np.ndarray]) -> None:
    """Logits, and the states after each layer; prints how far apart they are at most."""
    found = [logits(params, config, expected["tokens"])]
    states = hidden_states(params, config, expected["tokens"])
    found += states[:-1] if config.word_embed_proj_dim else states
    names = ["logits", "embeddings", *(f"layer {i}" for i in range(config.num_hidden_layers))]
    expected_each = [expected["logits"], *expected["hidden_states"]]
    for name, ours, theirs in zip(names[: len(found)], found, expected_each, strict=True):
        print(f"{name}: {np.abs(ours - theirs).max():.1e} of {np.abs(theirs).max():.1f}")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=name)
