"""The baseline that compresses prompts: the edge, with a LoRA and summary tokens, reads a prompt
into a soft prompt, and answers after it; see `baselines.autocompressor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lorax_gen import config as configs
from lorax_gen.artifacts.baseline import Baseline, save_baseline
from lorax_gen.artifacts.identity import identify
from lorax_gen.baselines.autocompressor import (
    Compressed,
    CompressorConfig,
    compress,
    compressor_lora,
    init_compressor,
    soft_prompts,
)
from lorax_gen.config import BelowOne, NotNegative, Size
from lorax_gen.cost import (
    Macs,
    compress_macs,
    compressed_macs,
    compressor_ranks,
    compressor_step_macs,
)
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer, Cases, Prompt
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.inference.reading import read_prompts
from lorax_gen.mesh import hosts
from lorax_gen.mesh.sharding import make_mesh
from lorax_gen.method.generator import select_kernels
from lorax_gen.models.adapter import Adapter, LowRank
from lorax_gen.models.decoder import Array, DecoderConfig, Execution, kernel_shapes
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.models.scoring import score_tokens
from lorax_gen.recipes.base import Load, PromptedConfig, assemble
from lorax_gen.recipes.data import open_data
from lorax_gen.recipes.lora_gen import end_of_text
from lorax_gen.tensors import tree_hash
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, Loss, answer_loss

CHUNK = 128  # positions of a row that go through the head at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoCompressorConfig(PromptedConfig):
    """Train the edge model to compress prompts: summary tokens, and a LoRA that it reads and
    answers with."""

    compressor: CompressorConfig = dataclasses.field(default_factory=CompressorConfig)
    substep: Size = 2
    """The gradient is stopped between sub-steps of this many segments; the question counts as the
    last one."""
    prompt_loss: NotNegative = 1.0
    """Weight of the cross entropy on the prompt's tokens, beside that on answers."""
    dropout: BelowOne = 0.05
    """Dropout rate on the LoRA's input, in training."""


def autocompressor_loss(
    config: AutoCompressorConfig, decoder_config: DecoderConfig, **options: Any
) -> Loss:
    """Cross entropy on answers after the soft prompts of their prompts, and on the prompts.

    `frozen` is `{'edge': params}`; the batch is that of `step.generator_loss`, where the edge reads
    the prompts too.

    Args:
      options: of `decoder.hidden_states`.
    """

    def loss(params, stats, frozen, batch, key, axis_name):
        lora = compressor_lora(params, config.compressor)
        shared: dict[str, Any] = {"adapter": Adapter(lora, apply=LowRank(config.dropout))}
        shared |= options
        read_key, answer_key = jax.random.split(key)
        read = compress(
            frozen["edge"],
            decoder_config,
            params["summary"],
            batch["prompt"],
            batch["prompt_lengths"],
            segments=config.compressor.segments,
            substep=config.substep,
            dropout_key=read_key,
            **shared,
        )
        lm, accuracy = answer_loss(
            frozen["edge"],
            decoder_config,
            batch,
            prefix=jnp.repeat(read.soft_prompt, config.queries_per_prompt, axis=0),
            dropout_key=answer_key,
            answer_length=config.answer_length,
            axis_name=axis_name,
            **shared,
        )
        metrics = {"loss_lm": lm, "accuracy/batch": accuracy}
        if config.prompt_loss == 0:
            return lm, (stats, metrics)
        own = prompt_loss(frozen["edge"], decoder_config, read, axis_name)
        return lm + config.prompt_loss * own, (stats, {**metrics, "loss_prompt": own})

    return loss


