"""CARIS (Liu et al., "CARIS: Context-Aware Referring Image Segmentation", ACM MM 2023), the network that AML trains.

    image -> Swin -> V0 .. V3 (strides 4 .. 32)         sentence -> BERT embeddings
                |________ V3 -> 5 visual prompts ________________|
                |                                           BERT encoder -> words
                |____ vision-language pixel decoder ____________|
                              two scores per pixel at stride 4; their difference is the logit

Written from a description of what the released program computes and compared with its numbers
(tests/test_caris_golden.py).
Training uses no more than this: at inference, CARIS trained with or without AML is the same network.
"""

from __future__ import annotations

from typing import Any

import timm.data
from torch import Tensor, nn

from aml.models.base import ENCODER_LR_SCALE, AlignmentInputs
from aml.models.caris_decoder import PixelDecoder
from aml.models.caris_keys import official_name
from aml.models.caris_swin import SwinBackbone
from aml.models.caris_text import VisualPrompts, build_bert, encode_words
from aml.models.words import TokenizedModel


class CARIS(TokenizedModel):
    """Swin, BERT with visual prompts, and the vision-language deformable pixel decoder.

    backbone: a timm Swin of any size (tiny, small, base, large) and window; ".ms_in22k" names its weights.
    backbone_weights: a file of Swin weights instead of timm's download (see `SwinBackbone`).
    text_encoder: "bert-base-uncased", another hub name, or a folder that transformers reads.
    pretrained: read the encoders' weights. False for random ones, or before loading a checkpoint.
    freeze_encoders: train prompts and decoder only.
    image_size: side of the square that images are resized to; forward takes any size.
    max_tokens, keep_end: longer sentences are cut, and keep their [SEP]; the released program drops it (False).
    dim, layers, heads, ffn: width, depth, heads and feed-forward widening of the decoder.
    drop_path: stochastic depth of Swin, for training.
    gradient_checkpointing: compute activations again in the backward pass: less memory, a third more time.
    backbone_options: of timm's `SwinTransformer`, for sizes that have no name.
    """

    def __init__(
        self,
        backbone: str = "swin_base_patch4_window7_224.ms_in22k",
        backbone_weights: str | None = None,
        text_encoder: str = "bert-base-uncased",
        pretrained: bool = True,
        freeze_encoders: bool = False,
        image_size: int = 448,
        max_tokens: int = 20,
        keep_end: bool = True,
        dim: int = 256,
        layers: int = 6,
        heads: int = 8,
        ffn: int = 4,
        drop_path: float = 0.3,
        gradient_checkpointing: bool = False,
        backbone_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        if dim % 32 or dim % (2 * heads):
            raise ValueError(f"dim={dim} must be a multiple of 32 (group norm) and of 2 * heads={2 * heads}")
        self.image_size, self.max_tokens, self.keep_end = image_size, max_tokens, keep_end
        self.image_mean, self.image_std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
        self.freeze_encoders = freeze_encoders
        self.visual = SwinBackbone(backbone, pretrained, backbone_weights, drop_path, **(backbone_options or {}))
        self.text, tokenizer = build_bert(text_encoder, pretrained)
        self.require_positions(self.text.config, text_encoder)
        self.visual_dim = self.visual.channels[-1]
        self.text_dim = self.text.config.hidden_size
        self.prompts = VisualPrompts(self.visual_dim, self.text_dim)
        self.decoder = PixelDecoder(self.visual.channels, self.text_dim, dim, layers, heads, ffn)
        self.gradient_checkpointing = gradient_checkpointing
        self.visual.checkpointing = self.decoder.checkpointing = gradient_checkpointing
        self.set_tokenizer(tokenizer)
        if freeze_encoders:
            for encoder in self.encoders():
                encoder.requires_grad_(False)
        self.train()

    def encoders(self) -> list[nn.Module]:
        return [self.visual, self.text]

    def train(self, mode: bool = True) -> CARIS:
        super().train(mode)
        if self.freeze_encoders:
            for encoder in self.encoders():
                encoder.eval()
        return self

    def encode(self, image: Tensor, tokens: Tensor, text_mask: Tensor) -> AlignmentInputs:
        maps, words = self._encode(image, tokens, text_mask)
        return self._alignment(maps, words, tokens, text_mask)

    def forward(
        self, image: Tensor, tokens: Tensor, text_mask: Tensor, return_alignment: bool = False
    ) -> Tensor | tuple[Tensor, AlignmentInputs]:
        maps, words = self._encode(image, tokens, text_mask)
        background, referent = self.decoder(maps, words, text_mask).unbind(1)
        logits = referent - background
        if not return_alignment:
            return logits
        return logits, self._alignment(maps, words, tokens, text_mask)

    def forward_filtered(self, filtered: Tensor, image: Tensor, tokens: Tensor, text_mask: Tensor) -> Tensor:
        words = self._encode(image, tokens, text_mask)[1]
        background, referent = self.decoder(self.visual(filtered), words, text_mask).unbind(1)
        return referent - background

    def _encode(self, image: Tensor, tokens: Tensor, text_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = self.visual(image)
        prompts = self.prompts(maps[-1])
        words = encode_words(self.text, tokens, text_mask, prompts, self.gradient_checkpointing)
        return maps, words[:, : tokens.shape[1]]  # the prompts act only by being attended to

    def _alignment(self, maps: list[Tensor], words: Tensor, tokens: Tensor, text_mask: Tensor) -> AlignmentInputs:
        return AlignmentInputs(maps[-1], words, self.real_words(tokens, text_mask), attended=text_mask)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
        """The six groups of the released program, which goes by names: it decays biases and group norms, too."""
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in _GROUPS}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[_group(official_name(name))].append(parameter)
        return [
            {
                "name": name,
                "params": parameters,
                "lr": lr * (1.0 if name.startswith("other") else ENCODER_LR_SCALE),
                "weight_decay": 0.0 if name.endswith("no_decay") else weight_decay,
            }
            for name, parameters in groups.items()
            if parameters
        ]


_GROUPS = ("lang_no_decay", "lang_decay", "vis_no_decay", "vis_decay", "other_no_decay", "other_decay")


def _group(official: str) -> str:
    """The group of a parameter by its official name; the first rule that fits."""
    for part, component, exempt in (
        ("lang", "lang_encoder", ("Norm", "embeddings")),
        ("vis", "vis_encoder", ("norm", "relative_position_bias_table")),
        ("other", "backbone", ("lang_prompts", "norm")),
        ("other", "", ("norm", "Norm", "prompt")),
    ):
        if component in official:
            return f"{part}_{'no_decay' if any(word in official for word in exempt) else 'decay'}"
    raise AssertionError("the last rule fits every name")
