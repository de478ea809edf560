"""`lorax-gen evaluate`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lorax_gen import documents, files
from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Count, Seed, Size
from lorax_gen.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lorax_gen.evaluation.answerers import System


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score models on tasks and print a table: methods by tasks, and the cost of a question.

    TASK is world (the shipped world's tasks, the default), reasoning (the paper's eight
    benchmarks), the name of one of them such as arc_easy or hellaswag, or gpt4tools. With --run-dir
    the result of each item is saved as it is computed: an interrupted evaluation resumes with the
    same command.

    Modes: plain (the edge reads only the question), icl (the prompt before it: solved shots, or the
    full instruction), lora_gen (only the question, with the LoRA generated from the prompt) and its
    controls shuffled (another task's prompt), empty and random; cloud_icl (icl by the cloud model);
    with --card, card; with --lora, lora.

    Examples:
      lorax-gen evaluate
      lorax-gen evaluate reasoning --edge org/name --modes plain icl --run-dir runs/base
      lorax-gen evaluate boolq piqa --data-dir DIR --cloud A --edge B --generator runs/x/released
    """

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TASK ...")] = (
        "world",
    )
    modes: tuple[str, ...] = ()
    """Modes to evaluate; default plain, icl and lora_gen, for world all but empty and random."""
    cloud: str = "world/cloud"
    """Cloud model: a directory or a hub name."""
    edge: str = "world/edge"
    """Edge model: a directory or a hub name."""
    generator: str = "world/generator"
    """Generator directory."""
    allow_other_models: bool = False
    """Accept a cloud or an edge model of the same shape that the generator was not trained with."""
    card: UserPath | None = None
    """A task card or PEFT adapter directory, merged into the edge for mode card."""
    lora: str | None = None
    """A PEFT adapter for all tasks, merged into the edge for mode lora; for world with the shipped
    edge, default the shipped one."""
    shots: Count = 5
    """Solved examples in a prompt, for modes with a prompt."""
    limit: Size | None = None
    """Evaluate the first so many questions of each benchmark; default all."""
    data_dir: UserPath | None = None
    """Directory of data files, at any depth; without it benchmarks are loaded from the hub."""
    run_dir: UserPath | None = None
    """Directory of the results: report.json, a CSV, and a JSONL of items for each mode."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters; bfloat16 on GPUs and TPUs."""
    cloud_int8: bool = False
    """Keep the cloud model's kernels in int8, half the bytes of bfloat16 (pip install
    'lorax-gen[int8]')."""
    tokens_per_batch: Size = 4096
    """Tokens processed at a time; use more on GPUs and TPUs."""
    max_new_tokens: Size = 512
    """gpt4tools only: most tokens of an answer."""
    bos: Literal["tokenizer", "yes", "no"] = "tokenizer"
    """Whether the edge's input begins with BOS; tokenizer follows the edge's tokenizer. The paper's
    scores, from lm-evaluation-harness 0.4.3, have none for LLaMA."""
    fsdp: Size = 1
    """Devices that weights are sharded over; questions are sharded over these and the remaining
    devices."""
    tensor: Size = 1
    """Devices that heads and feed-forward width are sharded over."""
    split: Literal["unseen", "seen"] = "unseen"
    """world only: tasks to evaluate."""
    questions: Size = 16
    """world only: questions per task."""
    seed: Seed | None = None
    """Seed of shots, wordings and controls; default that of lm-evaluation-harness for shots, and 0
    for world."""

    def run(self) -> int:
        world, run_dir = self.tasks == ("world",), self.run_dir
        if "world" in self.tasks and not world:
            raise UserError("world is evaluated by itself; leave out the other tasks, or it")
        if run_dir is not None and run_dir.exists():
            ours = is_report(run_dir / "report.json") if world else (run_dir / "items").is_dir()
            if not ours and not (run_dir.is_dir() and not any(run_dir.iterdir())):
                raise UserError(f"{run_dir} exists and is not an evaluation; choose another")
        return evaluate_world(self) if world else evaluate_real(self)


def is_report(path: files.AnyPath) -> bool:
    """Whether a file is a report of an evaluation; False for other files and missing ones."""
    try:
        return str(documents.read_json(path).get("format")).startswith("lorax-gen report ")
    except (UserError, OSError):
        return False


