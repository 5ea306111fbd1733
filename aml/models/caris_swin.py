"""Swin Transformer as CARIS runs it: timm's modules and weights, with another order of padding and shifting.

Where a grid is not made of whole windows, timm shifts it and then pads it, and shrinks the window on small grids. The
weights of CARIS were trained with the grid padded first and with full windows everywhere, so the blocks are run here.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import MethodType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from aml.models.checkpointing import recomputed
from aml.models.weights import read_weights

PATCH = 4
# Of a classification file, what a backbone has no use for; relative positions and masks are computed.
_UNUSED = re.compile(r"^(norm|head)\.|\.relative_position_index$|\.attn_mask$")


class SwinBackbone(nn.Module):
    """Image [B, 3, H, W] of any size -> four maps [B, C, ceil(H / s), ceil(W / s)], s = 4, 8, 16, 32.

    name: a timm Swin, such as "swin_base_patch4_window7_224"; a tag behind a point names its weights (".ms_in22k").
    pretrained: take timm's weights, from its cache or the hub, or those in the file `weights`: the .pth that the
        authors of Swin published, or timm's .safetensors.
    drop_path: rate of the last block; it rises linearly from 0.
    options: of timm's `SwinTransformer`, for other sizes (embed_dim, depths, num_heads, window_size).
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | Path | None = None,
        drop_path: float = 0.3,
        **options: Any,
    ):
        super().__init__()
        trunk = _build(name, pretrained and weights is None, drop_path, options)
        self.patch_embed, self.layers = trunk.patch_embed, trunk.layers
        for block in (block for stage in self.layers for block in stage.blocks):
            block.forward = MethodType(_run_block, block)  # called as a module, so that FSDP can divide it
        self.channels = [info["num_chs"] for info in trunk.feature_info]
        self.checkpointing = False
        if pretrained and weights is not None:
            self._load(Path(weights))
        # Each map has a norm of its own; a classifier has only one, after the last stage.
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        height, width = image.shape[-2:]
        grid = self.patch_embed(F.pad(image, (0, -width % PATCH, 0, -height % PATCH)))
        maps = []
        for stage, norm in zip(self.layers, self.norms, strict=True):
            grid = stage.downsample(grid)
            mask = _region_mask(grid, stage.blocks)
            for block in stage.blocks:
                grid = recomputed(self.checkpointing, block, grid, mask)
            maps.append(norm(grid).permute(0, 3, 1, 2).contiguous())
        return maps

    def _load(self, path: Path) -> None:
        stored = read_weights(path)
        # The published files merge patches at the end of a stage, timm at the start of the next.
        behind = "layers.0.downsample.reduction.weight" in stored
        renamed = {
            re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + behind}.downsample", key): value
            for key, value in stored.items()
            if not _UNUSED.search(key)
        }
        try:
            self.load_state_dict(renamed)
        except RuntimeError as error:
            raise ValueError(f"{path} holds no weights of this Swin: {error}") from error


def _build(name: str, pretrained: bool, drop_path: float, options: dict[str, Any]) -> Any:
    architecture = name.split(".")[0]
    known = [m for m in timm.list_models("swin_*") if not m.startswith("swin_s3")]
    if architecture not in known:
        near = ", ".join(difflib.get_close_matches(architecture, known, n=3, cutoff=0.4) or known)
        raise ValueError(f"backbone={name!r} is no Swin Transformer of timm; near it: {near}")
    try:
        return timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=0,
            drop_path_rate=drop_path,
            always_partition=True,  # full windows on small grids too
            strict_img_size=False,
            **options,
        )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"backbone={name!r}: its weights are neither in the local cache nor to be had from the hub. Give a file of "
            f"them (model.backbone_weights=FILE), or start from random weights (model.pretrained=false). {error}"
        ) from error


def _run_block(block: Any, grid: Tensor, mask: Tensor | None) -> Tensor:
    grid = grid + block.drop_path1(_window_attention(block, block.norm1(grid), mask))
    return grid + block.drop_path2(block.mlp(block.norm2(grid)))


def _window_attention(block: Any, grid: Tensor, mask: Tensor | None) -> Tensor:
    """grid: [B, H, W, C], normalised. Padding is therefore exactly zero, and takes part as keys."""
    height, width, channels = grid.shape[1:]
    padded = _pad(grid, block.window_size)
    shift = block.shift_size
    shifted = any(shift)
    if shifted:
        padded = padded.roll((-shift[0], -shift[1]), dims=(1, 2))
    windows = window_partition(padded, block.window_size).flatten(1, 2)
    windows = block.attn(windows, mask=mask if shifted else None)
    padded = window_reverse(
        windows.unflatten(1, block.window_size), block.window_size, padded.shape[1], padded.shape[2]
    )
    if shifted:
        padded = padded.roll(shift, dims=(1, 2))
    return padded[:, :height, :width]


def _pad(grid: Tensor, window: tuple[int, int]) -> Tensor:
    return F.pad(grid, (0, 0, 0, -grid.shape[2] % window[1], 0, -grid.shape[1] % window[0]))


def _region_mask(grid: Tensor, blocks: Any) -> Tensor | None:
    """-100 between tokens of a window that only the cyclic shift has brought together; one for all shifted blocks."""
    block = next((block for block in blocks if any(block.shift_size)), None)
    if block is None:
        return None
    with torch.no_grad():
        return block.get_attn_mask(_pad(grid, block.window_size))
