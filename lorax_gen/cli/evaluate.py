"""`lorax-gen evaluate`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorax_gen import assets, documents, files
from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Count, Seed, Size
from lorax_gen.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lorax_gen.artifacts.baseline import Baseline
    from lorax_gen.artifacts.generator import Generator
    from lorax_gen.evaluation.answerers import Answerer, System
    from lorax_gen.frames import Frame
    from lorax_gen.models.model import Model


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score models on tasks and print a table: methods by tasks, and the cost of a question.

    TASK is world (the shipped world's tasks, the default), gpt4tools, or any of these: reasoning
    (the paper's eight benchmarks), the name of one of them such as arc_easy or hellaswag, a file of
    rows (.jsonl, .json, .parquet: loss, choice accuracy, exact match and ROUGE-L), a .yaml that
    describes a benchmark. With --run-dir the result of each item is saved as it is computed: an
    interrupted evaluation resumes with the same command.

    Modes: plain (the edge reads only the question), icl (the prompt before it: solved shots, or the
    full instruction), lora_gen (only the question, with the LoRA generated from the prompt) and its
    controls shuffled (another task's prompt), empty and random; cloud_icl (icl by the cloud model);
    with --card, card; with --lora, lora; each --baseline is a mode called as its method.

    Examples:
      lorax-gen evaluate
      lorax-gen evaluate arc_easy mine.jsonl --edge org/name --run-dir runs/base
      lorax-gen evaluate boolq piqa --data-dir DIR --cloud A --edge B --generator runs/x/released
    """

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TASK ...")] = (
        "world",
    )
    modes: tuple[str, ...] = ()
    """Modes to evaluate; default plain and icl, lora_gen with --generator or the shipped models,
    and card, lora and baselines where they are given; for world also cloud_icl and shuffled."""
    cloud: str | None = None
    """Cloud model: a directory or a hub name; default the one that the generator names."""
    edge: str | None = None
    """Edge model: a directory or a hub name; default the one that the card or the generator names.
    """
    generator: str | None = None
    """Generator directory; default the one that the card names. Without a card, a generator and a
    model the three shipped ones are evaluated."""
    allow_other_models: bool = False
    """Accept a cloud or an edge model of the same shape that the generator was not trained with."""
    card: Annotated[tuple[tuple[UserPath, ...], ...], tyro.conf.UseAppendAction] = ()
    """Task cards or PEFT adapter directories, each merged into the edge for mode card. Several have
    a row each, called as the file."""
    lora: str | None = None
    """A PEFT adapter for all tasks, merged into the edge for mode lora; for world with the shipped
    edge, default the shipped one."""
    baseline: Annotated[tuple[tuple[UserPath, ...], ...], tyro.conf.UseAppendAction] = ()
    """Released baselines that are no adapters of PEFT (loramoe, mixlora ...), each a mode of its
    own; several of one method are called METHOD:DIRECTORY."""
    lorahub: tuple[UserPath, ...] = ()
    """PEFT adapters that LoraHub sums anew for each task of the world, fitted to 5 solved examples:
    mode lorahub. For other tasks, lorax-gen lorahub makes an adapter for --lora."""
    shots: Count = 5
    """Solved examples in a prompt, for modes with a prompt."""
    limit: Size | None = None
    """Evaluate so many questions of each benchmark, the first ones, and rows of each file, evenly
    from its tasks; default all."""
    columns: tuple[str, ...] = ()
    """FIELD=COLUMN where files of rows call a field otherwise: input=question output=label."""
    frame: str | None = None
    """How the edge reads an input: plain, io (Input: ... Output:), chat (the edge's chat template)
    or a text with {input}; default that of the card, the generator or a merged edge, else plain."""
    raw: bool = False
    """Read inputs as they are, without that frame."""
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
    max_new_tokens: Size | None = None
    """Most tokens of an answer to a row, default as many as the longest correct output has, up to
    512; and of one of gpt4tools, default 512."""
    timed: Count | None = None
    """Questions whose latency is measured for each mode, 0 for none; default 50, of gpt4tools
    20."""
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
        if world or self.tasks == ("gpt4tools",):
            for name in ("columns", "frame", "raw"):
                if getattr(self, name):
                    raise UserError(f"--{name} is for benchmarks and rows, not {self.tasks[0]}")
        for part in ("card", "lora"):
            if getattr(self, part) and self.modes and part not in self.modes:
                raise UserError(
                    f"--{part} is given, but --modes has no {part}; add it, or leave --{part} out"
                )
        if self.lorahub and not world:
            raise UserError(
                "--lorahub is for world; for other tasks lorax-gen lorahub makes an adapter of "
                "solved examples, which is given as --lora"
            )
        for path in self.baselines:
            require_baseline(path)
        return evaluate_world(self) if world else evaluate_real(self)

    @property
    def baselines(self) -> list[files.AnyPath]:
        return [path for paths in self.baseline for path in paths]

    @property
    def card_names(self) -> dict[str, files.AnyPath]:
        """The cards by the names of their files."""
        found: dict[str, files.AnyPath] = {}
        for path in (path for paths in self.card for path in paths):
            name = path.name.removesuffix(".safetensors").removesuffix(".card")
            if name in found:
                raise UserError(f"two cards are called {name}; rename one")
            found[name] = path
        return found


