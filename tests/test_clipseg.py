"""CLIPSeg: the same logits as transformers gives, features in CLIP's joint space, frozen towers, checkpoints."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from aml import cli
from aml.alignment import AlignmentLoss
from aml.models import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPSeg of 60 000 weights as transformers saves it."""
    path = tmp_path_factory.mktemp("clipseg")
    tiny.write_text_encoder(path)  # the tokenizer; the configuration is overwritten
    common = {"num_attention_heads": 2, "intermediate_size": 48}
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "image_size": 64, "patch_size": 16}
    text = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 21, "max_position_embeddings": 16}
    text |= {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = CLIPSegConfig(
        vision_config=vision | common, text_config=text | common, projection_dim=20, reduce_dim=16,
        extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=32,
        use_complex_transposed_convolution=True,
    )
    torch.manual_seed(0)
    CLIPSegForImageSegmentation(config).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return build_model("clipseg", backbone=str(folder), image_size=64, max_tokens=12).eval()


def batch(model, size=64, sentences=("the red circle left of the blue square", "star")):
    image = torch.randn(len(sentences), 3, size, size, generator=torch.Generator().manual_seed(1))
    return image, *model.tokenize(sentences)


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 96])
def test_logits_are_those_of_transformers(folder, model, size):
    """Also at a size for which the position embeddings are interpolated, and for a batch of one."""
    theirs = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    image, tokens, text_mask = batch(model, size)
    for rows in (slice(0, 2), slice(1, 2)):
        some = image[rows], tokens[rows], text_mask[rows]
        expected = theirs(pixel_values=some[0], input_ids=some[1], attention_mask=some[2].long()).logits
        found = model(*some)
        assert found.shape == (rows.stop - rows.start, size, size)
        assert torch.equal(found, expected.view_as(found))


@torch.no_grad()
def test_features_are_in_the_joint_space(model):
    image, tokens, text_mask = batch(model)
    logits, alignment = model(image, tokens, text_mask, return_alignment=True)
    assert torch.equal(logits, model(image, tokens, text_mask))
    alone = model.encode(image, tokens, text_mask)
    assert torch.equal(alone.visual, alignment.visual) and torch.equal(alone.text, alignment.text)
    assert alignment.visual.shape == (2, 20, 4, 4) and alignment.text.shape == (2, 12, 20)
    assert alignment.text_mask.sum(1).tolist() == [8, 1] and model.visual_dim == model.text_dim == 20
    # The sentence's own features stand at its end token; the image's, had it but one patch, at that patch.
    clip = model.clipseg.clip
    sentence = clip.get_text_features(tokens, attention_mask=text_mask.long()).pooler_output
    torch.testing.assert_close(alignment.text[torch.arange(2), text_mask.sum(1) - 1], sentence)
    states = clip.vision_model(image).last_hidden_state
    expected = clip.visual_projection(F.layer_norm(states[:, 1 + 4 * 2 + 3], (32,), eps=1e-5))
    torch.testing.assert_close(alignment.visual[:, :, 2, 3], expected)


def test_only_the_decoder_is_trained(model):
    model.train()
    assert not any(part.training for part in model.clipseg.clip.modules()) and model.clipseg.decoder.training
    aligner = AlignmentLoss(visual_dim=20, text_dim=20, dim=4, warmup_steps=0)
    image, tokens, text_mask = batch(model)
    logits, features = model(image, tokens, text_mask, return_alignment=True)
    loss, record = aligner(logits, torch.ones(2, 64, 64, dtype=torch.bool), features, step=0)
    loss.backward()
    groups = model.parameter_groups(1e-3, 0.01)
    given = {id(parameter) for group in groups for parameter in group["params"]}
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert given == with_gradient == {id(parameter) for parameter in model.clipseg.decoder.parameters()}
    assert 0 < record["kept"] <= 1


def test_a_checkpoint_holds_weights_and_tokenizer(folder, model):
    fresh = build_model("clipseg", backbone=str(folder), image_size=64, max_tokens=12, pretrained=False).eval()
    given = batch(model)
    assert not torch.equal(fresh(*given), model(*given))
    fresh.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(fresh(*batch(fresh)), model(*given))


def test_the_published_architecture_needs_no_download():
    with torch.device("meta"):
        model = build_model("clipseg", pretrained=False)
    assert sum(p.numel() for p in model.clipseg.decoder.parameters()) == 1_127_009
    assert model.image_mean == (0.485, 0.456, 0.406) and model.visual_dim == 512
    with pytest.raises(RuntimeError, match="no tokenizer yet"):
        model.tokenize(["dog"])


def test_colours_are_those_of_the_folder(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colours))
    model = build_model("clipseg", backbone=str(tmp_path), image_size=64, max_tokens=12)
    assert model.image_mean == (0.1, 0.2, 0.3) and model.image_std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_encoders": False}, "trains its decoder only"),
        ({"image_size": 60}, "image_size=60 must be a multiple of the patch size 16"),
        ({"max_tokens": 20}, "max_tokens=20: the text encoder .* has 16 positions"),
        ({"backbone": "/no/such/folder"}, "backbone='/no/such/folder' cannot be read.*model.pretrained=false"),
    ],
)
def test_wrong_settings_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build_model("clipseg", **{"backbone": str(folder), "image_size": 64, "max_tokens": 12, **options})


def test_trained_and_evaluated_by_the_command_line(folder, tmp_path, capsys):
    data = tiny.write_data(tmp_path / "data", train=2, val=1)
    words = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "model.name=clipseg", "model.image_size=64"]
    words += [f"model.backbone={folder}", "model.max_tokens=12", "alignment.dim=4"]
    words += ["train.steps=1", "train.workers=0", "train.batch_size=2"]
    assert cli.main(words) == 0
    assert cli.main(["eval", "--checkpoint", str(tmp_path / "run")]) == 0
    assert "mIoU" in capsys.readouterr().out
    assert cli.main([*words, "model.dim=64", f"train.out={tmp_path / 'other'}"]) == 2
    assert "model.dim: clipseg has no such setting; leave it out" in capsys.readouterr().err
