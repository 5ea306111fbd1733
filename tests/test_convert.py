"""`aml convert`: every key of a released checkpoint accounted for, nothing in the file run, and the result usable."""

import argparse
import json
import os
import pickle

import golden
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig

from aml import cli, predict
from aml.convert import convert
from aml.errors import CheckpointError
from aml.models import build_model
from aml.models.caris_keys import official_name, own_name, rename
from aml.models.weights import read_checkpoint, read_weights

KEYS = golden.GOLDEN / "real_model_keys.json"
needs_fixtures = pytest.mark.skipif(not KEYS.is_file(), reason="no fixtures at ../shared/fixtures/golden")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def narrow_bert(folder, layers):
    tiny.write_text_encoder(folder)
    BertConfig(
        vocab_size=21, hidden_size=24, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    ).save_pretrained(folder)
    return folder


def official(model, seed):
    """A state dict as the released program would save it, buffers and all, with seeded weights."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        state[official_name(name)] = torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator)
        if name.endswith("relative_position_bias_table"):
            state[official_name(name).replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    for layer, shape in (("text_proj", (768, 24)), ("fuse_gate", (768, 768))):
        state[f"aug.{layer}.weight"] = torch.empty(shape).uniform_(-0.1, 0.1, generator=generator)
        state[f"aug.{layer}.bias"] = torch.empty(shape[0]).uniform_(-0.1, 0.1, generator=generator)
    return state


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(file, its state dict, words): the official key set in narrow, of Swin-S, as training saves it."""
    folder = tmp_path_factory.mktemp("released")
    bert = narrow_bert(folder / "bert", layers=12)
    options = {"backbone": "swin_small_patch4_window7_224", "text_encoder": str(bert), "dim": 64, "layers": 6}
    state = official(build_model("caris", pretrained=False, **options), seed=0)
    content = {
        "model": {f"module.{key}": value for key, value in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "lr_scheduler": {"last_epoch": 3, "lr_lambdas": [None]},
        "scaler": {"scale": 65536.0},
        "epoch": 3,
        "args": argparse.Namespace(swin_type="small", window12=False, lr=1e-4, nested=argparse.Namespace(a=[1])),
    }
    content["model"]["module.criterion.ce_loss.weight"] = torch.tensor([0.9, 1.1])
    torch.save(content, folder / "checkpoint.pth")
    return folder / "checkpoint.pth", state, [f"model.text_encoder={bert}", "model.image_size=64"]


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    file, _, words = released
    out = tmp_path_factory.mktemp("converted") / "caris"
    return out, str(convert(file, out, words))


@needs_fixtures
def test_the_checkpoint_has_the_official_key_set(released):
    assert set(released[1]) == set(json.loads(KEYS.read_text())["state_dict"])


def test_every_tensor_arrives_where_its_name_says(released, converted):
    out, report = converted
    stored = load_file(out / "model.safetensors")
    del stored["_extra_state"]
    assert len(stored) == 901
    for key, value in released[1].items():
        if not key.startswith("aug.") and not key.endswith("index"):
            assert torch.equal(stored.pop(own_name(key)), value), key
    assert not stored
    layer = load_file(out / "released_alignment.safetensors")
    assert sorted(layer) == ["fuse_gate.bias", "fuse_gate.weight", "text_proj.bias", "text_proj.weight"]
    aligner = load_file(out / "aligner.safetensors")
    assert torch.equal(aligner["patchmax.projection.weight"], released[1]["aug.text_proj.weight"])
    assert torch.equal(aligner["patchmax.projection.bias"], released[1]["aug.text_proj.bias"])
    assert "901 tensors of the network" in report and "25 dropped" in report and "criterion.ce_loss.weight" in report
    assert "swin_type=small" in report and "lr=0.0001" in report
    written = json.loads((out / "conversion.json").read_text())
    assert len(written["renamed"]) == 901 and len(written["dropped"]) == 25 and written["args"]["window12"] == "False"


def test_the_converted_model_computes_what_the_weights_say(released, converted):
    model = predict.load_model(converted[0])
    options = {"backbone": "swin_small_patch4_window7_224", "text_encoder": released[2][0].split("=")[1]}
    expected = build_model("caris", pretrained=False, dim=64, layers=6, image_size=64, **options).eval()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(released[1][official_name(name)])
    given = torch.randn(1, 3, 64, 64), *model.tokenize(["the red circle"])
    with torch.no_grad():
        assert torch.equal(model(*given), expected(*given))
    assert not model.training and model.image_size == 64
    long = model.tokenize(["red " * 30])[0]  # the released program cuts the end token off
    assert long[0, -1] == long[0, 1] and expected.tokenize(["red " * 30])[0][0, -1] == 3


def test_eval_and_predict_take_the_converted_folder(converted, tmp_path, capsys):
    data, out = tiny.write_data(tmp_path / "data", train=1, val=1), str(converted[0])
    words = ["--checkpoint", out, "--data", str(data), "--out", str(tmp_path / "result.json"), "train.workers=0"]
    assert cli.main(["eval", *words]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["sentences"] > 0
    Image.new("RGB", (70, 50), (200, 30, 30)).save(tmp_path / "photo.png")
    words = [str(tmp_path / "photo.png"), "red circle", "--checkpoint", out, "--out", str(tmp_path)]
    assert cli.main(["predict", *words]) == 0
    assert (tmp_path / "photo-overlay.png").exists()


def test_a_bare_state_dict_of_caris_in_half_precision(released, tmp_path, capsys):
    state = {key: value.half() for key, value in released[1].items() if not key.startswith("aug.")}
    state["criterion.seg_criterion.weight"] = torch.tensor([0.9, 1.1])
    torch.save(state, tmp_path / "caris.pth")
    words = ["convert", str(tmp_path / "caris.pth"), "--out", str(tmp_path / "out"), *released[2]]
    assert cli.main(words) == 0
    assert "alignment" not in capsys.readouterr().out and not (tmp_path / "out/released_alignment.safetensors").exists()
    stored = load_file(tmp_path / "out/model.safetensors")
    assert all(value.dtype == torch.float32 for name, value in stored.items() if name != "_extra_state")
    assert cli.main(words) == 2 and "is there already" in capsys.readouterr().err


def test_what_does_not_fit_is_told_at_once_and_nothing_is_written(released, tmp_path):
    _, state, words = released
    state = dict(state)
    del state["pixel_decoder.encoder.3.gamma_l2v"]
    state["backbone.lang_encoder.encoder.layer.0.new.weight"] = torch.ones(1)
    state["pixel_decoder2.x"] = torch.ones(1)
    state["pixel_decoder.lang_in_norm.bias"] = torch.full((64,), torch.nan)
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "a.pth", tmp_path / "out", words)
    assert str(caught.value).splitlines()[1:] == [
        "  1 missing: pixel_decoder.encoder.3.gamma_l2v",
        "  2 unexpected: backbone.lang_encoder.encoder.layer.0.new.weight, pixel_decoder2.x",
        "  1 not finite numbers: pixel_decoder.lang_in_norm.bias",
    ]
    state["pixel_decoder.lang_in_norm.bias"] = torch.ones(65)
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"1 of another shape: pixel_decoder.lang_in_norm.bias \[65\]"):
        convert(tmp_path / "a.pth", tmp_path / "out", words)
    state["aug.text_proj.bias"] = torch.ones(0)
    del state["aug.fuse_gate.bias"]
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"(?s)missing: aug.fuse_gate.bias.*aug.text_proj.bias \[0\] instead of"):
        convert(tmp_path / "a.pth", tmp_path / "out", words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "in args", "eval"])
