"""The run configuration: typed settings from a YAML file and `section.name=value` words of the command line.

    config = load("run.yaml", ["optim.lr=1e-4", "train.epochs=3"])

Every setting is declared once, below, with its type, default, limits and one line of help. Scalars are read
by the declared type and not by YAML's guesses: `1e-4` is a float, `precision: no` is the word "no", and
`steps: true` is refused. All mistakes are reported together, each with file, line and the nearest valid name.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """One or more settings are wrong. `problems` holds one line for each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def _setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with a line of help and limits: low and high may be reached, above and below may not."""
    limits = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata={"doc": doc} | {k: v for k, v in limits.items() if v is not None})


@dataclass(frozen=True)
class _Section:
    """Checks types and limits whichever way a section is made, so that no ill-typed default goes unseen."""

    def __post_init__(self) -> None:
        problems = []
        for f in fields(self):
            problem = _value_problem(f, _kind(type(self), f.name), getattr(self, f.name))
            if problem:
                problems.append(f"{type(self).__name__}.{f.name}: {problem}")
        if problems:
            raise ConfigError(problems)


# The settings that a model has besides those of all, and their values where `null` is given or nothing. The models'
# constructors have the same defaults.
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "compact": {
        "backbone": "tf_efficientnet_lite0",
        "text_encoder": "minilm",
        "freeze_encoders": True,
        "image_size": 224,
        "dim": 128,
        "layers": 2,
    },
    "caris": {
        "backbone": "swin_base_patch4_window7_224.ms_in22k",
        "backbone_weights": None,
        "text_encoder": "bert-base-uncased",
        "freeze_encoders": False,
        "image_size": 448,
        "dim": 256,
        "layers": 6,
        "keep_end": True,
        "gradient_checkpointing": False,
    },
    "clipseg": {"backbone": "CIDAS/clipseg-rd64-refined", "freeze_encoders": True, "image_size": 352},
}


@dataclass(frozen=True)
class ModelConfig(_Section):
    name: str = _setting("compact", "architecture, as known to aml.models.build_model: compact, caris, clipseg")
    backbone: str | None = _setting(None, "image encoder: a timm model; caris: a timm Swin; clipseg: a folder")
    backbone_weights: str | None = _setting(None, "caris: file of Swin weights to start from, instead of timm's")
    text_encoder: str | None = _setting(None, "'minilm' (embedded), a folder that transformers reads; caris: a BERT")
    pretrained: bool = _setting(True, "start the encoders from pretrained weights")
    freeze_encoders: bool | None = _setting(None, "leave the encoders as they are: right for small data and CPUs")
    image_size: int | None = _setting(None, "side of the square input image, in pixels", low=32, high=4096)
    max_tokens: int = _setting(20, "longest sentence in tokens, [CLS] and [SEP] included", low=3, high=512)
    keep_end: bool | None = _setting(None, "caris: a sentence cut to max_tokens keeps its [SEP]; false: as released")
    dim: int | None = _setting(None, "width of the decoder, a multiple of 64", low=64)
    layers: int | None = _setting(None, "transformer layers over pixels and words", low=1)
    gradient_checkpointing: bool | None = _setting(None, "caris: compute activations again to save memory")

    def __post_init__(self) -> None:
        if self.name in MODEL_DEFAULTS:  # otherwise `build_model` says which there are
            own = MODEL_DEFAULTS[self.name]
            for name, value in own.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)  # the way to set a field of a frozen class
            known = [*own, "name", "pretrained", "max_tokens"]
            foreign = [f.name for f in fields(self) if f.name not in known and getattr(self, f.name) is not None]
            if foreign:
                raise ConfigError([f"model.{name}: {self.name} has no such setting; leave it out" for name in foreign])
        super().__post_init__()

    def options(self) -> dict[str, Any]:
        """What `build_model` takes."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class DataConfig(_Section):
    root: str = _setting("", "folder with annotations in the REFER layout; the same as --data")
    dataset: str = _setting("refcoco", "refcoco, refcoco+, refcocog, grefcoco, rrsisd, union, or several a(unc),b(umd)")
    split_by: str | None = _setting(None, "which refs(<split_by>) to read; null = the only one there")
    images: str | None = _setting(None, "folder of the images; null = <root>/[images/]train2014")
    skip: str | None = _setting(None, "file that names images to leave out, as aml data check --bad writes it")
    field: Literal["sent", "raw"] = _setting("sent", "which text of an annotation is the sentence")
    resize: Literal["squash", "letterbox"] = _setting("squash", "to a square: as published, or keeping the shape")
    augment: bool = _setting(True, "vary colour, scale and position; false lets frozen encoders see each image once")


