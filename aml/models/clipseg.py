"""CLIPSeg (Lüddecke and Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022), as transformers has it.

Both towers of CLIP stay frozen, as published; a decoder of a million weights is trained. Pixels and words are compared
in CLIP's own joint space, through the two projections that CLIP was trained with: none has to be learned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm.data
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from aml.models import pretrained as sources
from aml.models.base import AlignmentInputs
from aml.models.words import TokenizedModel

CLIPSEG = "CIDAS/clipseg-rd64-refined"
# Its architecture, where neither a folder nor the cache tells it.
_RD64: dict[str, Any] = {"vision_config": {"patch_size": 16}, "use_complex_transposed_convolution": True}


class CLIPSegRIS(TokenizedModel):
    """The CLIPSeg of a folder or of the Hugging Face hub.

    backbone: a folder that transformers reads, or a hub name that is in the cache or can be downloaded.
    pretrained: read its weights. False for random ones, or before loading a checkpoint.
    freeze_encoders: must be true: CLIPSeg runs its towers without gradient.
    image_size: side of the square that images are resized to, a multiple of the patch size.
    max_tokens: longer sentences are cut, start and end tokens included.
    """

    shares_space = True

    def __init__(
        self,
        backbone: str = CLIPSEG,
        pretrained: bool = True,
        freeze_encoders: bool = True,
        image_size: int = 352,
        max_tokens: int = 20,
    ):
        super().__init__()
        if not freeze_encoders:
            raise ValueError("freeze_encoders=False: CLIPSeg trains its decoder only; leave the setting out")
        self.clipseg, tokenizer = _build(backbone, pretrained)
        config = self.clipseg.config
        patch = config.vision_config.patch_size
        if image_size % patch:
            raise ValueError(f"image_size={image_size} must be a multiple of the patch size {patch} of {backbone}")
        self.image_size, self.max_tokens = image_size, max_tokens
        self.require_positions(config.text_config, backbone)
        self.image_mean, self.image_std = _colours(backbone)
        self.visual_dim = self.text_dim = config.projection_dim
        self.clipseg.clip.requires_grad_(False)
        self.set_tokenizer(tokenizer)
        self.train()

    def encoders(self) -> list[nn.Module]:
        return [self.clipseg.clip]

    def train(self, mode: bool = True) -> CLIPSegRIS:
        super().train(mode)
        self.clipseg.clip.eval()
        return self

    @torch.no_grad()
    def encode(self, image: Tensor, tokens: Tensor, text_mask: Tensor) -> AlignmentInputs:
        words, _ = self._words(tokens, text_mask)
        patches = self.clipseg.clip.vision_model(pixel_values=image, interpolate_pos_encoding=True).last_hidden_state
        return AlignmentInputs(
            self._pixels(patches, image), words, self.real_words(tokens, text_mask), attended=text_mask
        )

    def forward(
        self, image: Tensor, tokens: Tensor, text_mask: Tensor, return_alignment: bool = False
    ) -> Tensor | tuple[Tensor, AlignmentInputs]:
        words, sentence = self._words(tokens, text_mask)
        output = self.clipseg(pixel_values=image, conditional_embeddings=sentence, interpolate_pos_encoding=True)
        logits = output.logits.view(len(image), *output.logits.shape[-2:])
        if not return_alignment:
            return logits
        pixels = self._pixels(output.vision_model_output.last_hidden_state, image)
        return logits, AlignmentInputs(pixels, words, self.real_words(tokens, text_mask), attended=text_mask)

    @torch.no_grad()
    def _words(self, tokens: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Words [B, L, D] in the joint space, and the sentence [B, D] that the decoder is told."""
        clip = self.clipseg.clip
        output = clip.text_model(input_ids=tokens, attention_mask=text_mask.long())
        return clip.text_projection(output.last_hidden_state), clip.text_projection(output.pooler_output)

    @torch.no_grad()
    def _pixels(self, patches: Tensor, image: Tensor) -> Tensor:
        """Patches, behind the class token, to [B, D, h, w] in the joint space."""
        clip, patch = self.clipseg.clip, self.clipseg.config.vision_config.patch_size
        # The projection was trained behind this norm, on the class token; the patches go the same way.
        projected = clip.visual_projection(clip.vision_model.post_layernorm(patches[:, 1:]))
        return projected.transpose(1, 2).unflatten(2, (image.shape[-2] // patch, image.shape[-1] // patch))


def _build(name: str, pretrained: bool) -> tuple[Any, Tokenizer | None]:
    try:
        if pretrained:
            with sources.no_progress_bar():
                return transformers.CLIPSegForImageSegmentation.from_pretrained(name), sources.tokenizer(name)
        if name == CLIPSEG:  # the tokenizer comes with a checkpoint
            return transformers.CLIPSegForImageSegmentation(transformers.CLIPSegConfig(**_RD64)), None
        config = transformers.CLIPSegConfig.from_pretrained(name)
        return transformers.CLIPSegForImageSegmentation(config), sources.tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"backbone={name!r} cannot be read: give {CLIPSEG!r}, or a folder with a CLIPSeg that transformers reads; "
            f"random weights of {CLIPSEG} need no file (model.pretrained=false). {error}"
        ) from error


def _colours(name: str) -> tuple[Any, Any]:
    """Mean and std of the images: as the folder says, or ImageNet's, which CLIPSeg was trained with."""
    file = Path(name) / "preprocessor_config.json"
    if not file.is_file():
        return timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    settings = json.loads(file.read_text(encoding="utf-8"))
    return tuple(settings["image_mean"]), tuple(settings["image_std"])
