"""The similarity maps that `aml alignment-report` compares, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from aml.alignment_scores import resized_map, target_auc, target_below
from aml.data.dataset import RISDataset, collate
from aml.data.pixels import cells_of_picture
from aml.evaluation import wrong_sentence
from aml.models.base import AlignmentInputs, RISModel
from aml.patchmax import PatchMax
from aml.strategies import RELEASED_BLOCK, BlockFilter, released_filter
from aml_kernels import sample_quantile

Map = Callable[[AlignmentInputs], Tensor]
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
TAU, RHO = 0.4, 0.25  # the paper's threshold and drop ratio
WITHOUT_TEXT = ("norm of the feature", "distance to the mean feature")
# Name in the report: settings of PatchMax, drawn anew for each seed.
UNTRAINED: dict[str, dict[str, Any]] = {
    "gaussian": {"projection": "gaussian"},
    "gaussian, softmax": {"projection": "gaussian", "softmax": True},
    "shared": {"projection": "shared"},
    "linear": {"projection": "linear"},
    "linear, softmax, all, raw": {"projection": "linear", "softmax": True, "words": "all", "normalize": False},
}
# Maps that the paper and the released code compare with TAU.
LITERAL: dict[str, dict[str, Any]] = {
    "paper: entries N(0, 1/2048)": UNTRAINED["gaussian, softmax"],
    "paper: entries N(0, 1)": UNTRAINED["gaussian, softmax"] | {"scale": 2048.0},
    "released code": UNTRAINED["linear, softmax, all, raw"],
}


def untrained_maps(model: RISModel, seeds: int, device: torch.device) -> dict[str, list[Map]]:
    """For each name its maps, one per seed."""
    sizes = model.visual_dim, model.text_dim
    found: dict[str, list[Map]] = {
        name: [PatchMax(*sizes, **settings, seed=seed).to(device) for seed in range(seeds)]
        for name, settings in UNTRAINED.items()
    }
    if sizes[0] == sizes[1]:
        name = "model" if model.shares_space else "none"
        found[name] = [PatchMax(*sizes, projection=name).to(device)]
    found[WITHOUT_TEXT[0]] = [lambda features: features.visual.float().norm(dim=1)]
    found[WITHOUT_TEXT[1]] = [_distance_to_mean]
    return found


def _distance_to_mean(features: AlignmentInputs) -> Tensor:
    visual = features.visual.float()
    return (visual - visual.mean((2, 3), keepdim=True)).norm(dim=1)


def trained_maps(
    model: RISModel, dataset: RISDataset, *, dim: int, steps: int, batch_size: int, lr: float, device: torch.device
) -> dict[str, list[Map]]:
    """A pair of linear maps learned on the sentences of `dataset` (built with train=False), the encoders as they are;
    as it is, and with a softmax over the words at the learned scale."""
    torch.manual_seed(0)
    pair = PatchMax(model.visual_dim, model.text_dim, dim=dim).to(device)
    optimizer = torch.optim.Adam(pair.parameters(), lr)
    order = _endless(len(dataset))
    batches = [[next(order) for _ in range(batch_size)] for _ in range(steps)]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
    for step, batch in enumerate(tqdm(loader, desc="train the pair", unit="step", disable=None, leave=False)):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        with torch.no_grad():
            features = model.encode(*(batch[name].to(device) for name in ("image", "tokens", "text_mask")))
        similarity, valid = pair(features), batch["valid"].to(device) if "valid" in batch else None
        loss = pair.auxiliary_loss(similarity, batch["target"].to(device), cells_of_picture(similarity, valid))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    softmax = PatchMax(model.visual_dim, model.text_dim, dim=dim, softmax=True, scale=pair.log_scale.exp().item())
    softmax.projection = pair.projection
    return {"trained": [pair], "trained, softmax": [softmax.to(device)]}


def _endless(count: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def measure(
    model: RISModel,
    dataset: RISDataset,
    maps: dict[str, list[Map]],
    *,
    indices: list[int],
    batch_size: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One record per sentence: sample_id, image_id, words; per map and seed, in `maps`, [auc, auc with a wrong
    sentence, shares of the target below each of QUANTILES, shares of all pixels]; in `literal`, those of `_literal`."""
    sizes = model.visual_dim, model.text_dim
    literal = {name: PatchMax(*sizes, **settings).to(device) for name, settings in LITERAL.items()}
    records: list[dict[str, Any]] = []
    loader = DataLoader(Subset(dataset, indices), batch_size, collate_fn=collate)
    for batch in tqdm(loader, desc="measure", unit="batch", disable=None, leave=False):
        image, tokens, text_mask, target = (
            batch[name].to(device) for name in ("image", "tokens", "text_mask", "target")
        )
        valid = batch["valid"].to(device) if "valid" in batch else None
        positions = batch["index"].tolist()
        features = model.encode(image, tokens, text_mask)
        other = model.tokenize([wrong_sentence(dataset, position) for position in positions])
        wrong = model.encode(image, *(tensor.to(device) for tensor in other))
        scores: dict[str, list[Tensor]] = {}
        for name, seeds in maps.items():
            scores[name] = []
            for one in seeds:
                similarity = one(features)
                cells = cells_of_picture(similarity, valid)
                limits = torch.stack([sample_quantile(similarity, q, valid=cells) for q in QUANTILES])
                right = target_auc(similarity, target, valid)
                swapped = right if name in WITHOUT_TEXT else target_auc(one(wrong), target, valid)
                lost = target_below(similarity, target, limits, valid)
                left_out = target_below(similarity, torch.ones_like(target), limits, valid)
                scores[name].append(torch.cat([right[None], swapped[None], lost, left_out]).T.cpu())
        fixed = {name: _literal(one(features), image, target, valid) for name, one in literal.items()}
        for i, position in enumerate(positions):
            expression = dataset.expressions[position]
            records.append(
                {
                    "sample_id": expression.sample_id,
                    "image_id": expression.image_id,
                    "words": int(features.text_mask[i].sum()),
                    "maps": {name: [seed[i].tolist() for seed in seeds] for name, seeds in scores.items()},
                    "literal": {
                        name: {key: column[i].item() for key, column in columns.items()}
                        for name, columns in fixed.items()
                    },
                }
            )
    return records