def test_a_hostile_file_is_refused_and_not_run(tmp_path, capsys, kind):
    trace, file = tmp_path / "trace", tmp_path / "hostile.pth"
    payload = Hostile(f"touch {trace}")
    if kind == "zip":
        torch.save({"model": {"a": torch.ones(1)}, "x": payload}, file)
    elif kind == "legacy":
        torch.save({"model": payload}, file, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(payload, protocol=2))
    elif kind == "in args":
        torch.save({"model": {}, "args": argparse.Namespace(x=payload)}, file)
    else:
        file.write_bytes(b"\x80\x02c__builtin__\neval\nX\x02\x00\x00\x001j\x85R.")
    assert cli.main(["convert", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "was not read" in said and "weights_only" not in said
    asked = "eval" if kind == "eval" else f"{os.system.__module__}.system"
    assert "nothing in it was run: it asks for " in said and f"{asked}. " in said
    assert not trace.exists() and not (tmp_path / "out").exists()
    payload.__reduce__()[0](payload.command)
    assert trace.exists(), "the payload itself does nothing: this test could not fail"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is no checkpoint that torch.save wrote"),
        (b"PK\x03\x04 not really", "it is no checkpoint that torch.save wrote"),
        (b"# Readme\n", "it is no checkpoint that torch.save wrote"),
        ([1, 2], "holds a list; expected the dict"),
        ({"epoch": 3, "best": 0.5}, "holds no weights: expected names with tensors, found epoch, best"),
        ({"model": {"fc.weight": torch.ones(2)}}, "holds no CARIS or AMLRIS"),
        ({"model": {"a": torch.ones(2), "b": [1]}}, "b is a list"),
        ({"model": {"a": torch.ones(2), "module.a": torch.ones(2)}}, "twice"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_files_are_told_apart(tmp_path, capsys, content, says):
    file = tmp_path / "x.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert cli.main(["convert", str(file), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused(released, tmp_path, capsys):
    (tmp_path / "cut.pth").write_bytes(released[0].read_bytes()[: 1 << 20])
    assert cli.main(["convert", str(tmp_path / "cut.pth"), "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint that torch.save wrote, or it is damaged (" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "none.pth"), "--out", str(tmp_path / "out")]) == 2
    assert "none.pth: no such file" in capsys.readouterr().err


def test_the_namespace_is_data(released):
    args = read_checkpoint(released[0])["args"]
    assert type(args) is argparse.Namespace and args.swin_type == "small" and args.nested.a == [1]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for that file only


def test_rules_sort_every_kind_of_key():
    renamed = rename([
        "backbone.vis_encoder.layers.0.blocks.1.attn_mask",
        "backbone.vis_encoder.layers.2.blocks.0.attn.relative_position_index",
        "backbone.lang_encoder.embeddings.position_ids",
        "backbone.lang_encoder.pooler.dense.weight",
        "criterion.ce_loss.weight",
        "backbone.vis_encoder.layers.1.downsample.norm.bias",
        "aug.fuse_gate.bias",
        "aug.other.bias",
        "module.x",
    ])
    assert len(renamed.dropped) == 5 and renamed.unexpected == ["aug.other.bias", "module.x"]
    moved = "backbone.vis_encoder.layers.1.downsample.norm.bias"
    assert renamed.model == {"visual.layers.2.downsample.norm.bias": moved}
    assert renamed.alignment == {"fuse_gate.bias": "aug.fuse_gate.bias"}


def test_weights_of_a_damaged_safetensors_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="damaged"):
        read_weights(tmp_path / "a.safetensors")