def require_baseline(path: files.AnyPath) -> None:
    """Raises UserError where a path is no baseline, and says what it is."""
    from lorax_gen.artifacts.baseline import is_baseline
    from lorax_gen.artifacts.export import is_adapter

    if is_adapter(path):
        raise UserError(f"{path} is a PEFT adapter; give it as --lora")
    if not is_baseline(path):
        raise UserError(f"{path} has no baseline.json; give the directory that training released")


def is_report(path: files.AnyPath) -> bool:
    """Whether a file is a report of an evaluation; False for other files and missing ones."""
    try:
        return str(documents.read_json(path).get("format")).startswith("lorax-gen report ")
    except (UserError, OSError):
        return False


# --- models and modes ----------------------------------------------------------------------------


Models = dict[str, str | files.AnyPath | None]  # by role: generator, cloud, edge


def models_of(command: Evaluate) -> Models:
    """The generator, the cloud and the edge by role: the given ones, and those that the cards, the
    generator or else the baselines name. Where nothing at all is given they are the shipped ones.
    """
    from lorax_gen.artifacts.lookup import SHIPPED, find_models, find_system

    cards = command.card_names.values()
    given: dict[str, Any] = {
        "generator": command.generator,
        "cloud": command.cloud,
        "edge": command.edge,
    }
    for path in command.baselines if not cards and command.generator is None else ():
        for role, name in find_models(
            path, need=("edge",) if given["edge"] is None else ()
        ).items():
            given[role] = given[role] or name
    if not cards and command.generator is None:
        ours = all(given[role] in (None, SHIPPED[role]) for role in ("cloud", "edge"))
        return {**given, **SHIPPED} if ours else {**given, "edge": given["edge"] or SHIPPED["edge"]}
    if not cards:
        return find_system(**given, need=("edge",))._asdict()
    found = [find_system(card, **given, need=("edge",)) for card in cards]
    if len({str(each.edge) for each in found}) > 1:
        raise UserError("the cards are of different edge models; evaluate one edge at a time")
    return found[0]._asdict()


def modes_of(command: Evaluate, models: Models, usual: Sequence[str]) -> list[str]:
    """The modes to evaluate: those asked for, or those of `usual` that what was given suffices for;
    of several cards each is a mode.

    Raises UserError where a part that a mode needs was not given.
    """
    from lorax_gen.evaluation.answerers import ANSWERERS

    cards = command.card_names
    there = {**models, "lora": command.lora, "card": cards}
    options = {"generator": "--generator", "cloud": "--cloud", "lora": "--lora, a PEFT adapter",
               "card": "--card, a task card or a PEFT adapter directory"}  # fmt: skip
    names = list(command.modes)
    for name in names:
        needs = ANSWERERS[name][1] if name in ANSWERERS else ()
        missing = [options[part] for part in needs if not there[part]]
        if missing:
            raise UserError(f"mode {name} needs {' and '.join(missing)}")
    if not names:
        parts = {name: ANSWERERS[name][1] for name in dict.fromkeys((*usual, "card", "lora"))}
        names = [name for name, needs in parts.items() if all(there[part] for part in needs)]
        if command.generator and not (cards or there["cloud"]):
            raise UserError("--generator needs --cloud: the cloud that it names is not here")
        if cards and command.generator is None:  # a card needs no cloud, which may be large
            names = [name for name in names if "generator" not in parts[name]]
    several = [f"card:{card}" for card in cards] if len(cards) > 1 else ["card"]
    return [each for name in names for each in (several if name == "card" else [name])]