# Where `null` is given or nothing. "paper" and "released" reproduce; docs/alignment.md says why not to train with them.
_DEFAULT_ALIGNMENT: dict[str, Any] = {
    "strategy": "loss",
    "projection": "trained",
    "words": "words",
    "normalize": True,
    "softmax": False,
    "quantile": 0.25,
    "protect_target": True,
    "max_dropped": 0.5,
    "dice_weight": 1.0,
    "background_weight": 1.0,
    "target_weight": 1.0,
    "warmup": 0.1,
}
_BY_FIXED_LIMIT: dict[str, Any] = {
    "softmax": True,
    "quantile": None,
    "threshold": 0.4,
    "protect_target": False,
    "max_dropped": 1.0,
    "warmup": 0.0,
}
ALIGNMENT_PRESETS: dict[str, dict[str, Any]] = {
    "default": _DEFAULT_ALIGNMENT,
    "paper": _DEFAULT_ALIGNMENT | _BY_FIXED_LIMIT | {"strategy": "image", "projection": "gaussian"},
    "released": _DEFAULT_ALIGNMENT
    | _BY_FIXED_LIMIT
    | {"strategy": "released", "projection": "linear", "words": "all", "normalize": False}
    | {"dice_weight": 0.0, "background_weight": 0.9, "target_weight": 1.1},
}


@dataclass(frozen=True)
class AlignmentConfig(_Section):
    """A setting that is null has the value of the preset in ALIGNMENT_PRESETS."""

    preset: Literal["default", "paper", "released"] | None = _setting(
        None, "values of what is null below; null: released for that strategy, else default"
    )
    strategy: Literal["none", "loss", "image", "released", "random", "easiest", "random_blocks"] | None = _setting(
        None, "loss: leave out badly aligned pixels; image: blocks"
    )
    projection: Literal["trained", "gaussian", "shared", "linear", "model", "none"] | None = _setting(
        None, "space of the map; gaussian: paper, linear: released, model: its own"
    )
    dim: int = _setting(128, "common width of the trained projection", low=1)
    words: Literal["words", "attended", "all"] | None = _setting(
        None, "what a pixel may match; attended: [CLS], [SEP] too; all: padding too"
    )
    normalize: bool | None = _setting(None, "compare directions of features, not lengths")
    softmax: bool | None = _setting(None, "softmax over the words before their maximum")
    scale: float = _setting(1.0, "factor on the similarities, before a softmax")
    quantile: float | None = _setting(None, "leave out below this quantile of a sample's map", low=0, below=1)
    threshold: float | None = _setting(None, "leave out below this similarity, instead of a quantile")
    protect_target: bool | None = _setting(None, "never leave out a pixel of the target")
    drop_ratio: float = _setting(0.25, "image: share of the blocks with weak pixels that is dropped", low=0, high=1)
    block_size: int = _setting(32, "image: side of a block, in pixels", low=1)
    max_dropped: float | None = _setting(None, "image: at most this share of all blocks is dropped", low=0, high=1)
    bce_weight: float = _setting(1.0, "weight of the binary cross entropy", low=0)
    dice_weight: float | None = _setting(None, "weight of the Dice loss", low=0)
    background_weight: float | None = _setting(None, "of background pixels in the cross entropy", low=0)
    target_weight: float | None = _setting(None, "of target pixels in the cross entropy", low=0)
    aux_weight: float = _setting(0.1, "weight of the loss that trains the projection", low=0)
    aux_into_encoders: bool = _setting(False, "let that loss train the encoders, too")
    warmup: float | None = _setting(None, "share of all steps before anything is left out", low=0, high=1)

    def __post_init__(self) -> None:
        preset = self.preset or ("released" if self.strategy == "released" else "default")
        values = ALIGNMENT_PRESETS.get(preset, {})
        if self.quantile is not None and self.threshold is not None:
            raise ConfigError(["alignment.quantile, alignment.threshold: give one of them"])
        if self.quantile is not None or self.threshold is not None:
            values = {name: value for name, value in values.items() if name not in ("quantile", "threshold")}
        for name, value in ({"preset": preset} | values).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()


