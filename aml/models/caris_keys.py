"""Names of CARIS's tensors: those of the released checkpoints and ours, one for one.

A key is matched by exactly one rule, or it is unexpected. `KEEP` has an inverse, so that what the released program
decides by name (which parameters decay) can be decided here by the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# Computed when the model is built, or a constant of the loss.
DROP = (
    r"^backbone\.vis_encoder\..*\.(relative_position_index|attn_mask)$",
    r"^backbone\.lang_encoder\.(embeddings\.position_ids$|pooler\.)",
    r"^criterion\.",
)
# The released alignment layer: no part of the network at inference, never trained (its gradient is always zero).
ALIGNMENT = r"^aug\.((?:text_proj|fuse_gate)\.(?:weight|bias))$"
# Stage i of the released Swin merges patches at its end, ours at the start of stage i + 1.
MERGE = r"^backbone\.vis_encoder\.layers\.(\d+)\.downsample\.(.+)$"
KEEP = (
    ("backbone.vis_encoder.layers.", "visual.layers."),
    ("backbone.vis_encoder.norm", "visual.norms."),
    ("backbone.vis_encoder.patch_embed.", "visual.patch_embed."),
    ("backbone.lang_encoder.", "text."),
    ("backbone.conditional_prompts.", "prompts."),
    ("pixel_decoder.", "decoder."),
)


@dataclass
class Renamed:
    """Official keys sorted by what becomes of them. `model` and `alignment`: our name -> official key."""

    model: dict[str, str] = field(default_factory=dict)
    alignment: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def rename(keys: Iterable[str]) -> Renamed:
    renamed = Renamed()
    for key in keys:
        if any(re.search(rule, key) for rule in DROP):
            renamed.dropped.append(key)
        elif alignment := re.search(ALIGNMENT, key):
            renamed.alignment[alignment[1]] = key
        elif (own := own_name(key)) is not None:
            renamed.model[own] = key
        else:
            renamed.unexpected.append(key)
    return renamed


def own_name(official: str) -> str | None:
    """Our name of a tensor of the network, or None if there is no rule for it."""
    if merge := re.search(MERGE, official):
        return f"visual.layers.{int(merge[1]) + 1}.downsample.{merge[2]}"
    return next((own + official.removeprefix(theirs) for theirs, own in KEEP if official.startswith(theirs)), None)


def official_name(own: str) -> str:
    """The inverse of `own_name`."""
    if merge := re.search(r"^visual\.layers\.(\d+)\.downsample\.(.+)$", own):
        return f"backbone.vis_encoder.layers.{int(merge[1]) - 1}.downsample.{merge[2]}"
    return next(theirs + own.removeprefix(ours) for theirs, ours in KEEP if own.startswith(ours))
