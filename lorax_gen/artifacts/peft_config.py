"""adapter_config.json of PEFT: which modules an adapter has, and the rank and scale of each.

The rules are those of peft (`check_target_module_exists` and `get_pattern_key`):

    target_modules       a list of names, each the end of a module's name after a dot, or its full
                         name; a regular expression of full names; or 'all-linear'
    exclude_modules      a list or a regular expression likewise, of what is excepted
    layers_to_transform  indices of layers, for a list of targets; layers_pattern: regular
                         expressions of the part before the index
    rank_pattern,        regular expressions of the ends of names -> r or lora_alpha of these
    alpha_pattern        modules; the first that fits

An option that would change what the adapter computes, known or not, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct

from lorax_gen import documents
from lorax_gen.errors import UserError

Rank = Annotated[int, Meta(ge=1, le=2**20)]
Alpha = Annotated[float, Meta(gt=0, le=1e30)]
Layer = Annotated[int, Meta(ge=0, le=2**20)]


class AdapterConfig(Struct):
    """The options that are used. None is what a missing option is."""

    peft_type: Literal["LORA"]
    target_modules: list[str] | str
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[Layer] | Layer | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    # Of training or of the file: they do not change what the adapter computes.
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool | None = None
    lora_dropout: Annotated[float, Meta(ge=0, le=1)] | None = None
    auto_mapping: Any = None
    peft_version: Any = None
    runtime_config: Any = None
    qalora_group_size: Any = None
    megatron_core: Any = None
    loftq_config: Any = None
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None


# Any other option must be off. These have values of their own that are: others of
# init_lora_weights, such as pissa and olora, change the base model's kernels too.
HARMLESS = {
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
    "bias": (None, "none"),
}
OFF: tuple[Any, ...] = (None, False, [], {}, "")


class Module(NamedTuple):
    """What an adapter has for one module."""

    rank: int
    scale: float  # of B A


def read_config(raw: dict[str, Any], where: str) -> AdapterConfig:
    """The config in a JSON object.

    Raises UserError where it is not of a plain LoRA, or a value has a wrong type or range.
    """
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{where} is of a {raw.get('peft_type')} adapter; expected LORA")
    for name, value in raw.items():
        if name in AdapterConfig.__struct_fields__:
            continue
        off = HARMLESS.get(name, OFF)
        if not any(value is each or (value == each and value.__class__ is each.__class__)
                   for each in off):  # fmt: skip
            raise UserError(f"{where} has {name}={value!r}, which is not a plain LoRA")
    config = documents.convert(raw, AdapterConfig, where)
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform is not None or config.layers_pattern is not None
    ):
        raise UserError(
            f"{where}: target_modules is a string, for which peft has no layers_to_transform and "
            "layers_pattern; remove them, or list the names of modules"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise UserError(f"{where}: layers_pattern needs layers_to_transform")
    return config


def adapted_modules(
    config: AdapterConfig, modules: Sequence[str], layers: int, where: str
) -> dict[str, Module]:
    """The adapted modules of a model and the rank and scale of each.

    Args:
      modules: names of the model's kernels in transformers; layers: its layers.

    Raises UserError where an option names something that the model does not have, or a pattern
    applies to no adapted module.
    """
    try:
        targets = [name for name in modules if _is_target(config, name)]
        _check_all_match(config, modules, layers, where)
        if not targets:
            raise UserError(
                f"{where}: target_modules is {config.target_modules!r}, which fits no kernel of "
                "this model; is the adapter for another model?"
            )
        ranks = _by_pattern(config.rank_pattern, config.r, targets, f"{where}: rank_pattern")
        alphas = _by_pattern(
            config.alpha_pattern, config.lora_alpha, targets, f"{where}: alpha_pattern"
        )
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where} has an invalid regular expression ({error})") from None
    root = 0.5 if config.use_rslora else 1
    return {
        name: Module(rank, alpha / rank**root)
        for name, rank, alpha in zip(targets, ranks, alphas, strict=True)
    }


def _is_target(config: AdapterConfig, name: str) -> bool:
    excluded = config.exclude_modules
    if excluded and _names_module(excluded, name):
        return False
    if isinstance(config.target_modules, str):
        everything = config.target_modules.lower() == "all-linear"
        return everything or _names_module(config.target_modules, name)
    return _names_module(config.target_modules, name) and _has_layer(config, name)


def _names_module(names: Iterable[str] | str, module: str) -> bool:
    """Whether a regular expression fits a module's name, or one of a list is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _has_layer(config: AdapterConfig, module: str) -> bool:
    """Whether `layers_to_transform` has the layer of a module."""
    if config.layers_to_transform in (None, []):
        return True
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module):
            return int(match["index"]) in _layers(config)
    return False


def _layers(config: AdapterConfig) -> list[int]:
    layers = config.layers_to_transform
    return layers if isinstance(layers, list) else [] if layers is None else [layers]


def _check_all_match(
    config: AdapterConfig, modules: Sequence[str], layers: int, where: str
) -> None:
    """Raises UserError for a target that no kernel is, and a layer that the model does not have."""
    names = config.target_modules
    for name in names if isinstance(names, list) else ():
        if not any(_names_module([name], module) for module in modules):
            raise UserError(
                f"{where}: target_modules has {name!r}, which is no kernel of this model that can "
                "be adapted; is the adapter for another model?"
            )
    for layer in _layers(config):
        if layer >= layers:
            raise UserError(
                f"{where}: layers_to_transform has layer {layer}, but the model has {layers} "
                "layers, from 0; is the adapter for another model?"
            )


def _by_pattern(
    patterns: dict[str, Any] | None, default: Any, modules: Sequence[str], where: str
) -> list[Any]:
    """For each module the value of the first pattern that fits the end of its name."""
    patterns = patterns or {}
    values, unused = [], dict(patterns)
    for module in modules:
        fitting = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
        key = next(fitting, None)
        if key is None:
            values.append(default)
        else:
            values.append(patterns[key])
            unused.pop(key, None)
    if unused:
        raise UserError(
            f"{where} has {next(iter(unused))!r}, which applies to no adapted module; correct or "
            "remove it"
        )
    return values