@dataclass(frozen=True)
class OptimConfig(_Section):
    lr: float = _setting(1e-3, "full learning rate (encoders: a tenth); falls as (1 - t) ** 0.9", above=0)
    weight_decay: float = _setting(0.01, "decay of weight matrices (none for norms and biases)", low=0)
    warmup: float = _setting(0.05, "share of all steps over which the rate rises linearly", low=0, below=1)
    warmup_steps: int | None = _setting(None, "the same as a number of steps, instead of `warmup`", low=0)
    full_rate_first: bool = _setting(False, "step 0 at the full rate, before the warm-up: as the released program")
    clip_norm: float = _setting(1.0, "gradients are scaled down to this norm", above=0)


@dataclass(frozen=True)
class TrainConfig(_Section):
    out: str = _setting("runs/aml", "run directory: log, checkpoints, configuration; the same as --out")
    epochs: int = _setting(20, "passes over the training objects", low=1)
    steps: int | None = _setting(None, "end after so many optimizer steps instead of after `epochs`", low=1)
    batch_size: int = _setting(8, "samples per device and forward pass", low=1)
    accumulate: int = _setting(1, "forward passes per optimizer step", low=1)
    precision: Literal["no", "bf16", "fp16"] = _setting("no", "mixed: bf16, or fp16 on GPUs; no: float32")
    ema: float | None = _setting(None, "decay of averaged weights, which are evaluated instead", above=0, below=1)
    max_skips: int = _setting(20, "steps in a row without a finite gradient that end the run", low=1)
    workers: int = _setting(2, "processes per device that load data; 0 = the main one", low=0)
    seed: int = _setting(0, "seed of weights, order, augmentation and dropout", low=0, below=2**31)
    log_every: int = _setting(20, "steps between lines of metrics.jsonl", low=1)
    save_every: int = _setting(500, "steps between checkpoints; every evaluation is followed by one", low=1)
    keep: int = _setting(2, "newest checkpoints to keep, besides the best", low=1)
    patience: int | None = _setting(None, "end after so many evaluations without a new best", low=1)
    compile: bool = _setting(False, "run the training step through torch.compile")
    tensorboard: bool = _setting(False, "write TensorBoard events besides metrics.jsonl")


@dataclass(frozen=True)
class EvalConfig(_Section):
    every: int = _setting(1, "epochs between evaluations; the end of the run is always evaluated", low=1)
    metric: Literal["mIoU", "oIoU", "full_mIoU", "full_oIoU"] = _setting("mIoU", "what the best is best in")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


_SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "alignment": AlignmentConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}


# ------------------------------------------------------------------------------------------ public functions


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (or the defaults), with `section.name=value` words applied in order.

    Raises ConfigError with every problem of file and words at once, and FileNotFoundError for a missing file.
    """
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    if path is not None:
        text = Path(path).read_text(encoding="utf-8")
        for where, key, scalar in _yaml_settings(text, str(path), problems):
            _assign(values, where, key, scalar, problems)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"command line: {word!r} is not a setting: write section.name=value")
        else:
            _assign(values, "command line", key, (text, text == "null"), problems)
    if problems:
        raise ConfigError(problems)
    sections: dict[str, Any] = {name: section(**values[name]) for name, section in _SECTIONS.items()}
    return Config(**sections)


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML text that `load` reads back to an equal Config."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False)  # ASCII: PyYAML does not re-read all Unicode


def describe() -> list[tuple[str, str, str, str]]:
    """(name, type, default, help) of every setting, in the order of declaration.

    The default is that of the default model and preset.
    """
    return [
        (f"{name}.{f.name}", _kind_name(_kind(section, f.name)), _shown(getattr(section(), f.name)), f.metadata["doc"])
        for name, section in _SECTIONS.items()
        for f in fields(section)
    ]


def differences(old: Config, new: Config) -> list[str]:
    """Settings that differ, as "section.name: old -> new"."""
    lines = []
    for name, section in _SECTIONS.items():
        for f in fields(section):
            before, after = (getattr(getattr(c, name), f.name) for c in (old, new))
            if before != after:
                lines.append(f"{name}.{f.name}: {_shown(before)} -> {_shown(after)}")
    return lines


# --------------------------------------------------------------------------------------------------- reading

_Scalar = tuple[str, bool]  # the text as written, and whether it means null


def _yaml_settings(text: str, source: str, problems: list[str]) -> Iterator[tuple[str, str, _Scalar]]:
    """(place, section.name, scalar) of each leaf; structural mistakes go to `problems`."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problems.append(f"{source}{line}: not YAML: {getattr(error, 'problem', None) or error}")
        return
    if root is None:  # an empty file asks for the defaults
        return
    for section, node, where in _pairs(root, source, "the file", problems):
        if section not in _SECTIONS:
            problems.append(f"{where}: unknown section {section!r}{_hint(section)}")
            continue
        for name, leaf, place in _pairs(node, source, f"section {section}", problems):
            if isinstance(leaf, yaml.ScalarNode):
                yield place, f"{section}.{name}", (leaf.value, leaf.tag == "tag:yaml.org,2002:null")
            else:
                problems.append(f"{place}: {section}.{name} must be a single value, not a list or a mapping")


