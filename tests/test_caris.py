"""CARIS without fixtures: windows, sizes, precision, memory, compilation, pretrained encoders, parameter groups."""

import json
import math

import golden
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from aml import cli
from aml.config import MODEL_DEFAULTS, ModelConfig, load
from aml.models import MODELS, build_model
from aml.models.caris_decoder import PixelDecoder
from aml.models.caris_keys import official_name, rename
from aml.models.caris_swin import SwinBackbone, _region_mask
from aml.models.caris_text import VisualPrompts, build_bert

SWINS = ("tiny_patch4_window7_224", "small_patch4_window7_224", "base_patch4_window7_224", "large_patch4_window12_384")
KEYS = golden.GOLDEN / "real_model_keys.json"
needs_keys = pytest.mark.skipif(not KEYS.is_file(), reason="no fixtures at ../shared/fixtures/golden")
NARROW = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bert")


@pytest.fixture
def model(folder):
    torch.manual_seed(0)
    return golden.tiny_caris(folder).eval()


def batch(model, height=96, width=96, sentences=("the red circle left of the blue square", "star", "")):
    image = torch.randn(len(sentences), 3, height, width, generator=torch.Generator().manual_seed(1))
    return image, *model.tokenize(sentences)


# ---------------------------------------------------------------------------------------------------- interface


def test_one_pass_gives_logits_and_what_encode_gives(model):
    image, tokens, text_mask = batch(model)
    logits, alignment = model(image, tokens, text_mask, return_alignment=True)
    assert logits.shape == (3, 24, 24) and torch.equal(model(image, tokens, text_mask), logits)
    assert alignment.visual.shape == (3, model.visual_dim, 3, 3) and alignment.text.shape == (3, 12, model.text_dim)
    assert text_mask.sum(1).tolist() == [10, 3, 2] and alignment.text_mask.sum(1).tolist() == [8, 1, 2]
    alone = model.encode(image, tokens, text_mask)
    assert torch.equal(alone.visual, alignment.visual) and torch.equal(alone.text, alignment.text)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 70), (224, 96)])
