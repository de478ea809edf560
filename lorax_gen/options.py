"""What can be asked on the command line: a dataclass for each command, its fields the options.

tyro makes the parser and `--help` of them; `cli` runs what was asked. A training config's options
are its own dataclasses' (`recipes.registry`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Demo:
    """See the method work: specialise a small model to tasks that it never met, in minutes.

    Uses the shipped models. Prints answers before and after, a table of methods, and writes
    report.json and pictures into the run directory.
    """

    run_dir: Path = Path("runs/demo")
    """Where the report and the pictures go."""
    questions: int = 16
    """Questions asked per task."""
    seed: int = 0
    """Seed of wordings and questions."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a generator, a baseline or a language model, as a config says.

    CONFIG is a YAML file or a shipped config: world (the generator), world-lora (the baseline),
    world-cloud and world-edge (the language models). Any field can be overridden:
    lorax-gen train CONFIG --help shows them. An interrupted run resumes with the same command, on
    another mesh too. Over several hosts, start the same command on each.
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config."""
    run_dir: Path | None = None
    """Where the run lives; default runs/<name of the config>."""


RunDir = Annotated[Path, tyro.conf.arg(help="Where the run lives.")]


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that are not here."""

    topology: str = "v5e:4x4"
    """TPU slice (v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4) or GPUs (gpu:8, gpu-a100:8, gpu-h200:8)."""
    utilisation: float = 0.4
    """Share of the devices' peak FLOPs at which the step is assumed to multiply."""
    output: Path | None = None
    """Also write the report as JSON to this new file."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tell whether a training run fits devices that are not here, and how long a step takes.

    For a TPU the real step is compiled for it (pip install 'lorax-gen[plan]'), for GPUs the memory
    is estimated. CONFIG and overrides are those of train; models are presets, such as llama3_8b, or
    directories. Exit code 1 when it does not fit.

    Example: lorax-gen plan paper --topology v5e:4x4 --edge qwen2_1_5b
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config."""
    target: Annotated[Target, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Target)


