"""The configuration loader: what it accepts, what it refuses, in which words, and the list of settings."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aml.config import Config, ConfigError, OptimConfig, TrainConfig, describe, differences, load, to_yaml

SETTINGS = """
model.name model.backbone model.backbone_weights model.text_encoder model.pretrained model.freeze_encoders
model.image_size model.max_tokens model.keep_end model.dim model.layers model.gradient_checkpointing
data.root data.dataset data.split_by data.images data.skip data.field data.resize data.augment
alignment.preset alignment.strategy alignment.projection alignment.dim alignment.words alignment.normalize
alignment.softmax alignment.scale alignment.quantile alignment.threshold alignment.protect_target alignment.drop_ratio
alignment.block_size alignment.max_dropped alignment.bce_weight alignment.dice_weight alignment.background_weight
alignment.target_weight alignment.aux_weight alignment.aux_into_encoders alignment.warmup
optim.lr optim.weight_decay optim.warmup optim.warmup_steps optim.full_rate_first optim.clip_norm
train.out train.epochs train.steps train.batch_size train.accumulate train.precision train.ema train.max_skips
train.workers train.seed
train.log_every train.save_every train.keep train.patience train.compile train.tensorboard
eval.every eval.metric
""".split()


def read(tmp_path, text, overrides=()):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load(path, overrides)


def problems_of(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, overrides)
    return [line.replace(str(tmp_path / "run.yaml"), "run.yaml") for line in caught.value.problems]


def test_the_list_of_settings_changes_only_on_purpose():
    assert [name for name, *_ in describe()] == SETTINGS


def test_every_setting_has_one_line_of_help():
    for name, kind, default, doc in describe():
        assert doc and "\n" not in doc and kind and len(f"{name} {doc} ({default})") < 140, name


def test_presets_fill_in_what_is_null(tmp_path):
    default, released = load().alignment, load(None, ["alignment.strategy=released"]).alignment
    assert (default.preset, default.quantile, default.threshold, default.warmup) == ("default", 0.25, None, 0.1)
    assert (released.preset, released.quantile, released.threshold, released.warmup) == ("released", None, 0.4, 0.0)
    assert (released.words, released.normalize, released.softmax, released.dice_weight) == ("all", False, True, 0.0)
    paper = load(None, ["alignment.preset=paper", "alignment.quantile=0.5", "alignment.protect_target=true"])
    assert (paper.alignment.strategy, paper.alignment.projection) == ("image", "gaussian")
    assert (paper.alignment.quantile, paper.alignment.threshold, paper.alignment.protect_target) == (0.5, None, True)
    assert read(tmp_path, to_yaml(paper)) == paper
    problems = problems_of(tmp_path, "alignment: {quantile: 0.5, threshold: 0.4}")
    assert problems == ["alignment.quantile, alignment.threshold: give one of them"]


# The rows on which ready-made loaders were found to differ.
@pytest.mark.parametrize(
    ("text", "section", "name", "value"),
    [
        ("optim: {lr: 1e-4}", "optim", "lr", 1e-4),
        ("optim: {lr: 1}", "optim", "lr", 1.0),
        ("train: {precision: no}", "train", "precision", "no"),
        ("train: {precision: bf16}", "train", "precision", "bf16"),
        ("train: {steps: null}", "train", "steps", None),
        ("train: {steps: 7}", "train", "steps", 7),
        ("train: {compile: true}", "train", "compile", True),
        ("train: {compile: False}", "train", "compile", False),
        ("data: {dataset: 2014}", "data", "dataset", "2014"),
        ("data: {dataset: 12:30}", "data", "dataset", "12:30"),
        ("data: {root: 'null'}", "data", "root", "null"),
        ("data: {dataset: no}", "data", "dataset", "no"),
    ],
)
def test_a_scalar_is_read_by_the_declared_type(tmp_path, text, section, name, value):
    got = getattr(getattr(read(tmp_path, text), section), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {epochs: true}", "run.yaml:1: train.epochs takes an integer, got 'true'"),
        ("train: {epochs: 1.5}", "run.yaml:1: train.epochs takes an integer, got '1.5'"),
        ("train: {epochs: 1e3}", "run.yaml:1: train.epochs takes an integer, got '1e3'"),
        ("train: {epochs: 12:30}", "run.yaml:1: train.epochs takes an integer, got '12:30'"),
        ("train: {epochs: null}", "run.yaml:1: train.epochs takes an integer, got 'null'"),
        ("train: {epochs: 0}", "run.yaml:1: train.epochs must be at least 1, got 0"),
        ("train: {compile: yes}", "run.yaml:1: train.compile takes true or false, got 'yes'"),
        ("train: {compile: 1}", "run.yaml:1: train.compile takes true or false, got '1'"),
        ("train: {precision: fp8}", "run.yaml:1: train.precision takes one of no, bf16, fp16, got 'fp8'"),
        ("train: {steps: many}", "run.yaml:1: train.steps takes an integer or null, got 'many'"),
        ("optim: {lr: nan}", "run.yaml:1: optim.lr takes a number, got nan"),
        ("optim: {lr: 0}", "run.yaml:1: optim.lr must be above 0, got 0.0"),
        ("optim: {lr: [1, 2]}", "run.yaml:1: optim.lr must be a single value, not a list or a mapping"),
        ("alignment: {quantile: 1}", "run.yaml:1: alignment.quantile must be below 1, got 1.0"),
        (
            "optim:",
            "run.yaml:1: section optim must be a mapping of names to values, got nothing; "
            "leave it out to keep the defaults",
        ),
        (
            "optim: 3",
            "run.yaml:1: section optim must be a mapping of names to values, got '3'; "
            "leave it out to keep the defaults",
        ),
        ("optim: {lr: 1, lr: 2}", "run.yaml:1: section optim gives 'lr' twice, first in line 1"),
        (
            "optim: {lr: 1}\noptim: {clip_norm: 1}",
            "run.yaml:2: the file gives 'optim' twice, first in line 1",
        ),
        (
            "optim: {leaning_rate: 1}",
            "run.yaml:1: unknown setting 'optim.leaning_rate'; optim has lr, weight_decay, warmup, warmup_steps, "
            "full_rate_first, clip_norm",
        ),
        (
            "optim: {weight_decy: 1}",
            "run.yaml:1: unknown setting 'optim.weight_decy'; did you mean optim.weight_decay?",
        ),
        ("optim: {epochs: 1}", "run.yaml:1: unknown setting 'optim.epochs'; did you mean train.epochs?"),
        ("trian: {epochs: 1}", "run.yaml:1: unknown section 'trian'; did you mean train?"),
        ("epochs: 1", "run.yaml:1: unknown section 'epochs'; did you mean train.epochs?"),
        ("train: {a: b", "run.yaml:1: not YAML: expected ',' or '}', but got '<stream end>'"),
    ],
)
def test_a_mistake_is_refused_with_its_place(tmp_path, text, problem):
    assert problems_of(tmp_path, text) == [problem]


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path):
    text = "train:\n  epochs: x\n  sede: 1\n\nopt:\n  lr: 1\neval:\n  metric: iou\n"
    lines = problems_of(tmp_path, text, ["optim.lr=fast", "train.seed", "optim.rate=1"])
    assert [line.split(": ")[0] for line in lines] == [
        "run.yaml:2",
        "run.yaml:3",
        "run.yaml:5",
        "run.yaml:8",
        *3 * ["command line"],
    ]


def test_overrides_win_and_the_last_one_counts(tmp_path):
    words = ["optim.lr=0.25", "optim.lr=1e-4", "train.steps=null", "data.root=a=b"]
    config = read(tmp_path, "optim: {lr: 0.5}\ntrain: {steps: 3}", [*words, "alignment.strategy=none"])
    assert (config.optim.lr, config.train.steps, config.data.root) == (1e-4, None, "a=b")
    assert config.alignment.strategy == "none"


def test_an_empty_file_is_the_defaults(tmp_path):
    assert read(tmp_path, "") == Config() == load()


def test_sections_made_in_python_are_checked_too():
    with pytest.raises(ConfigError, match=r"(?s)OptimConfig.lr: takes a number.*clip_norm: must be above 0"):
        OptimConfig(lr="1e-3", clip_norm=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="TrainConfig.epochs: takes an integer, got True"):
        replace(TrainConfig(), epochs=True)


@given(
    lr=st.floats(1e-30, 1e30),
    steps=st.none() | st.integers(1, 10**12),
    root=st.text(max_size=20),
    images=st.none() | st.text(max_size=8),
    keep=st.booleans(),
)
def test_what_is_written_is_read_back(tmp_path_factory, lr, steps, root, images, keep):
    config = Config()
    config = replace(
        config,
        optim=replace(config.optim, lr=lr),
        train=replace(config.train, steps=steps, compile=keep),
        data=replace(config.data, root=root, images=images),
    )
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config


def test_differences_name_old_and_new():
    old, new = Config(), load(None, ["train.batch_size=3", "train.steps=9"])
    assert differences(old, new) == ["train.steps: null -> 9", "train.batch_size: 8 -> 3"]
    assert differences(old, old) == []


def test_the_sections_of_the_file_are_the_fields_of_the_configuration():
    assert list(dict.fromkeys(name.split(".")[0] for name in SETTINGS)) == [f.name for f in fields(Config)]