def _literal(similarity: Tensor, image: Tensor, target: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """What a fixed limit TAU does to a map, columns [B]: its largest score, the shares of pixels and of target pixels
    below, and the shares of the image that are dropped by three readings of "a random quarter"; padding counts for
    nothing, and the released code's reading knows none."""
    limit, cells = similarity.new_full((len(similarity),), TAU), cells_of_picture(similarity, valid)
    exists = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
    weak = (resized_map(similarity, target.shape[1:]) < TAU) & exists
    counts, pixels = (
        F.avg_pool2d(each[:, None].float(), RELEASED_BLOCK, ceil_mode=True, divisor_override=1)[:, 0]
        for each in (weak, exists)
    )
    share = pixels / pixels.sum((1, 2), keepdim=True)  # of the picture, that is in a block
    by_block = BlockFilter(RHO, max_dropped=1.0).weak(image, similarity, limit, 0, map_valid=cells)[1]
    columns = {
        "largest": (similarity if cells is None else similarity.masked_fill(~cells, -torch.inf)).amax((1, 2)),
        "below": weak.sum((1, 2)) / exists.sum((1, 2)),
        "target_below": target_below(similarity, target, limit[None], valid)[0],
        "by_pixel": ((1 - (1 - RHO) ** counts) * share).sum((1, 2)),
        "by_block": (by_block * share).sum((1, 2)),
    }
    if valid is None and image.shape[2] == image.shape[3] and image.shape[2] % RELEASED_BLOCK == 0:
        generator = torch.Generator().manual_seed(0)
        _, dropped = released_filter(image, similarity, limit, lambda n: torch.randperm(n, generator=generator))
        columns["released"] = dropped.float().mean((1, 2))
    return columns


def released_shares(draws: int = 20) -> list[dict[str, float]]:
    """What the released masking drops of an image of 14 x 14 blocks when `low` of them are below the limit: scattered
    (0.2 among 0.6), or as the lowest part of a smooth map. Beside a quarter of the low blocks."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(draws, 1, 448, 448)
    rows = []
    for low in (1, 5, 10, 20, 40, 80, 160):
        scattered = torch.rand(draws, 196, generator=generator).argsort(1) < low
        noise = torch.randn(draws, 1, 4, 4, generator=generator)
        smooth = F.interpolate(noise, (14, 14), mode="bicubic", align_corners=True)[:, 0]
        cases = {
            "scattered": (torch.where(scattered, 0.2, 0.6).view(draws, 14, 14), torch.full((draws,), TAU)),
            "smooth": (smooth, smooth.flatten(1).sort(1).values[:, low]),
        }
        row = {"low": low / 196, "quarter": low / 196 / 4}
        for name, (similarity, limit) in cases.items():
            _, dropped = released_filter(image, similarity, limit, lambda n: torch.randperm(n, generator=generator))
            row[name] = dropped.float().mean().item()
        rows.append(row)
    return rows


def literal_summary(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means of `_literal` over the sentences: for each map "all", and by the number of words."""
    groups = {"all": records} | {
        str(count): [record for record in records if record["words"] == count]
        for count in sorted({record["words"] for record in records})
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, columns in records[0]["literal"].items():
        found[name] = {}
        for group, members in groups.items():
            row: dict[str, float] = {"sentences": len(members)}
            for key in columns:
                values = [record["literal"][name][key] for record in members]
                values = [value for value in values if not math.isnan(value)]
                row[key] = math.fsum(values) / max(len(values), 1)
            found[name][group] = row
    return found


def summary(records: list[dict[str, Any]], name: str, seed: int) -> dict[str, Any]:
    """Means over the sentences of one map, and the standard error of its AUC over images, whose sentences belong
    together."""
    rows = [(record["image_id"], record["maps"][name][seed]) for record in records]
    rows = [(image, row) for image, row in rows if not math.isnan(row[0])]
    if not rows:
        raise ValueError("no sentence has a target that is neither empty nor the whole image")
    table = torch.tensor([row for _, row in rows], dtype=torch.float64)
    mean = table.mean(0)
    residual: dict[int, float] = {}
    for (image, _), value in zip(rows, table[:, 0] - mean[0], strict=True):
        residual[image] = residual.get(image, 0.0) + value.item()
    images = len(residual)
    variance = math.fsum(value**2 for value in residual.values()) / len(rows) ** 2 * images / max(images - 1, 1)
    auc, wrong, *shares = mean.tolist()
    lost, left_out = shares[: len(QUANTILES)], shares[len(QUANTILES) :]
    return {"auc": auc, "error": math.sqrt(variance), "wrong": wrong, "lost": lost, "left_out": left_out}