@dataclasses.dataclass(frozen=True)
class Specialize:
    """Read a task's prompt once and write a task card: a few hundred bytes that, merged into the
    edge model, stand for the prompt.

    Example: lorax-gen specialize "Look at the color of each thing : red=alpha , else=beta ."
    """

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """The system prompt; `-` reads it from standard input, `@FILE` from a file."""
    output: Path = Path("task.card.safetensors")
    """The card, a new file."""
    merged: Path | None = None
    """Also write the merged edge model into this new directory."""
    cloud: str = "world/cloud"
    """Cloud model: a directory or a hub name."""
    edge: str = "world/edge"
    """Edge model: a directory or a hub name."""
    generator: str = "world/generator"
    """Generator directory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the cloud model's parameters; bfloat16 on GPUs and TPUs."""
    cloud_int8: bool = False
    """Keep the cloud model's kernels in int8, half the bytes of bfloat16 (pip install
    'lorax-gen[int8]')."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue texts: with a task card, with a prompt in context, or with neither. A single text
    is shown as it is written.

    Examples:
      lorax-gen generate --card task.card.safetensors "apple :" "bell :"
      lorax-gen generate --model org/name --chat --temperature 0.7 --top-p 0.9 "Why is it so?"
    """

    questions: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION ...")
    ]
    """Texts to continue."""
    card: Path | None = None
    """A task card or a PEFT adapter directory, merged into the model first."""
    context: str = ""
    """A prompt put before every question, in the model's context; with --chat the system's turn."""
    chat: bool = False
    """Put each question into the tokenizer's chat template."""
    model: str = "world/edge"
    """The model that answers: a directory or a hub name."""
    generator: str = "world/generator"
    """Generator that the card was made with."""
    max_new_tokens: int = 16
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy; higher is more varied."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this probability."""
    seed: int = 0
    """Seed of what is drawn."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; it ends at the model's end of text in any case."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters; bfloat16 on GPUs and TPUs."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a task card, or a PEFT adapter, as what other programs load.

    merged: a model directory for transformers, vLLM and others, no LoRA left. peft: an adapter
    directory for peft, vLLM and others. gguf-lora: an adapter file for llama.cpp's --lora.

    Example: lorax-gen export task.card.safetensors --format peft --output adapter
    """

    artifact: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT")]
    """A task card, or a PEFT adapter directory."""
    format: Literal["merged", "peft", "gguf-lora"]
    """What to write."""
    output: Path
    """Where: a new directory, or for gguf-lora a new file."""
    edge: str = "world/edge"
    """Edge model that the artifact was made for."""
    generator: str = "world/generator"
    """Generator that the card was made with."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of a merged model's tensors; merged in float32, rounded once."""
    max_shard_size: str = "5GB"
    """Largest file of a merged model's tensors."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check that an artifact says the same in all its forms: gates, LoRA, merged, read again.

    Prints the largest difference of logits from the unmerged LoRA and the share of positions with
    the same likeliest token. Exit code 1 when a difference is beyond what the dtype explains.

    Example: lorax-gen verify task.card.safetensors
    """

    artifact: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT")]
    """A task card, a PEFT adapter directory, or a merged directory that export wrote."""
    edge: str = "world/edge"
    """Edge model that the artifact was made for."""
    generator: str = "world/generator"
    """Generator that the card was made with."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the edge model's parameters."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score models on tasks and print a table: methods by tasks, and what a question costs.

    TASK is world (the shipped world's tasks, the default), reasoning (the paper's eight
    benchmarks), the name of one of them such as arc_easy or hellaswag, or gpt4tools. With --run-dir
    the results of single items are kept as they come: an interrupted evaluation goes on with the
    same command.

    Modes of benchmarks: plain (the bare question), icl (behind solved shots), lora_gen (the edge
    specialised for each question by a prompt of its own) and its controls shuffled, empty, random;
    with --card, card. Of gpt4tools: full, request, lora_gen, lora_gen_shuffled.

    Examples:
      lorax-gen evaluate
      lorax-gen evaluate reasoning --edge org/name --modes plain icl --run-dir runs/base
      lorax-gen evaluate boolq piqa --data-dir DIR --cloud A --edge B --generator runs/x/released
    """

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TASK ...")] = (
        "world",
    )
    modes: tuple[str, ...] = ()
    """How questions are put; default plain, icl and lora_gen, or for gpt4tools full, request and
    lora_gen. The world always compares all methods."""
    cloud: str = "world/cloud"
    """Cloud model: a directory or a hub name."""
    edge: str = "world/edge"
    """Edge model: a directory or a hub name."""
    generator: str = "world/generator"
    """Generator directory."""
    card: Path | None = None
    """A task card or PEFT adapter directory, merged into the edge for mode card."""
    lora: str | None = None
    """The world only: a PEFT adapter directory, one LoRA of all tasks; the shipped one if the edge
    is the shipped one."""
    shots: int = 5
    """Solved examples in a prompt, for modes that have any."""
    limit: int | None = None
    """Questions of each benchmark, the first ones; all where it is not given."""
    data_dir: Path | None = None
    """Where data files lie, at any depth; else benchmarks are loaded from the hub."""
    run_dir: Path | None = None
    """Where results are kept: report.json, a CSV, and a JSONL of single items for each mode."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters; bfloat16 on GPUs and TPUs."""
    cloud_int8: bool = False
    """Keep the cloud model's kernels in int8, half the bytes of bfloat16 (pip install
    'lorax-gen[int8]')."""
    tokens_per_batch: int = 4096
    """Tokens that the device works on at a time; more on GPUs and TPUs."""
    max_new_tokens: int = 512
    """gpt4tools only: longest answer."""
    fsdp: int = 1
    """Devices that weights are split over; questions are split over these and what is left."""
    tensor: int = 1
    """Devices that heads and feed-forward width are split over."""
    split: Literal["unseen", "seen"] = "unseen"
    """The world only: tasks to ask about."""
    questions: int = 16
    """The world only: questions asked per task."""
    seed: int | None = None
    """Of shots, of wordings and of the controls; default: that of lm-evaluation-harness's shots,
    and 0 in the world."""


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Run lm-evaluation-harness (pip install 'lorax-gen[harness]') on our models.

    All arguments are its own; the model is called lorax_gen, and --model_args knows edge, card,
    prompt, cloud, generator, dtype and others.

    Example: lorax-gen lm-eval --model lorax_gen --model_args edge=org/name --tasks piqa
    """


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Specialize, tyro.conf.subcommand("specialize")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[LmEval, tyro.conf.subcommand("lm-eval")]
)