def prompt_loss(
    params: dict, config: DecoderConfig, read: Compressed, axis_name: str | None
) -> Array:
    """Cross entropy on the tokens of prompts, each segment's after the soft prompt of those before
    it; the first token of a later segment is predicted at the end of the segment before it."""
    nll, count = jnp.float32(0), jnp.float32(0)
    for segment, hidden in read.segments:
        found, _ = score_tokens(params, config, hidden, segment.targets, chunk=CHUNK)
        nll -= jnp.sum(found * segment.followed)
        count += segment.followed.sum()
    count = count if axis_name is None else jax.lax.pmean(count, axis_name)
    return nll / jnp.maximum(count, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class AutoCompressed(Answerer):
    """The edge that compresses each question's prompt, and answers after the soft prompt.

    Attributes:
      summary: `[K, D]`; compressor: its config. The LoRA is merged into the model, or `adapter`.
    """

    summary: Array = dataclasses.field(kw_only=True)
    compressor: CompressorConfig = dataclasses.field(kw_only=True)

    def __post_init__(self):
        room = self.compressor.room(self.model.config)[1]
        object.__setattr__(self, "max_length", min(self.max_length or room, room))

    @property
    def reads_prompts(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """`[S K, D]`, of a soft prompt."""
        return self.compressor.length, self.model.config.hidden_size

    @property
    def room(self) -> int:
        """Most tokens of a prompt that fit into the edge, segment by segment."""
        return self.compressor.room(self.model.config)[0]

    def prompts(self, cases: Cases) -> list[Prompt]:
        encoder = Encoder.of(self.model)
        rows = [encoder.ids(text) for text in cases.prompts()]
        return [Prompt(ids[-self.room :], max(len(ids) - self.room, 0)) for ids in rows]

    def specialise(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        wanted: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        progress: Callable[[int], object] = lambda prompts: None,
    ) -> Adapter:
        """The adapter with one soft prompt per prompt; each distinct prompt is compressed once."""
        config, segments = self.model.config, self.compressor.segments

        def read(weights: Any, prompt: Array, lengths: Array, execution: Execution) -> Array:
            params, summary, adapter = weights
            return soft_prompts(
                params,
                config,
                summary,
                prompt,
                lengths,
                segments=segments,
                adapter=adapter,
                execution=execution,
            )

        found = read_prompts(
            [prompt.ids for prompt in prompts],
            self.model,
            read,
            (self.model.params, self.summary, self.adapter),
            self.shape,
            room=self.room,
            extra=self.compressor.length,
            dtype=self.model.params["embed"].dtype,
            tokens_per_batch=tokens_per_batch,
            wanted=wanted,
            mesh=mesh,
            progress=progress,
        )
        return dataclasses.replace(self.adapter or Adapter(), prefix=found)

    @property
    def serving_adapter(self) -> Adapter:
        """With a soft prompt of its length, whose values do not matter."""
        shape, dtype = (1, *self.shape), self.model.params["embed"].dtype
        prefix = jnp.zeros(shape, dtype)
        return dataclasses.replace(self.adapter or Adapter(), prefix=prefix)

    @property
    def ranks(self) -> dict[str, int]:
        """Of its LoRA where it is not merged."""
        return {} if self.adapter is None else compressor_ranks(self.compressor)

    def macs(self, context_tokens: int) -> Macs:
        config, options = self.model.config, {"logits": 1, "lora": self.ranks}
        return compressed_macs(config, self.compressor, context_tokens, **options)

    def prompt_macs(self, prompt_tokens: int) -> Macs:
        return compress_macs(self.model.config, self.compressor, prompt_tokens, lora=self.ranks)

    def identity(self) -> dict[str, Any]:
        own = {"summary": tree_hash({"summary": self.summary})}
        return super().identity() | own | {"segments": self.compressor.segments}


def experiment(
    config: AutoCompressorConfig, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.base` and `training.loop.fit`."""
    mesh = make_mesh(config.mesh, devices)
    edge, own = config.loader(mesh, load)(config.edge), config.compressor
    check_room(config, edge)
    data = open_data(
        config, mesh, edge, edge, samples=config.prompts, queries=config.queries_per_prompt
    )
    key = jax.random.key(config.run.seed)
    start = end_of_text(edge, "edge", "summary tokens begin as copies of it")
    select_kernels(kernel_shapes(edge.config), own.targets, "edge")  # before anything is compiled

    def answerer(state: State) -> AutoCompressed:
        adapter = Adapter(compressor_lora(state["params"], own))
        return compressed(edge, own, state["params"]["summary"], adapter)

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        models = identify(edge, reads=False)
        plain = configs.to_dict(own)
        made = Baseline("autocompressor", plain, state["params"], models, frame=data.frame)
        save_baseline(directory, made, provenance)

    def work(batch: Batch) -> dict[str, int]:
        (prompts, prompt_length), (rows, length) = batch["prompt"].shape, batch["tokens"].shape
        shape: dict[str, Any] = {"prompts": prompts, "queries": config.queries_per_prompt}
        shape |= {"prompt_length": prompt_length, "length": length}
        shape |= {"answered": config.answered(length), "head": config.prompt_loss > 0}
        macs = (
            compressor_step_macs(edge.config, own, **shape, remat=remat)
            for remat in ("none", config.remat)
        )
        useful, executed = (each.flops for each in macs)
        tokens = prompts * prompt_length + rows * length
        return {"examples": rows, "tokens": tokens, "flops": useful, "executed": executed}

    if hosts.several():  # all processes take part, but only the first one releases
        identify(edge, reads=False)
    return assemble(
        config,
        mesh,
        data,
        init=lambda: (init_compressor(key, own, edge.config, start), {}),
        loss=autocompressor_loss(config, edge.config, execution=config.execution(mesh)),
        frozen={"edge": edge.params},
        answerer=answerer,
        release=release,
        work=work,
    )


def check_room(config: AutoCompressorConfig, edge: Model) -> None:
    """Raises UserError where prompts or questions of the config's lengths leave no positions for
    soft prompts and summary tokens."""
    most = dict(zip(("prompt", "question"), config.compressor.room(edge.config), strict=True))
    for what, room in most.items():
        length = getattr(config.data, f"{what}_length")
        if length > room:
            raise UserError(
                f"data.{what}_length is {length}, but the edge model, which compresses prompts "
                f"into {config.compressor.length} vectors, reads at most {room} tokens of a {what} "
                f"({edge.config.max_position_embeddings} positions, max_position_embeddings); set "
                f"data.{what}_length to {room} or less"
            )


def compressed(
    edge: Model, config: CompressorConfig, summary: Array, adapter: Adapter | None = None
) -> AutoCompressed:
    """The answerer of an edge with the LoRA of a compressor, merged or as an adapter."""
    return AutoCompressed(
        "autocompressor",
        "edge + AutoCompressor",
        edge,
        adapter=adapter,
        summary=summary,
        compressor=config,
    )


def answerer(baseline: Baseline, edge: Model, cloud: Model | None = None) -> AutoCompressed:
    """The answerer of a released baseline; see `registry.answerer_of`."""
    config = configs.from_dict(CompressorConfig, baseline.config, baseline.name)
    key, start = jax.random.key(0), jax.ShapeDtypeStruct((edge.config.hidden_size,), jnp.float32)
    init = lambda start: init_compressor(key, config, edge.config, start)  # noqa: E731
    baseline.check_params(jax.eval_shape(init, start))
    merged = edge.merged(compressor_lora(baseline.params, config))
    return compressed(merged, config, baseline.params["summary"])
