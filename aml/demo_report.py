"""report.html of `aml demo`, from its results and pictures; nothing is computed here."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from aml.demo_results import CONDITIONS, SHOWN, STRATEGIES, condition_name, difference_text, verdict
from aml.figures import COLOURS

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
