"""Reading the fixtures with the released program's numbers, and the tiny CARIS that they describe."""

import importlib.util
import json
from pathlib import Path

import torch
from tiny import write_text_encoder

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "golden"


def read(name):
    """(tensors, description) of a fixture."""
    from safetensors import safe_open

    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["json"])


def recipe():
    """The module that draws seeded inputs and weights."""
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "golden_recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(seed, batch, height, width, length, vocabulary, lengths):
    """image, tokens, text_mask, target as tensors."""
    drawn = recipe().model_inputs(seed, batch, height, width, length, vocabulary, lengths)
    image, tokens, mask, target = map(torch.from_numpy, drawn)
    return image, tokens, mask.bool(), target


def tiny_caris(folder, **options):
    """A CARIS of the fixture's sizes, 970 000 weights, without dropout. Its BERT is described in `folder`."""
    from transformers import BertConfig

    from aml.models import build_model

    write_text_encoder(folder)  # the tokenizer
    BertConfig(
        vocab_size=80, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ).save_pretrained(folder)
    defaults = dict(
        backbone="swin_tiny_patch4_window7_224", text_encoder=str(folder), pretrained=False, max_tokens=12,
        image_size=96, dim=64, layers=2, heads=4, ffn=2, drop_path=0.0,
        backbone_options=dict(embed_dim=16, depths=(1, 2, 1, 1), num_heads=(2, 4, 4, 8)),
    )
    return build_model("caris", **{**defaults, **options})


def set_weights(model, seed):
    """Every parameter from its official name, as in the fixtures."""
    from aml.models.caris_keys import official_name

    draw = recipe().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(official_name(name), parameter.shape, seed)))
    return model


def largest_difference(actual, expected):
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return (actual.double() - expected.double()).abs().max().item()