def load_system(command: Evaluate, names: Sequence[str], mesh: Mesh | None) -> System:
    """The models that the named answerers need."""
    import lorax_gen
    from lorax_gen.artifacts.export import is_adapter, lora_of
    from lorax_gen.evaluation.answerers import ANSWERERS, System
    from lorax_gen.mesh.sharding import tree_shardings

    needed = {part for name in names if name in ANSWERERS for part in ANSWERERS[name][1]}
    if "card" in needed and command.card is None:
        raise UserError("mode card needs --card, a task card or a PEFT adapter directory")
    shardings = functools.partial(tree_shardings, mesh=mesh) if mesh else None
    load = functools.partial(lorax_gen.load_model, dtype=command.dtype, shardings=shardings)
    generator = functools.cache(
        lambda: lorax_gen.load_generator(
            command.generator, allow_other_models=command.allow_other_models
        )
    )
    bos = {"tokenizer": None, "yes": True, "no": False}[command.bos]
    edge, lora, card = load(command.edge, bos=bos), None, None
    if command.lora is not None and "lora" in needed:
        lora = lorax_gen.load_adapter(command.lora, edge.config)
    if command.card is not None and "card" in needed:
        card, *_ = lora_of(command.card, edge, None if is_adapter(command.card) else generator())
    return System(
        edge,
        load(command.cloud, in_int8=command.cloud_int8) if "cloud" in needed else None,
        generator() if "generator" in needed else None,
        lora=lora,
        card=card,
    )


def evaluate_world(command: Evaluate) -> int:
    from lorax_gen.data.config import WorldConfig
    from lorax_gen.evaluation import world
    from lorax_gen.evaluation.report import save_report
    from lorax_gen.evaluation.tables import print_report, progress
    from lorax_gen.mesh.sharding import serving_mesh

    if command.lora is None and command.edge == "world/edge":
        command = dataclasses.replace(command, lora="world/lora")
    usual = [name for name in world.NAMES if name != "lora" or command.lora is not None]
    names, mesh = command.modes or usual, serving_mesh(command.fsdp, command.tensor)
    report = world.evaluate_world(
        load_system(command, names, mesh),
        WorldConfig(),
        names,
        split=command.split,
        questions=command.questions,
        seed=command.seed or 0,
        mesh=mesh,
        path=command.run_dir and command.run_dir / "report.json",
        progress=progress,
    )
    print_report(report)
    if command.run_dir is not None:
        save_report(report, command.run_dir)
    return 0


def evaluate_real(command: Evaluate) -> int:
    from tqdm import tqdm

    from lorax_gen.data.agent import load_agent
    from lorax_gen.data.benchmarks import REASONING, find_benchmark
    from lorax_gen.evaluation import suite
    from lorax_gen.evaluation.tables import print_report
    from lorax_gen.mesh.sharding import serving_mesh

    if command.limit is not None and command.limit < 1:
        raise UserError(f"limit={command.limit}: choose 1 or more, or leave it out for all")
    if command.tokens_per_batch < 1:
        raise UserError(f"tokens_per_batch={command.tokens_per_batch}: choose 1 or more")
    groups = {"reasoning": REASONING}
    tasks = list(dict.fromkeys(n for task in command.tasks for n in groups.get(task, (task,))))
    agent = tasks == ["gpt4tools"]
    if "gpt4tools" in tasks and not agent:
        raise UserError("gpt4tools is evaluated by itself; leave out the other tasks, or it")
    if agent and command.data_dir is None:
        raise UserError("gpt4tools has no copy on the hub; give --data-dir with its files")
    if not agent:
        for name in tasks:
            find_benchmark(name)
    usual = ("icl", "plain", "lora_gen") if agent else ("plain", "icl", "lora_gen")
    names = command.modes or (*usual, *(("card",) if command.card else ()))
    mesh = serving_mesh(command.fsdp, command.tensor)
    system = load_system(command, names, mesh)
    options = {
        "seed": command.seed,
        "run_dir": command.run_dir,
        "tokens_per_batch": command.tokens_per_batch,
        "mesh": mesh,
        "bar": tqdm(unit="question", leave=False, disable=not sys.stderr.isatty()),
    }
    if agent:
        assert command.data_dir is not None  # see above
        items = load_agent("test", command.data_dir)[: command.limit]
        options["max_new_tokens"] = command.max_new_tokens
        print_report(suite.evaluate_agent_suite(system, items, names, **options))
        return 0
    report = suite.evaluate_suite(
        system,
        tasks,
        names,
        shots=command.shots,
        limit=command.limit,
        directory=command.data_dir,
        **options,
    )
    print_report(report)
    return 0
