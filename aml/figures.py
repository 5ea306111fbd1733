"""Pictures and report.html of `aml demo`, from its results; nothing is computed here."""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aml.demo_results import CONDITIONS, SHOWN, STRATEGIES, condition_name, difference_text, verdict

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
    """Write PICTURES into `out`. examples: see `aml.demo.make_examples`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _save(_curves(results), out / "curves.png")
        _save(_differences(results), out / "differences.png")
        _save(_examples_by_row(examples), out / "examples.png")
        _save(_examples_by_column(examples), out / "picture.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))


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


# ------------------------------------------------------------------------------------------------------- report

CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f7fa; color: #1f2933;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; } h2 { font-size: 20px; margin: 0 0 10px; }
.lead { color: #52606d; margin: 0 0 26px; max-width: 800px; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 22px 26px; margin: 0 0 20px; }
section.outcome { border-left: 5px solid #009e73; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 6px 8px; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th { font-weight: 600; color: #52606d; } thead th.group { text-align: center; color: #1f2933; }
th:first-child, td:first-child { text-align: left; } td.start, th.start, th.group { border-left: 1px solid #e4e7eb; }
td.name { font-weight: 600; } tr:last-child td { border-bottom: 0; } .best { font-weight: 700; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
img { max-width: 100%; display: block; margin: 4px auto; }
p.note, li, dd { color: #52606d; font-size: 14.5px; } p.note { margin: 10px 0 0; }
ul { margin: 6px 0 0; padding-left: 20px; } pre { background: #f5f7fa; border-radius: 6px; padding: 12px 14px;
overflow-x: auto; font-size: 13.5px; margin: 8px 0; } code { font-size: 14px; }
details summary { cursor: pointer; color: #52606d; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 8px 0; } dt { font-weight: 600;
font-size: 14.5px; } dd { margin: 0; }
"""


def report(out: Path, results: dict[str, Any]) -> str:
    """The report as one HTML page, with the pictures of `out` in it."""
    settings, quantile = results["settings"], f"{100 * results['quantile']:g} %"
    protected = " (never the target's)" if results["protect_target"] else ""
    minutes = sum(results["seconds"].values()) / 60
    facts = results["machine"] | {"working time": f"{minutes:.1f} minutes"}
    first, *found, last = (html.escape(line.strip()) for line in verdict(results))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Does leaving out badly aligned pixels help?</title><style>{CSS}</style></head><body><main>
