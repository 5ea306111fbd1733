"""Pictures of `aml demo`, from its results, and the look of all charts; nothing is computed here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aml.demo_results import CONDITIONS, STRATEGIES, condition_name
from aml.files import appearing_whole

# Distinct without colour vision, after Okabe and Ito.
COLOURS = {"none": "#555555", "random": "#56b4e9", "easiest": "#e69f00", "loss": "#009e73"}
MARKERS = {"none": "o", "random": "s", "easiest": "^", "loss": "D"}
INK, TARGET, TINT = "#1f2933", "#ffffff", np.array([1.0, 0.25, 0.38])
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
    "figure.facecolor": "white",
}
PICTURES = ("curves.png", "differences.png", "examples.png", "picture.png")


def draw_all(out: Path, results: dict[str, Any], examples: Sequence[dict[str, Any]]) -> None:
    """Write PICTURES into `out`. examples: see `aml.demo_examples`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        save_png(_curves(results), out / "curves.png")
        save_png(_differences(results), out / "differences.png")
        save_png(_examples_by_row(examples), out / "examples.png")
        save_png(_examples_by_column(examples), out / "picture.png")


def save_png(figure: Any, path: Path) -> None:
    """Whole, or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with appearing_whole(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _figure(width: float, height: float) -> Any:
    """A figure of its own, without pyplot's global state; 100 pixels per inch and unit."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=100, layout="constrained")


# ------------------------------------------------------------------------------------------------------- charts


def _curves(results: dict[str, Any]) -> Any:
    figure = _figure(11, 3.9)
    left, right = figure.subplots(1, 2)
    for name, found in results["strategies"].items():
        # Broad and below the others, with which it may coincide.
        look = {"color": COLOURS[name], "label": name} | ({"linewidth": 4, "zorder": 1.5} if name == "loss" else {})
        steps, losses = np.array(found["curves"]["loss"]).T
        left.plot(steps, losses, **look)
        epochs, scores = np.array(found["curves"]["mIoU"]).T
        right.plot(epochs, 100 * scores, marker=MARKERS[name], markersize=5, **look)
    left.set(title="Training loss, over the pixels each strategy counts", xlabel="optimizer step")
    right.set(title="mIoU on the validation scenes, %", xlabel="epoch")
    right.set_ylim(bottom=0)
    right.legend(loc="lower right")
    return figure


def _differences(results: dict[str, Any]) -> Any:
    figure = _figure(11, 3.4)
    axes = figure.subplots(1, len(CONDITIONS), sharex=True, sharey=True)
    names = STRATEGIES[1:]
    for axis, condition in zip(axes, CONDITIONS, strict=True):
        axis.axvline(0, color=COLOURS["none"], linewidth=1.2)
        for place, name in enumerate(reversed(names)):
            d = results["strategies"][name]["differences"][condition]
            axis.plot([100 * d["low"], 100 * d["high"]], [place] * 2, color=COLOURS[name], linewidth=3)
            axis.plot(100 * d["mIoU"], place, MARKERS[name], color=COLOURS[name], markersize=8)
            axis.annotate(
                f"{100 * d['mIoU']:+.1f}", (100 * d["mIoU"], place), (0, 9), textcoords="offset points", ha="center"
            )
        axis.set(title=condition_name(results, condition), ylim=(-0.5, len(names) - 0.3))
        axis.set_yticks(range(len(names)), list(reversed(names)))
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
    figure.supxlabel("mIoU minus that of none, in points; bars: 95 % bootstrap over unseen scenes", fontsize=10)
    return figure


# ----------------------------------------------------------------------------------------------------- examples


def _photo(axis: Any, example: dict[str, Any]) -> None:
    axis.imshow(example["image"])
    _outline(axis, example)


def _map(axis: Any, example: dict[str, Any]) -> None:
    axis.imshow(example["similarity"], cmap="viridis")
    _outline(axis, example)


def _left_out(axis: Any, example: dict[str, Any]) -> None:
    """What is left out is paper, hatched; the rest is the picture."""
    gone = example["left_out"]
    down, across = np.indices(gone.shape)
    paper = np.where((down + across) // 4 % 2, 0.93, 0.82)[..., None]
    axis.imshow(np.where(gone[..., None], paper, example["image"]))
    _outline(axis, example)


def _prediction(strategy: str) -> Callable[[Any, dict[str, Any]], None]:
    def draw(axis: Any, example: dict[str, Any]) -> None:
        mask = example[strategy][..., None]
        grey = example["image"].mean(axis=2, keepdims=True).repeat(3, axis=2)  # no colour but that of the mask
        axis.imshow(np.where(mask, 0.25 * grey + 0.75 * TINT, 0.35 + 0.6 * grey).clip(0, 1))
        _outline(axis, example)
        axis.set_xlabel(f"IoU {100 * example[f'{strategy}_iou']:.0f} %", fontsize=10, labelpad=3)

    return draw


def _outline(axis: Any, example: dict[str, Any]) -> None:
    """The target's edge: white on black, to be seen on everything."""
    for colour, width in (("black", 2.4), (TARGET, 1.1)):
        axis.contour(example["target"], [0.5], colors=colour, linewidths=width)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


PANELS: tuple[tuple[str, Callable[[Any, dict[str, Any]], None]], ...] = (
    ("image and target", _photo),
    ("similarity map", _map),
    ("pixels left out", _left_out),
    ("predicted: none", _prediction("none")),
    ("predicted: loss", _prediction("loss")),
)


def _examples_by_row(examples: Sequence[dict[str, Any]]) -> Any:
    """A row for every example, its sentence at the left: for the report."""
    figure = _figure(11, 1.95 * len(examples) + 0.4)
    grid = figure.subplots(len(examples), 1 + len(PANELS), squeeze=False, width_ratios=[0.8] + [1] * len(PANELS))
    for row, example in zip(grid, examples, strict=True):
        row[0].axis("off")
        sentence = textwrap.fill(f"“{example['sentence']}”", 17)
        row[0].text(0, 0.5, sentence, va="center", fontsize=11, transform=row[0].transAxes)
        for axis, (_, draw) in zip(row[1:], PANELS, strict=True):
            draw(axis, example)
    for axis, (title, _) in zip(grid[0, 1:], PANELS, strict=True):
        axis.set_title(title, fontsize=11)
    return figure


def _examples_by_column(examples: Sequence[dict[str, Any]]) -> Any:
    """A column for every example, its sentence above: 1600 pixels wide, for the README."""
    panels = [panel for panel in PANELS if panel[0] != "predicted: none"]
    side = 16 / (len(examples) + 0.15)
    figure = _figure(16, side * len(panels) + 0.9)
    grid = figure.subplots(len(panels), len(examples), squeeze=False)
    for axis, example in zip(grid[0], examples, strict=True):
        sentence = textwrap.fill(f"“{example['sentence']}”", 30)
        axis.set_title(sentence, fontsize=13, fontweight="normal", loc="center", va="bottom")
    for row, (title, draw) in zip(grid, panels, strict=True):
        for axis, example in zip(row, examples, strict=True):
            draw(axis, example)
        row[0].set_ylabel(title.replace("predicted: loss", "prediction"), fontsize=14, fontweight="bold")
    return figure
