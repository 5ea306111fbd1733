"""report.md of `aml alignment-report`, from its results; nothing is computed here but means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ABOUT = {
    "of this run": "as trained beside this model",
    "trained": "two linear maps learned through the map (the default)",
    "trained, softmax": "the same pair, softmax over the words before their maximum",
    "gaussian": "the paper's two random matrices",
    "gaussian, softmax": "the paper to the letter",
    "shared": "one random matrix for both",
    "linear": "the released code's affine map of the words, as cosine",
    "linear, softmax, all, raw": "the released code to the letter",
    "model": "the model's own space",
    "none": "features as they are",
    "norm of the feature": "no text at all",
    "distance to the mean feature": "no text at all",
}
INTRODUCTION = """\
# Which similarity map points at the target?

{sentences} sentences on {images} images: {data}, split {split}. Model {model}, images of {image_size} pixels, encoders
as they are. The trained pair: {steps} steps on the other split.

**AUC**: the chance that a pixel of the target has a higher similarity than another pixel, 0.5 being chance; +- is the
standard error over images, and a range is over seeds. **Wrong**: the same with a sentence about another image; what
remains is that objects stand out, not that words are understood. **Lost**: the share of the target's pixels below a
quantile of the map, which filtering by it leaves out; a map that knows nothing loses as much of the target as of all
pixels, {left_out}.
"""
LITERAL = """\

## A fixed limit of 0.4: the paper and the released code to the letter

The paper calls a pixel weak where the softmax over the words has no value of 0.4 or more, and drops a random quarter.
Of what, is read in three ways. *By pixel*: a quarter of the weak pixels is drawn and each drops its block of
32 x 32: a block with m weak pixels stays with probability 0.75^m. *By block*: a quarter of the blocks that hold a weak
pixel (`filter_regions`). *Released*: what the released code does, an index mix-up included.

"""
WORDS = """
With entries N(0, 1/2048) every similarity is about 0, so the softmax over L words is 1/L whatever the pixel shows: the
limit asks how long the sentence is.

"""
RELEASED = """
## What the released masking blanks

Share of a 448 x 448 image that is blanked when some of its 196 blocks are below the limit, scattered or as one smooth
region; beside a quarter of them, which was meant.

"""


def markdown(results: dict[str, Any]) -> str:
    lost = [f"lost at {q:g}" for q in results["quantiles"]]
    rows = []
    for name, seeds in results["maps"].items():
        shares = [_range([seed["lost"][i] for seed in seeds]) for i in range(len(lost))]
        auc = _range([seed["auc"] for seed in seeds]) + f" +- {max(seed['error'] for seed in seeds):.3f}"
        rows.append([name, ABOUT[name], auc, _range([seed["wrong"] for seed in seeds]), *shares])
    text = INTRODUCTION.format(**results, left_out=_chance(results))
    text += "\n" + _table(["map", "what", "AUC", "wrong", *lost], rows)
    text += "\n![AUC and share of the target lost](scores.png)\n![maps over images](maps.png)\n" + LITERAL
    heads = ["largest score", "pixels weak", "target weak", "dropped by pixel", "by block", "released"]
    keys = ("largest", "below", "target_below", "by_pixel", "by_block", "released")
    everything: list[list[str]] = []
    for name, found in results["literal"].items():
        everything.append([name, *(_cell(found["all"], key) for key in keys)])
    text += _table(["map", *heads], everything) + WORDS
    name, found = next(iter(results["literal"].items()))
    by_words: list[list[str]] = []
    for count, row in found.items():
        if count != "all":
            by_words.append([count, f"{row['sentences']}", *(_cell(row, key) for key in keys)])
    text += _table([f"words ({name})", "sentences", *heads], by_words) + RELEASED
    blanked = [[f"{row[key]:.1%}" for key in ("low", "scattered", "smooth", "quarter")] for row in results["released"]]
    text += _table(["below the limit", "blanked, scattered", "blanked, smooth", "a quarter"], blanked)
    return f"{text}\nMade by `{results['command']}`.\n"


def _chance(results: dict[str, Any]) -> str:
    """Shares of all pixels below the quantiles: resizing smooths a map, so that they are not the quantiles."""
    seeds = [seed["left_out"] for seed in results["maps"]["gaussian"]]
    shares = [sum(column) / len(seeds) for column in zip(*seeds, strict=True)]
    return ", ".join(f"{share:.2f} at {q:g}" for share, q in zip(shares, results["quantiles"], strict=True))


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.3f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _cell(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "-"
    return f"{row[key]:.3f}" if key == "largest" else f"{row[key]:.0%}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