def test_any_image_size_is_taken(model, height, width):
    logits = model(*batch(model, height, width))
    assert logits.shape == (3, -(-height // 4), -(-width // 4)) and logits.isfinite().all()


def test_samples_do_not_influence_each_other_nor_padding_anything(model):
    image, tokens, text_mask = batch(model)
    logits = model(image, tokens, text_mask)
    torch.testing.assert_close(model(image[1:2], tokens[1:2], text_mask[1:2]), logits[1:2], atol=1e-5, rtol=1e-5)
    other = torch.where(text_mask, tokens, 7)
    assert torch.equal(model(image, other, text_mask), logits)
    assert not torch.allclose(model(image, tokens, torch.ones_like(text_mask)), logits)


def test_the_image_reaches_the_words_through_the_prompts(model):
    image, tokens, text_mask = batch(model)
    words = model.encode(image, tokens, text_mask).text
    assert not torch.allclose(model.encode(image.flip(3), tokens, text_mask).text, words, atol=1e-4)


def test_a_long_sentence_keeps_its_end_or_loses_it_as_in_the_released_program(model, folder):
    tokens, text_mask = model.tokenize(["red " * 30])
    assert tokens[0, -1] == 3 and text_mask.all()
    released = golden.tiny_caris(folder, keep_end=False)
    cut, text_mask = released.tokenize(["red " * 30])
    assert cut[0, -1] == cut[0, 1] and text_mask.all() and cut.shape == tokens.shape
    assert torch.equal(released.tokenize(["a star"])[0], model.tokenize(["a star"])[0])


def test_bert_base_needs_no_download_for_architecture_and_vocabulary():
    with torch.device("meta"):
        bert, tokenizer = build_bert("bert-base-uncased", pretrained=False)
    assert len(list(bert.parameters())) == 197 and sum(p.numel() for p in bert.parameters()) == 108_891_648
    assert tokenizer.get_vocab_size() == 30522
    assert tokenizer.encode("The Café's dog, 狗!").tokens == (
        "[CLS] the cafe ' s dog , [UNK] ! [SEP]".split()
        if tokenizer.token_to_id("狗") is None
        else "[CLS] the cafe ' s dog , 狗 ! [SEP]".split()
    )


# ------------------------------------------------------------------------------------------------------ windows


@torch.no_grad()
def test_swin_is_timms_where_nothing_is_padded():
    torch.manual_seed(0)
    options = {**NARROW, "window_size": 2}
    ours = SwinBackbone("swin_tiny_patch4_window7_224", **options).eval()
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=128, out_indices=(0, 1, 2, 3), **options
    ).eval()
    named = {name.replace("layers.", "layers_", 1): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict({name: named[name] for name in theirs.state_dict()})
    image = torch.randn(2, 3, 128, 128)
    for found, expected, norm in zip(ours(image), theirs(image), ours.norms, strict=True):
        assert torch.equal(found, norm(expected).permute(0, 3, 1, 2))


def attention_by_hand(block, grid):
    """Token by token, from the definition: pad, shift, and attend within windows and regions. grid: [H, W, C]."""
    (height, width, channels), w, s = grid.shape, block.window_size[0], block.shift_size[0]
    tall, wide = -(-height // w) * w, -(-width // w) * w
    padded = F.pad(grid, (0, 0, 0, wide - width, 0, tall - height))
    qkv = block.attn.qkv(padded).unflatten(2, (3, block.attn.num_heads, -1))

    def region(place, length):
        return (place >= length - w) + (place >= length - s) if s else 0

    shifted = {(y, x): ((y - s) % tall, (x - s) % wide) for y in range(tall) for x in range(wide)}
    result = torch.zeros(height, width, channels)
    for y in range(height):
        for x in range(width):
            row, column = shifted[y, x]
            logits, values = [], []
            for (other_y, other_x), (r, c) in shifted.items():
                if (r // w, c // w) == (row // w, column // w):
                    bias = block.attn.relative_position_bias_table[(row - r + w - 1) * (2 * w - 1) + column - c + w - 1]
                    apart = region(r, tall) != region(row, tall) or region(c, wide) != region(column, wide)
                    query, key = qkv[y, x, 0], qkv[other_y, other_x, 1]
                    logits.append((query * key).sum(1) * block.attn.scale + bias - 100.0 * apart)
                    values.append(qkv[other_y, other_x, 2])
            weights = torch.stack(logits).softmax(0)
            result[y, x] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return block.attn.proj(result)


@pytest.mark.parametrize(("height", "width"), [(5, 9), (3, 2), (4, 4)])
@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
@torch.no_grad()
def test_windows_by_hand(height, width, index):
    """Grids that are no multiple of the window, smaller than it, and equal to it: padded, shifted and masked all."""
    torch.manual_seed(0)
    stage = SwinBackbone("swin_tiny_patch4_window7_224", **NARROW, window_size=4).layers[1]
    block = stage.blocks[index].eval()
    for parameter in block.parameters():
        parameter.normal_(std=0.5)
    grid = torch.randn(1, height, width, 16)
    found = block(grid, _region_mask(grid, stage.blocks))
    expected = grid + attention_by_hand(block, block.norm1(grid)[0])
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SWINS)
def test_every_size_of_swin(name):
    with torch.device("meta"):
        model = build_model("caris", backbone=f"swin_{name}", pretrained=False)
        maps = model.visual(torch.empty(1, 3, 448, 448))
    width = {"tiny": 96, "small": 96, "base": 128, "large": 192}[name.split("_")[0]]
    assert [tuple(m.shape) for m in maps] == [(1, width << i, 112 >> i, 112 >> i) for i in range(4)]
    assert model.visual_dim == 8 * width and len(list(model.parameters())) == (745 if "tiny" in name else 901)


# ------------------------------------------------------------------------------ names, groups, initial weights


@needs_keys
@pytest.mark.parametrize("window", [7, 12])
def test_every_official_key_is_accounted_for(window):
    official = json.loads(KEYS.read_text())
    state = official["state_dict"] | (official["differences_for_window7"] if window == 7 else {})
    with torch.device("meta"):
        name = {7: "swin_base_patch4_window7_224", 12: "swin_base_patch4_window12_384"}[window]
        model = build_model("caris", backbone=name, pretrained=False)
    renamed = rename(state)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {name: state[key]["shape"] for name, key in renamed.model.items()}
    assert all(official_name(name) == key for name, key in renamed.model.items())
    assert all(state[key]["kind"] == "parameter" for key in renamed.model.values())
    assert all(state[key]["kind"] == "buffer" for key in renamed.dropped)
    assert (len(state), len(renamed.model), len(renamed.dropped), len(renamed.alignment)) == (929, 901, 24, 4)
    assert renamed.unexpected == []
    groups = {group["name"]: group for group in model.parameter_groups(1e-4, 0.01)}
    by_id = {id(parameter): official_name(name) for name, parameter in model.named_parameters()}
    for expected in official["param_groups"]:
        group = groups[expected["name"]]
        names = [by_id[id(parameter)] for parameter in group["params"]]
        assert sorted(names) == sorted(name for name in expected["params"] if not name.startswith("aug."))
        assert group["lr"] == pytest.approx(1e-4 * expected["lr_scale"])
        assert group["weight_decay"] == {0.0: 0.0, "default": 0.01}[expected["weight_decay"]]


@needs_keys
def test_initial_weights_are_drawn_as_the_released_program_draws_them():
    torch.manual_seed(0)
    statistics = json.loads(KEYS.read_text())["init_stats_mean_std_min_max"]
    modules = {
        "pixel_decoder": PixelDecoder((128, 256, 512, 1024), 768, layers=2),
        "backbone.conditional_prompts": VisualPrompts(1024, 768),
    }
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            mean, std, low, high = statistics[f"{prefix}.{name}"]
            noise = 6 * max(std, 1e-9) / math.sqrt(parameter.numel()) * math.sqrt(2)
            assert parameter.mean().item() == pytest.approx(mean, abs=noise), name
            assert parameter.std(correction=0).item() == pytest.approx(std, rel=0.12, abs=1e-9), name
            drawn = std > 0 and abs(low) != 4
            assert parameter.min().item() == pytest.approx(low, rel=0.45 if drawn else 1e-6), name
            assert parameter.max().item() == pytest.approx(high, rel=0.45 if drawn else 1e-6), name


def test_frozen_encoders_leave_prompts_and_decoder_to_train(folder):
    model = golden.tiny_caris(folder, freeze_encoders=True).train()
    assert not any(part.training for encoder in model.encoders() for part in encoder.modules())
    groups = model.parameter_groups(1e-3, 0.01)
    assert [group["name"] for group in groups] == ["other_no_decay", "other_decay"]
    model(*batch(model)).square().sum().backward()
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert {id(parameter) for parameter in model.parameters() if parameter.grad is not None} == trained


def test_defaults_of_the_configuration_are_those_of_the_constructors():
    import inspect

    for name, defaults in MODEL_DEFAULTS.items():
        given = {key: p.default for key, p in inspect.signature(MODELS[name]).parameters.items()}
        assert defaults == {key: given[key] for key in defaults}, name
        options = ModelConfig(name=name).options()
        assert options.pop("name") == name and options == {key: given[key] for key in options}
    assert set(MODEL_DEFAULTS) == set(MODELS)
    assert load(None, ["model.name=caris", "model.image_size=384"]).model.image_size == 384


# --------------------------------------------------------------------------------- precision, memory, compiling


def saved_bytes(function):
    """The result, and the bytes that autograd keeps for the backward pass, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return function(), sum(kept.values())


def test_gradient_checkpointing_saves_memory_and_changes_no_bit(folder):
    def run(gradient_checkpointing):
        torch.manual_seed(0)
        model = golden.tiny_caris(folder, gradient_checkpointing=gradient_checkpointing, drop_path=0.5).train()
        for dropout in (part for part in model.text.modules() if isinstance(part, torch.nn.Dropout)):
            dropout.p = 0.1
        torch.manual_seed(1)
        logits, bytes_kept = saved_bytes(lambda: model(*batch(model)))
        logits.square().mean().backward()
        return logits, bytes_kept, {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = run(False), run(True)
    assert torch.equal(plain[0], checkpointed[0])
    assert all(torch.equal(gradient, checkpointed[2][name]) for name, gradient in plain[2].items())
    assert checkpointed[1] < 0.5 * plain[1], (plain[1], checkpointed[1])


def test_bf16_autocast(model):
    """Deformable sampling stays in float32: its coordinates have no bits to lose."""
    given = batch(model)
    expected = model(*given)
    kinds = []
    model.decoder.encoder[1].vis_self_attn.value_proj.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, alignment = model(*given, return_alignment=True)
    assert kinds == [torch.float32] and logits.dtype == torch.float32
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.03
    logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compiled_in_one_graph(folder):
    torch.manual_seed(0)
    options = {"backbone_options": {**NARROW, "depths": (2, 1, 1, 1)}, "layers": 1}
    model = golden.tiny_caris(folder, **options).train()
    given = batch(model, 64, 96)
    expected = model(*given)
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        largest = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4 * largest + 1e-7, rtol=0, msg=name)


# ------------------------------------------------------------------------------------------- pretrained encoders


def published(backbone):
    """A state dict in the layout of the files that the authors of Swin published."""
    state = {}
    for name, value in backbone.state_dict().items():
        if not name.startswith("norms."):
            key = official_name(f"visual.{name}").removeprefix("backbone.vis_encoder.")
            state[key] = torch.randn(value.shape)
            if key.endswith("relative_position_bias_table"):
                state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
                state[key.replace("attn.relative_position_bias_table", "attn_mask")] = torch.zeros(1, 49, 49)
    return state | {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64), "head.weight": torch.ones(10, 64)}


@pytest.mark.parametrize("layout", ["published", "timm"])
def test_swin_weights_from_a_file(tmp_path, layout):
    name = "swin_tiny_patch4_window7_224"
    state = published(SwinBackbone(name, **NARROW))
    if layout == "published":
        torch.save({"model": state, "epoch": 90}, tmp_path / "swin.pth")
        file = tmp_path / "swin.pth"
    else:
        own = {key.removeprefix("visual."): value for key, value in _own_names(state).items()}
        save_file(own | {"head.fc.weight": torch.ones(3)}, tmp_path / "swin.safetensors")
        file = tmp_path / "swin.safetensors"
    loaded = SwinBackbone(name, pretrained=True, weights=file, **NARROW).state_dict()
    for key, value in _own_names(state).items():
        assert torch.equal(loaded.pop(key.removeprefix("visual.")), value), key
    assert all(key.startswith("norms.") for key in loaded)
    with pytest.raises(ValueError, match=r"holds no weights of this Swin[^§]*layers.2.blocks.1.norm1.weight"):
        SwinBackbone(name, pretrained=True, weights=file, **{**NARROW, "depths": (1, 2, 2, 1)})


def _own_names(state):
    prefix = "backbone.vis_encoder."
    renamed = rename(prefix + key for key in state if not key.startswith(("norm.", "head."))).model
    return {own: state[key.removeprefix(prefix)] for own, key in renamed.items()}


def test_bert_weights_from_a_folder(folder, tmp_path):
    torch.manual_seed(0)
    model = golden.tiny_caris(folder)
    tiny.write_text_encoder(tmp_path)
    model.text.save_pretrained(tmp_path)
    loaded, tokenizer = build_bert(str(tmp_path), pretrained=True)
    assert all(torch.equal(value, model.text.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.pooler is None and tokenizer is not None and not loaded.training


def test_weights_that_cannot_be_had_are_told_with_the_remedy(monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"text_encoder='nobody/bert' cannot be read.*model.pretrained=false"):
        build_bert("nobody/bert", pretrained=True)
    with pytest.raises(ValueError, match=r"neither in the local cache.*model.backbone_weights=FILE"):
        SwinBackbone("swin_tiny_patch4_window7_224.ms_in1k", pretrained=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet50"}, "backbone='resnet50' is no Swin"),
        ({"backbone": "swin_bas_patch4_window7_224"}, "near it: swin_base_patch4_window7_224"),
        ({"dim": 100}, "dim=100 must be a multiple of 32"),
        ({"max_tokens": 40}, "max_tokens=40"),
        ({"text_encoder": "/no/such/folder"}, "text_encoder='/no/such/folder' cannot be read"),
    ],
)
def test_wrong_settings_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        golden.tiny_caris(folder, **options)


def test_trained_by_the_command_line(tmp_path, capsys):
    data, encoder = tiny.write_data(tmp_path / "data", train=2, val=1), tiny.write_text_encoder(tmp_path / "bert")
    words = tiny.settings(data, encoder, tmp_path / "run", "model.name=caris", "train.steps=1", "train.batch_size=2")
    words += ["model.backbone=swin_tiny_patch4_window7_224", "model.gradient_checkpointing=true"]
    assert cli.main(["train", *words]) == 0
    assert "caris: " in capsys.readouterr().out
    saved = load(tmp_path / "run/config.yaml").model
    assert saved.name == "caris" and saved.keep_end is True and saved.backbone_weights is None