<h1>Does leaving out badly aligned pixels help?</h1>
<p class="lead">A small model learns to find what a sentence refers to, four times. The runs are equal in data, seed,
order and number of steps; they differ only in which pixels count in the loss.</p>
<section class="outcome"><h2>What came out</h2><p>{first}</p><ul>{"".join(f"<li>{line}</li>" for line in found)}</ul>
<p><b>{last}</b></p></section>
<section><h2>Unseen scenes</h2>{_score_table(results)}
<p class="note">In per cent, on {results["sentences"]} sentences about {results["images"]} scenes that were used neither
for training nor for choosing a checkpoint. <b>mIoU</b>: mean of intersection over union of the sentences; <b>oIoU</b>:
all intersections over all unions; <b>P@0.5</b>: sentences with IoU of at least 0.5. Bold: the highest of a column,
which need not mean anything. Disturbances, of severity {settings["severity"]} out of 5, are in no training image.</p>
</section>
<section><h2>Difference to the loss over all pixels</h2>{_image(out, "differences.png", "differences in mIoU")}
{_difference_table(results)}
<p class="note">In points of mIoU, paired by sentence, with a 95 % bootstrap interval over scenes. The interval
tells how much other unseen scenes would change the result. It does not tell what another seed would:
one seed cannot resolve differences below about 1 to 3 points.</p></section>
<section><h2>What is left out, and where the map points</h2>{_alignment_table(results)}
<p class="note"><b>Kept</b>: pixels that count in the loss after warm-up. <b>loss</b> leaves out what
lies below the {quantile} quantile of each image's similarity map{protected}; <b>random</b> and <b>easiest</b> (lowest
loss) leave out as many. <b>Lowest {quantile}, unprotected</b>: share of the unseen scenes' target pixels that would be
left out without that protection; about {quantile} by chance.
<b>AUC</b>: how well the map separates target from background, 50 % being chance; with a sentence about another scene,
what remains is that objects stand out from the ground. The map is trained under every strategy,
on the same frozen features, so the four hardly differ.</p></section>
<section><h2>Training</h2>{_image(out, "curves.png", "training curves")}
<p class="note">The losses are means over different pixels: compare the mIoU, not them.</p></section>
<section><h2>Examples</h2>{_image(out, "examples.png", "example sentences with maps and predictions")}
<p class="note">Outlined: the target. The map is that of strategy loss, bright where a word fits; hatched: what it
leaves out. The sentences are taken at fixed ranks of IoU, from good to bad, not by hand.</p></section>
<section><h2>How it was made</h2>
<p>Repeat it with</p><pre>{html.escape(results["command"])}</pre>
<dl>{"".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())}
<dt>data</dt><dd>rendered scenes: {settings["train_scenes"]} for training, {settings["val_scenes"]} for choosing the
checkpoint, {settings["test_scenes"]} unseen; seed {settings["seed"]}</dd>
<dt>training</dt><dd>{results["steps"]} steps for each strategy</dd></dl>
<details><summary>All settings of strategy loss</summary><pre>{html.escape(results["config"])}</pre></details>
<p class="note">All numbers: results.json. One record per sentence: evaluations/.</p></section>
</main></body></html>
"""


def _score_table(results: dict[str, Any]) -> str:
    groups = "".join(f'<th class="group" colspan="{len(SHOWN)}">{condition_name(results, c)}</th>' for c in CONDITIONS)
    heads = "".join(_cell(name, i == 0, "th") for _ in CONDITIONS for i, name in enumerate(SHOWN))
    rows = []
    for name, found in results["strategies"].items():
        cells = (
            _cell(_percent(found[c][m]), m == SHOWN[0], best=_is_highest(results, name, c, m))
            for c in CONDITIONS
            for m in SHOWN
        )
        rows.append(f"<tr>{_name(name)}{''.join(cells)}</tr>")
    head = f"<tr><th></th>{groups}</tr><tr><th>strategy</th>{heads}</tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _difference_table(results: dict[str, Any]) -> str:
    heads = "".join(f"<th>{condition_name(results, c)}</th>" for c in CONDITIONS)
    rows = [
        f"<tr>{_name(name)}"
        + "".join(_cell(difference_text(results["strategies"][name]["differences"][c])) for c in CONDITIONS)
        + "</tr>"
        for name in STRATEGIES[1:]
    ]
    return f"<table><thead><tr><th>strategy</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _alignment_table(results: dict[str, Any]) -> str:
    lowest = f"target pixels in the lowest {100 * results['quantile']:g} %, unprotected"
    heads = ("pixels kept", "target pixels left out", lowest, "AUC of the map", "with a wrong sentence")
    rows = []
    for name, found in results["strategies"].items():
        clean = found["clean"]
        shares = (found["kept"], found["target_left_out_of_loss"], clean["target_left_out"], clean["auc"])
        cells = "".join(_cell(_percent(share)) for share in (*shares, clean["auc_wrong_sentence"]))
        rows.append(f"<tr>{_name(name)}{cells}</tr>")
    head = "".join(f'<th style="white-space: normal">{name}</th>' for name in heads)
    return f"<table><thead><tr><th>strategy, %</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _is_highest(results: dict[str, Any], strategy: str, condition: str, metric: str) -> bool:
    """As printed, so that what reads the same is marked the same; not where all are the same."""
    shown = {name: round(1000 * found[condition][metric]) for name, found in results["strategies"].items()}
    return shown[strategy] == max(shown.values()) > min(shown.values())


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _name(strategy: str) -> str:
    return f'<td class="name"><span class="dot" style="background: {COLOURS[strategy]}"></span>{strategy}</td>'


def _cell(text: str, start: bool = False, tag: str = "td", best: bool = False) -> str:
    classes = " ".join(["start"] * start + ["best"] * best)
    return f'<{tag} class="{classes}">{text}</{tag}>' if classes else f"<{tag}>{text}</{tag}>"


def _image(out: Path, name: str, text: str) -> str:
    data = base64.b64encode((out / name).read_bytes()).decode()
    return f'<img alt="{text}" src="data:image/png;base64,{data}">'