def load_system(
    command: Evaluate, models: Models, names: Sequence[str], mesh: Mesh | None
) -> System:
    """The models that the named answerers need, and the frame that is stored in them.

    Raises UserError where cards have different frames, and no option says which to use.
    """
    import lorax_gen
    from lorax_gen.artifacts.baseline import load_baseline
    from lorax_gen.artifacts.export import is_adapter, lora_of
    from lorax_gen.evaluation.answerers import ANSWERERS, System
    from lorax_gen.frames import read_frame
    from lorax_gen.mesh.sharding import tree_shardings

    needed = {part for name in names if name in ANSWERERS for part in ANSWERERS[name][1]}
    shardings = functools.partial(tree_shardings, mesh=mesh) if mesh else None
    load = functools.partial(lorax_gen.load_model, dtype=command.dtype, shardings=shardings)

    @functools.cache
    def generator() -> Generator:
        assert models["generator"] is not None  # or no mode would need it
        return lorax_gen.load_generator(
            models["generator"], allow_other_models=command.allow_other_models
        )

    bos = {"tokenizer": None, "yes": True, "no": False}[command.bos]
    assert models["edge"] is not None
    edge, lora, loras = load(models["edge"], bos=bos), None, {}
    frames, in_context = [edge.frame], set()
    if command.lora is not None and "lora" in needed:
        lora, provenance, _ = lora_of(assets.resolve(command.lora), edge)
        frames.append(read_frame(provenance.get("frame", {})))
        in_context |= {"lora"} if provenance.get("in_context") else set()
    several = len(command.card_names) > 1
    if any(name.startswith("card") for name in names):
        for name, path in command.card_names.items():
            own = None if is_adapter(path) else generator()
            loras[name], provenance, _ = lora_of(path, edge, own)
            frames.append(read_frame(provenance.get("frame", {})))
            if provenance.get("in_context"):
                in_context.add(f"card:{name}" if several else "card")
    if command.generator is not None or "generator" in needed:
        frames.append(generator().frame)
    baselines = [load_baseline(path) for path in command.baselines]
    frames += [baseline.frame for baseline in baselines]
    reads = "cloud" in needed or any(baseline.cloud is not None for baseline in baselines)
    named = models["cloud"] if reads else None
    cloud = None if named is None else load(named, in_int8=command.cloud_int8)
    return System(
        edge,
        cloud,
        generator() if "generator" in needed else None,
        lora=lora,
        card=None if several else next(iter(loras.values()), None),
        cards=loras if several else {},
        frame=frame_of(command, frames, edge.tokenizer),
        others=answerers_of(command, baselines, edge, cloud),
        in_context=in_context,
    )


def with_others(command: Evaluate, names: list[str], system: System) -> list[str]:
    """The modes, baselines among them: all of these unless --modes says which.

    Raises UserError for one that was given and not asked for.
    """
    if not command.modes:
        return [*names, *system.others]
    if left := [name for name in system.others if name not in names]:
        raise UserError(
            f"a baseline is given, but --modes has no {left[0]}; add it, or leave the baseline out"
        )
    return names


def answerers_of(
    command: Evaluate, baselines: Sequence[Baseline], edge: Model, cloud: Model | None
) -> dict[str, Answerer]:
    """The answerers of baselines by their names: that of the method or, of several of one method,
    `METHOD:DIRECTORY`; and LoraHub."""
    from lorax_gen.recipes.registry import answerer_of

    methods, found = [baseline.method for baseline in baselines], dict[str, Any]()
    for path, baseline in zip(command.baselines, baselines, strict=True):
        made = answerer_of(baseline, edge, cloud)
        if methods.count(baseline.method) > 1:
            own = path.parent.name if path.name.startswith("released") else path.name
            name = f"{baseline.method}:{own or path.name}"
            made = dataclasses.replace(made, name=name, label=f"{made.label} ({own or path.name})")
        if made.name in found:
            raise UserError(f"two baselines are called {made.name}; rename a directory")
        found[made.name] = made
    if command.lorahub:
        from lorax_gen.recipes.lorahub import load_loras, make_lorahub

        names = [str(path) for path in command.lorahub]
        hub = make_lorahub(edge, load_loras(command.lorahub, edge)[0], names)
        found[hub.name] = hub
    return found


