"""The vision-language pixel decoder of CARIS: words and pixels, updated in turn, then a mask.

    V3, V2, V1 -> 1x1 conv -> tokens of three levels, coarse to fine    words -> Linear, LN; 5 learned prompts behind
                      |___________________ layer, 6 times ___________________|
    finest level -> up, + V0 -> features of each pixel at stride 4      [CLS] -> referent, mean prompt -> background
                      |______________ inner product = score _______________|
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from aml.models.checkpointing import recomputed

N_PROMPTS = 5
LEVELS, POINTS = 3, 4


class PixelDecoder(nn.Module):
    """channels: of V0 to V3. dim, layers, heads: width, depth and heads. ffn: widening of the feed-forward nets."""

    def __init__(
        self, channels: Sequence[int], text_dim: int, dim: int = 256, layers: int = 6, heads: int = 8, ffn: int = 4
    ):
        super().__init__()
        self.dim = dim
        self.checkpointing = False
        self.input_convs = nn.ModuleList(ConvNorm(width, dim, bias=True) for width in channels[:0:-1])
        self.level_encoding = nn.Embedding(LEVELS, dim)
        self.lang_in_linear = nn.Linear(text_dim, dim)
        self.lang_in_norm = nn.LayerNorm(dim)
        self.vis_prompts = nn.Embedding(N_PROMPTS, dim)
        self.encoder = nn.ModuleList(DecoderLayer(dim, heads, ffn) for _ in range(layers))
        self.lateral_convs = nn.ModuleList([ConvNorm(channels[0], dim)])
        self.output_convs = nn.ModuleList([ConvNorm(dim, dim, size=3)])
        self.mask_feature = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )
        self.lang_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, maps: Sequence[Tensor], words: Tensor, text_mask: Tensor) -> Tensor:
        """maps: V0 to V3. words: [B, L, text_dim]. Scores [B, 2, H / 4, W / 4]: background, referent."""
        levels = [conv(feature) for conv, feature in zip(self.input_convs, maps[:0:-1], strict=True)]
        grid = Grid.of(levels)
        pixels = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        position = self._position(grid, pixels.device)
        words = self.lang_in_norm(self.lang_in_linear(words))
        count = words.shape[1]
        words = torch.cat([words, self.vis_prompts.weight.expand(len(words), -1, -1)], dim=1)
        attended = F.pad(text_mask, (0, N_PROMPTS), value=True)[:, None, None]
        for layer in self.encoder:
            pixels, words = recomputed(self.checkpointing, layer, pixels, words, position, grid, attended)

        height, width = grid.sizes[-1]
        finest = pixels[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
        detail = self.lateral_convs[0](maps[0])
        features = detail + F.interpolate(finest, detail.shape[-2:], mode="bilinear", align_corners=False)
        features = self.mask_feature(F.relu(self.output_convs[0](features)))
        background, referent = words[:, count:].mean(dim=1), words[:, 0]
        classes = self.lang_embed(torch.stack([background, referent], dim=1))
        # The two scores are compared with each other: rounded to bf16, their difference would be lost in their size.
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("bkc,bchw->bkhw", classes.float(), features.float())

    def _position(self, grid: Grid, device: torch.device) -> Tensor:
        """[1, N, dim]: where a token is in its level, and which level that is."""
        rows = self.level_encoding.weight
        levels = [sine_position(size, self.dim, device) + row for size, row in zip(grid.sizes, rows, strict=True)]
        return torch.cat(levels).unsqueeze(0)


@dataclass
class Grid:
    """sizes: (height, width) of the levels, coarse to fine; shapes: the same as a tensor [3, 2].

    centres: [1, N, 3, 2], (x, y) of every token's centre in units of the image, once for each level to sample from.
    """

    sizes: list[tuple[int, int]]
    shapes: Tensor
    centres: Tensor

    @staticmethod
    def of(levels: Sequence[Tensor]) -> Grid:
        device = levels[0].device
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        centres = []
        for height, width in sizes:
            y = (torch.arange(height, device=device) + 0.5) / height
            x = (torch.arange(width, device=device) + 0.5) / width
            centres.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).view(-1, 2))
        shapes = torch.tensor(sizes, device=device)
        return Grid(sizes, shapes, torch.cat(centres)[None, :, None].expand(-1, -1, len(sizes), -1))


class DecoderLayer(nn.Module):
    """Words look at pixels, then at each other; pixels look at words, then around themselves in all levels.

    The positions are part of queries and keys of the pixels, never of values or residuals. The names of the norms are
    those of the published weights, hence their order.
    """

    def __init__(self, dim: int, heads: int, ffn: int):
        super().__init__()
        self.v2l_cross_attn = WideAttention(dim, heads)
        self.lang_self_attn = WideAttention(dim, heads)
        self.l2v_cross_attn = WideAttention(dim, heads)
        self.vis_self_attn = DeformableAttention(dim, heads)
        self.lang_mlp = FeedForward(dim, ffn)
        self.vis_mlp = FeedForward(dim, ffn)
        self.l_norm1, self.l_norm2, self.l_norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.v_norm1, self.v_norm2, self.v_norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.gamma_v2l = nn.Parameter(torch.ones(1, 1, dim))
        self.gamma_l2v = nn.Parameter(torch.ones(1, 1, dim))

    def forward(
        self, pixels: Tensor, words: Tensor, position: Tensor, grid: Grid, attended: Tensor
    ) -> tuple[Tensor, Tensor]:
        seen = self.v2l_cross_attn(words, pixels + position, pixels)
        words = self.l_norm1(words + self.gamma_v2l * seen)
        words = self.l_norm2(words + self.lang_self_attn(words, words, words, attended))
        words = self.l_norm3(words + self.lang_mlp(words))
        read = self.l2v_cross_attn(pixels + position, words, words, attended)
        pixels = self.v_norm2(pixels + self.gamma_l2v * read)
        pixels = self.v_norm1(pixels + self.vis_self_attn(pixels, position, grid))
        pixels = self.v_norm3(pixels + self.vis_mlp(pixels))
        return pixels, words


class WideAttention(nn.Module):
    """Multi-head attention whose inner width is four times the outer one."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, 4 * dim) for _ in range(3))
        self.out_proj = nn.Linear(4 * dim, dim)
        _init_linears(self)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attended: Tensor | None = None) -> Tensor:
        """attended: bool, broadcast to [B, heads, queries, keys]; None = all keys."""
        query, key, value = (
            projection(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        merged = F.scaled_dot_product_attention(query, key, value, attn_mask=attended)
        return self.out_proj(merged.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, ffn * dim)
        self.fc2 = nn.Linear(ffn * dim, dim)
        _init_linears(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(tokens)))


class DeformableAttention(DeformableDetrMultiscaleDeformableAttention):
    """Every pixel samples four points per head and level around itself; in float32 also under autocast."""

    def __init__(self, dim: int, heads: int):
        super().__init__(DeformableDetrConfig(d_model=dim, num_feature_levels=LEVELS), heads, POINTS)
        # Head k starts out looking in the direction of angle 2 pi k / heads, the points one behind the other.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        offsets = directions[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, LEVELS, -1, -1).flatten())
        for constant in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(constant)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, pixels: Tensor, position: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        with torch.autocast(pixels.device.type, enabled=False):
            sampled, _ = super().forward(
                hidden_states=pixels.float(),
                position_embeddings=position.float(),
                encoder_hidden_states=pixels.float(),
                reference_points=grid.centres,
                spatial_shapes=grid.shapes,
                spatial_shapes_list=grid.sizes,
            )
        return sampled


class ConvNorm(nn.Module):
    def __init__(self, channels: int, dim: int, size: int = 1, bias: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, size, padding=size // 2, bias=bias)
        self.gn = nn.GroupNorm(32, dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.gn(self.conv(features))


def sine_position(size: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """[H * W, dim]: sines and cosines of y in the first half, of x in the second; 1 at the last row and column."""
    channels = torch.arange(dim // 2, device=device)
    period = 10000.0 ** (2 * channels.div(2, rounding_mode="floor") / (dim // 2))
    halves = []
    for length in size:
        place = 2 * math.pi * (torch.arange(length, device=device) + 1) / (length + 1e-6)
        angle = place[:, None] / period
        halves.append(torch.where(channels % 2 == 0, angle.sin(), angle.cos()))
    height, width = size
    rows = halves[0][:, None].expand(height, width, -1)
    columns = halves[1][None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _init_linears(module: nn.Module) -> None:
    for child in module.children():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            nn.init.zeros_(child.bias)
