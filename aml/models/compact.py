"""A small referring segmentation model: pretrained encoders, a joint transformer, a light pixel decoder.

image -> backbone -> strides 4, 8, 16, 32          sentence -> text encoder -> words
                             |_____ stride 16 (+32) _____ + position ____|
                               joint transformer over pixels and words
                 FiLM and skip connections up to stride 4   |   mean of the words = sentence
                                  pixel embedding . sentence embedding = logit
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aml.models.base import AlignmentInputs
from aml.models.memo import FeatureMemo
from aml.models.pretrained import BACKBONE, TEXT_ENCODER, build_backbone, build_text_encoder
from aml.models.words import TokenizedModel

STRIDES = (4, 8, 16, 32)


class CompactRIS(TokenizedModel):
    """Any timm backbone with `features_only`, any transformers text encoder, a decoder of 0.7 million weights.

    backbone: a timm name; its maps at strides 4, 8, 16 and 32 are used.
    text_encoder: "minilm", a folder that transformers reads, or a hub name that is in the local cache.
    image_size: side of the square input; forward takes other sizes as well.
    freeze_encoders: run both encoders in eval mode without gradient (fast; right for small data and CPUs).
    pretrained: read the encoders' weights. False for training from scratch, or before loading a checkpoint.
    dim, layers, dropout: width and depth of the joint transformer, and its dropout.
    max_tokens: longer sentences are cut, [CLS] and [SEP] included.
    memo_mb: on a CPU, memory for what a frozen backbone said about images that may come again (see `FeatureMemo`).
    """

    def __init__(
        self,
        backbone: str = BACKBONE,
        text_encoder: str = TEXT_ENCODER,
        image_size: int = 224,
        freeze_encoders: bool = True,
        pretrained: bool = True,
        dim: int = 128,
        layers: int = 2,
        dropout: float = 0.0,
        max_tokens: int = 20,
        memo_mb: int = 512,
    ):
        super().__init__()
        if image_size < STRIDES[-1]:
            raise ValueError(f"image_size={image_size} is too small: at least {STRIDES[-1]} is needed")
        if dim % 64:
            raise ValueError(f"dim={dim} must be a multiple of 64 (heads of 32 channels, half at stride 4)")
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.freeze_encoders = freeze_encoders
        self.backbone, self.image_mean, self.image_std = build_backbone(backbone, pretrained)
        reductions = self.backbone.feature_info.reduction()
        if not set(STRIDES) <= set(reductions):
            raise ValueError(f"backbone={backbone!r} has maps at strides {reductions}; {STRIDES} are needed")
        self._maps = [reductions.index(stride) for stride in STRIDES]
        channels = [self.backbone.feature_info.channels()[index] for index in self._maps]
        self.memo = FeatureMemo(memo_mb * 2**20, self._maps)
        self.text_encoder, tokenizer = build_text_encoder(text_encoder, pretrained)
        self.require_positions(self.text_encoder.config, text_encoder)
        self.visual_dim = channels[2]
        self.text_dim = self.text_encoder.config.hidden_size
        self.decoder = FusionDecoder(channels, self.text_dim, dim, layers, dropout)
        self.set_tokenizer(tokenizer)
        if freeze_encoders:
            for encoder in self.encoders():
                encoder.requires_grad_(False)
        self.train()

    def encoders(self) -> list[nn.Module]:
        return [self.backbone, self.text_encoder]

    def train(self, mode: bool = True) -> CompactRIS:
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
        logits = self.decoder(maps, words, text_mask)
        return (logits, self._alignment(maps, words, tokens, text_mask)) if return_alignment else logits

    def _encode(self, image: Tensor, tokens: Tensor, text_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoders):
            if self._may_remember(image):
                maps = self.memo(self.backbone, image)
            else:
                maps = self.backbone(image)
                maps = [maps[index] for index in self._maps]
            words = self.text_encoder(input_ids=tokens, attention_mask=text_mask.long()).last_hidden_state
        if maps[0].shape[1] != self.decoder.lateral4.in_channels:  # Swin and its kin give channels last
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        return maps, words

    def _may_remember(self, image: Tensor) -> bool:
        plain = image.device.type == "cpu" and not image.requires_grad and not torch.is_autocast_enabled("cpu")
        return self.freeze_encoders and plain and not torch.compiler.is_compiling()

    def _alignment(self, maps: list[Tensor], words: Tensor, tokens: Tensor, text_mask: Tensor) -> AlignmentInputs:
        return AlignmentInputs(maps[2], words, self.real_words(tokens, text_mask), attended=text_mask)


class FusionDecoder(nn.Module):
    """Backbone maps at strides 4, 8, 16, 32 and words -> logits at stride 4."""

    def __init__(self, channels: Sequence[int], text_dim: int, dim: int, layers: int, dropout: float):
        super().__init__()
        fine = dim // 2
        self.lateral4 = nn.Conv2d(channels[0], fine, 1)
        self.lateral8 = nn.Conv2d(channels[1], dim, 1)
        self.lateral16 = nn.Conv2d(channels[2], dim, 1)
        self.lateral32 = nn.Conv2d(channels[3], dim, 1)
        self.pixel_norm = nn.LayerNorm(dim)
        self.position = nn.Linear(4 * N_WAVES + 2, dim)
        self.words = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.sentence = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.gate = WordGate(dim)
        self.joint = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, dim // 32, 2 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.film8 = Film(dim, dim)
        self.reduce = nn.Conv2d(dim, fine, 1)
        self.film4 = Film(dim, fine)
        self.query = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, fine))
        self.bias = nn.Parameter(torch.tensor([-2.0]))  # most pixels are background

    def forward(self, maps: list[Tensor], words: Tensor, text_mask: Tensor) -> Tensor:
        map4, map8, map16, map32 = maps
        coarse = self.lateral16(map16) + _resize(self.lateral32(map32), map16)
        height, width = coarse.shape[-2:]
        pixels = self.pixel_norm(coarse.flatten(2).transpose(1, 2)) + self.position(_coordinates(coarse))
        sentence = self.sentence(_mean(words, text_mask))
        words = self.words(words)
        pixels = self.gate(pixels, words, sentence, text_mask)
        tokens = torch.cat([pixels, words], dim=1)
        ignored = F.pad(~text_mask, (height * width, 0))  # every pixel is attended to
        for layer in self.joint:
            tokens = layer(tokens, src_key_padding_mask=ignored)
        pixels, words = tokens.split([height * width, words.shape[1]], dim=1)
        coarse = pixels.transpose(1, 2).unflatten(2, (height, width))
        sentence = sentence + _mean(words, text_mask)

        features = self.film8(self.lateral8(map8) + _resize(coarse, map8), sentence)
        features = self.film4(self.lateral4(map4) + _resize(self.reduce(features), map4), sentence)
        query = self.query(sentence)
        return torch.einsum("bchw,bc->bhw", features, query) / math.sqrt(query.shape[1]) + self.bias


class WordGate(nn.Module):
    """Each pixel times the words it attends to and the sentence: learns attributes far sooner than addition alone."""

    def __init__(self, dim: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, dim // 32, batch_first=True)
        self.pixel, self.word, self.sentence, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, pixels: Tensor, words: Tensor, sentence: Tensor, text_mask: Tensor) -> Tensor:
        attended, _ = self.attention(pixels, words, words, key_padding_mask=~text_mask, need_weights=False)
        wanted = self.word(attended) + self.sentence(sentence).unsqueeze(1)
        return pixels + self.out(F.gelu(self.pixel(pixels)) * wanted)


class Film(nn.Module):
    """Separable 3x3 convolution whose normalised output the sentence scales and shifts (Perez et al., "FiLM", 2018)."""

    def __init__(self, sentence_dim: int, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1)
        )
        self.norm = nn.GroupNorm(channels // 16, channels)
        self.modulation = nn.Linear(sentence_dim, 2 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:
        scale, shift = self.modulation(sentence)[..., None, None].chunk(2, dim=1)
        return features + F.gelu(self.norm(self.conv(features)) * (1 + scale) + shift)


N_WAVES = 6


def _coordinates(features: Tensor) -> Tensor:
    """[B, h * w, 4 * N_WAVES + 2]: x and y in [-1, 1] and their sines and cosines at doubling frequencies."""
    height, width = features.shape[-2:]
    y = torch.linspace(-1 + 1 / height, 1 - 1 / height, height, device=features.device)
    x = torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=features.device)
    points = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2)
    waves = math.pi / 2 * 2.0 ** torch.arange(N_WAVES, device=features.device)
    angles = (points.unsqueeze(-1) * waves).flatten(1)
    encoded = torch.cat([points, angles.sin(), angles.cos()], dim=1)
    return encoded.to(features.dtype).expand(features.shape[0], -1, -1)


def _mean(words: Tensor, text_mask: Tensor) -> Tensor:
    return torch.where(text_mask.unsqueeze(-1), words, 0).sum(1) / text_mask.sum(1, keepdim=True)


def _resize(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)