def frame_of(command: Evaluate, frames: Sequence[Frame], tokenizer: Any) -> Frame:
    """How the edge reads an input: as an option says, or in the frame that is stored in what is
    evaluated, `frames`."""
    from lorax_gen.frames import PLAIN, make_frame

    if command.raw and command.frame is not None:
        raise UserError("--frame and --raw exclude each other; leave one out")
    if command.raw:
        return PLAIN
    if command.frame is not None:
        return make_frame(command.frame, tokenizer)
    stored = list(dict.fromkeys(frame for frame in frames if frame != PLAIN))
    if len(stored) > 1:
        texts = " and ".join(repr(frame.template) for frame in stored)
        raise UserError(f"what is evaluated has different frames, {texts}; choose one by --frame")
    return stored[0] if stored else PLAIN


# --- tasks ---------------------------------------------------------------------------------------


def evaluate_world(command: Evaluate) -> int:
    from lorax_gen.data.config import WorldConfig
    from lorax_gen.evaluation import world
    from lorax_gen.evaluation.report import save_report
    from lorax_gen.evaluation.tables import print_report, progress
    from lorax_gen.mesh.sharding import serving_mesh

    models = models_of(command)
    if command.lora is None and models["edge"] == "world/edge":
        command = dataclasses.replace(command, lora="world/lora")
    names = modes_of(command, models, world.NAMES)
    mesh = serving_mesh(command.fsdp, command.tensor)
    system = load_system(command, models, names, mesh)
    report = world.evaluate_world(
        system,
        WorldConfig(),
        with_others(command, names, system),
        split=command.split,
        questions=command.questions,
        seed=command.seed or 0,
        mesh=mesh,
        path=command.run_dir and command.run_dir / "report.json",
        progress=progress,
        **timing(command),
    )
    print_report(report)
    if command.run_dir is not None:
        save_report(report, command.run_dir)
    return 0


def evaluate_real(command: Evaluate) -> int:
    from tqdm import tqdm

    from lorax_gen.data.agent import load_agent
    from lorax_gen.data.benchmarks import REASONING
    from lorax_gen.evaluation import suite
    from lorax_gen.evaluation.tables import print_report
    from lorax_gen.mesh.sharding import serving_mesh

    groups = {"reasoning": REASONING}
    names = list(dict.fromkeys(n for task in command.tasks for n in groups.get(task, (task,))))
    agent = names == ["gpt4tools"]
    if "gpt4tools" in names and not agent:
        raise UserError("gpt4tools is evaluated by itself; leave out the other tasks, or it")
    if agent and command.data_dir is None:
        raise UserError("gpt4tools has no copy on the hub; give --data-dir with its files")
    tasks = [] if agent else [suite.find_task(name, command.columns) for name in names]
    if command.columns and not any(isinstance(task, suite.RowFile) for task in tasks):
        raise UserError("--columns are those of files of rows, and no task is one; leave it out")
    models = models_of(command)
    modes = modes_of(
        command, models, ("icl", "plain", "lora_gen") if agent else ("plain", "icl", "lora_gen")
    )
    mesh = serving_mesh(command.fsdp, command.tensor)
    system = load_system(command, models, modes, mesh)
    modes = with_others(command, modes, system)
    options = {
        "seed": command.seed,
        "run_dir": command.run_dir,
        "tokens_per_batch": command.tokens_per_batch,
        "mesh": mesh,
        "bar": tqdm(unit="question", leave=False, disable=not sys.stderr.isatty()),
        **timing(command),
    }
    if agent:
        assert command.data_dir is not None  # see above
        items = load_agent("test", command.data_dir)[: command.limit]
        options["max_new_tokens"] = command.max_new_tokens or 512
        print_report(suite.evaluate_agent_suite(system, items, modes, **options))
        return 0
    report = suite.evaluate_suite(
        system,
        tasks,
        modes,
        shots=command.shots,
        limit=command.limit,
        directory=command.data_dir,
        frame=system.frame,
        max_new_tokens=command.max_new_tokens,
        **options,
    )
    print_report(report)
    return 0


def timing(command: Evaluate) -> dict[str, int]:
    """How many questions are timed, where it was said."""
    return {} if command.timed is None else {"timed": command.timed}
