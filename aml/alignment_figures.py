"""Pictures of `aml alignment-report`: scores of the maps, and the maps over images."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from aml.alignment_maps import Map
from aml.alignment_scores import resized_map, target_auc
from aml.data.dataset import RISDataset, collate
from aml.data.pixels import cells_of_picture
from aml.evaluation import wrong_sentence
from aml.figures import INK, STYLE, TARGET, save_png
from aml.models.base import RISModel
from aml_kernels import sample_quantile

SHOWN = ("of this run", "trained", "gaussian", "linear", "model", "none", "norm of the feature")
LEFT_OUT = 0.25  # the quantile that is outlined
COLOURS = ("#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#0072b2", "#d55e00", "#777777", "#000000")


@matplotlib.rc_context(STYLE)
def draw_scores(path: Path, results: dict[str, Any]) -> None:
    """AUC per map, with the right and with a wrong sentence; share of the target lost per quantile."""
    maps = results["maps"]
    figure = Figure((12, 0.36 * len(maps) + 1.9), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for place, seeds in enumerate(reversed(maps.values())):
        for seed in seeds:
            span = [seed["auc"] - 1.96 * seed["error"], seed["auc"] + 1.96 * seed["error"]]
            left.plot(span, [place] * 2, color=COLOURS[0], linewidth=2, alpha=0.5)
            left.plot(seed["wrong"], place, "o", markerfacecolor="white", markeredgecolor=INK, markersize=6)
            left.plot(seed["auc"], place, "o", color=COLOURS[0], markersize=7)
    left.axvline(0.5, color=INK, linewidth=1, linestyle=":")
    left.set(title="AUC against the target (hollow: wrong sentence)", xlim=(0.3, 1), ylim=(-0.6, len(maps) - 0.4))
    left.set_yticks(range(len(maps)), list(reversed(maps)))
    left.grid(axis="y", visible=False)
    right.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":", label="a map that knows nothing")
    for colour, name in zip(COLOURS, (name for name in SHOWN if name in maps), strict=False):
        across, up = (np.mean([seed[key] for seed in maps[name]], axis=0) for key in ("left_out", "lost"))
        right.plot([0, *across, 1], [0, *up, 1], marker="o", markersize=4, color=colour, label=name)
    right.set(title="Target left out, unprotected", xlabel="share of all pixels left out", xlim=(0, 1), ylim=(0, 1))
    right.legend(loc="upper left", fontsize=8.5)
    save_png(figure, path)


@matplotlib.rc_context(STYLE)
@torch.no_grad()
def draw_maps(
    path: Path,
    model: RISModel,
    dataset: RISDataset,
    maps: dict[str, list[Map]],
    indices: list[int],
    device: torch.device,
) -> None:
    """A row per sentence: the image with its target, and maps over it; outlined in black is what the lowest quarter of
    the map leaves out. Behind the first map, the same one for a wrong sentence."""
    batch = collate([dataset[index] for index in indices])
    image, target, valid = batch["image"].to(device), batch["target"], batch.get("valid")
    others = [wrong_sentence(dataset, index) for index in indices]
    wrong = model.encode(image, *(tensor.to(device) for tensor in model.tokenize(others)))
    right = model.encode(image, batch["tokens"].to(device), batch["text_mask"].to(device))
    names = [name for name in SHOWN if name in maps]
    columns = {name: maps[name][0](right).cpu() for name in names}
    first = names[0]
    columns = {first: columns[first], f"{first}, wrong sentence": maps[first][0](wrong).cpu()} | columns
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image_mean, model.image_std))
    pictures = (batch["image"] * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    figure = Figure((2.1 * (1 + len(columns)), 2.45 * len(indices) + 0.3), dpi=100, layout="constrained")
    grid = figure.subplots(len(indices), 1 + len(columns), squeeze=False)
    for row, index in enumerate(indices):
        sentence = textwrap.fill(dataset.expressions[index].sentence, 28)
        _panel(grid[row][0], pictures[row], target[row].numpy())
        grid[row][0].set_title(sentence, fontsize=9, fontweight="normal", loc="center")
        for axis, (name, similarity) in zip(grid[row][1:], columns.items(), strict=True):
            one = similarity[row : row + 1]
            exists = None if valid is None else valid[row : row + 1]
            score = target_auc(one, target[row : row + 1], exists).item()
            full = resized_map(one, target.shape[1:])[0].numpy()
            _panel(axis, pictures[row].mean(axis=2, keepdims=True).repeat(3, axis=2), target[row].numpy())
            axis.imshow(full, cmap="viridis", alpha=0.62)
            limit = sample_quantile(one, LEFT_OUT, valid=cells_of_picture(one, exists)).item()
            axis.contour(full, [limit], colors="black", linewidths=1, linestyles="solid")
            axis.set_title(f"{textwrap.fill(name, 22)}\nAUC {score:.2f}", fontsize=9, fontweight="normal", loc="center")
            if name.endswith("wrong sentence"):
                axis.set_xlabel(textwrap.fill(others[row], 28), fontsize=7.5)
    save_png(figure, path)


def _panel(axis: Any, picture: np.ndarray, target: np.ndarray) -> None:
    axis.imshow(picture)
    for colour, width in (("black", 2.6), (TARGET, 1.2)):
        axis.contour(target, [0.5], colors=colour, linewidths=width)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)

