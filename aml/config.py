"""The run configuration: typed settings from a YAML file and `section.name=value` words of the command line.

    config = load("run.yaml", ["optim.lr=1e-4", "train.epochs=3"])

Every setting is declared once, below, with its type, default, limits and one line of help. Scalars are read
(aml/config_values.py) by the declared type and not by YAML's guesses: `1e-4` is a float, `precision: no` is the word
"no", and `steps: true` is refused. All mistakes are reported together, each with file, line and nearest valid name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from aml.config_values import Reading, kind_name, kind_of, shown, value_problem
from aml.files import read_text


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
            problem = value_problem(f, kind_of(type(self), f.name), getattr(self, f.name))
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
    split_by: str | None = _setting(None, "which refs(<split_by>) to read; null = unc, for refcocog umd")
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
    metric: Literal["mIoU", "oIoU", "gIoU", "full_mIoU", "full_oIoU"] = _setting("mIoU", "what the best is best in")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


_SECTIONS: dict[str, type[_Section]] = get_type_hints(Config)


# ------------------------------------------------------------------------------------------ public functions


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (or the defaults), with `section.name=value` words applied in order.

    Raises ConfigError with every problem of file and words at once, and OSError for a file that cannot be read.
    """
    reading = Reading(_SECTIONS)
    if path is not None:
        reading.add_yaml(read_text(path, "configuration (--config)"), str(path))
    reading.add_words(overrides)
    if reading.problems:
        raise ConfigError(reading.problems)
    sections: dict[str, Any] = {name: section(**reading.values[name]) for name, section in _SECTIONS.items()}
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
        (f"{name}.{f.name}", kind_name(kind_of(section, f.name)), shown(getattr(section(), f.name)), f.metadata["doc"])
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
                lines.append(f"{name}.{f.name}: {shown(before)} -> {shown(after)}")
    return lines