def _pairs(node: Any, source: str, what: str, problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    """(key, node, place) of a YAML mapping; refuses other kinds of node and a key that is given twice."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        given = "a list" if isinstance(node, yaml.SequenceNode) else node.value
        got = repr(given) if given else "nothing"
        problems.append(
            f"{source}:{node.start_mark.line + 1}: {what} must be a mapping of names to values, "
            f"got {got}; leave it out to keep the defaults"
        )
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        if name in first:
            problems.append(f"{source}:{line}: {what} gives {name!r} twice, first in line {first[name]}")
        else:
            first[name] = line
            yield name, value, f"{source}:{line}"


def _assign(
    values: dict[str, dict[str, Any]], where: str, key: str, scalar: _Scalar, problems: list[str]
) -> None:
    section, _, name = key.partition(".")
    declared = {f.name: f for f in fields(_SECTIONS[section])} if section in _SECTIONS else {}
    if name not in declared:
        problems.append(f"{where}: unknown setting {key!r}{_hint(key)}")
        return
    kind = _kind(_SECTIONS[section], name)
    try:
        value = _read(kind, *scalar)
    except ValueError:
        problems.append(f"{where}: {key} takes {_kind_name(kind)}, got {scalar[0]!r}")
        return
    problem = _value_problem(declared[name], kind, value)
    if problem:
        problems.append(f"{where}: {key} {problem}")
    else:
        values[section][name] = value


def _hint(key: str) -> str:
    """What an unknown name may have meant: the same name elsewhere, a near spelling, or what there is."""
    names = [f"{section}.{f.name}" for section, kind in _SECTIONS.items() for f in fields(kind)]
    section, _, leaf = key.rpartition(".")
    near = [name for name in names if name.partition(".")[2] == leaf]
    near = near or difflib.get_close_matches(key, names if section else [*_SECTIONS, *names], n=2, cutoff=0.7)
    if not near and section not in _SECTIONS:
        leaves = difflib.get_close_matches(leaf, [name.partition(".")[2] for name in names], n=1, cutoff=0.7)
        near = [name for name in names if name.partition(".")[2] in leaves]
    if near:
        return "; did you mean " + " or ".join(near) + "?"
    if section in _SECTIONS:
        return f"; {section} has " + ", ".join(f.name for f in fields(_SECTIONS[section]))
    return "; sections are " + ", ".join(_SECTIONS)


# ----------------------------------------------------------------------------------------------------- types


def _kind(section: type, name: str) -> Any:
    return typing.get_type_hints(section)[name]


def _options(kind: Any) -> tuple[Any, bool]:
    """(the kind without None, whether None is allowed)."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        return inner[0], True
    return kind, False


def _kind_name(kind: Any) -> str:
    inner, optional = _options(kind)
    if typing.get_origin(inner) is Literal:
        name = "one of " + ", ".join(typing.get_args(inner))
    else:
        name = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[inner]
    return name + (" or null" if optional else "")


def _read(kind: Any, text: str, null: bool) -> Any:
    """The value that `text` stands for, by the declared type; ValueError where it stands for none."""
    inner, optional = _options(kind)
    if null:
        if not optional:
            raise ValueError("null")
        return None
    if inner is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return inner(text) if inner in (int, float) else text


def _value_problem(f: Field[Any], kind: Any, value: Any) -> str | None:
    """What is wrong with a value of field `f`, or None."""
    inner, optional = _options(kind)
    if value is None and optional:
        return None
    if typing.get_origin(inner) is Literal:
        right = value in typing.get_args(inner)
    elif inner is float:
        right = type(value) in (int, float) and math.isfinite(value)
    else:
        right = type(value) is inner
    if not right:
        return f"takes {_kind_name(kind)}, got {value!r}"
    limits = f.metadata
    if "low" in limits and value < limits["low"]:
        return f"must be at least {limits['low']}, got {value!r}"
    if "above" in limits and value <= limits["above"]:
        return f"must be above {limits['above']}, got {value!r}"
    if "high" in limits and value > limits["high"]:
        return f"must be at most {limits['high']}, got {value!r}"
    if "below" in limits and value >= limits["below"]:
        return f"must be below {limits['below']}, got {value!r}"
    return None


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
