"""Draw the stored rows of the benchmark: `python benchmarks/plot.py [RESULTS.json] [--output docs/benchmark.png]`.

Without arguments the table in README.md is written anew too. Time and peak extra memory of each workload and
provider, on logarithmic axes; below, where the run had `--sweep`, time against the number of pixels. One opaque light
card, readable on light and dark pages.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS, CHART = ROOT / "benchmarks/results/cpu.json", ROOT / "docs/benchmark.png"
INK, FAINT, CARD = "#24292f", "#d0d7de", "#ffffff"
STYLE = {  # provider: (label, colour, marker); the operators of this package last, so that they are on top
    "eager": ("definition, eager", "#8c959f", "o"),
    "torch": ("PyTorch's own functions", "#bf8700", "D"),
    "compile": ("torch.compile of the definition", "#0969da", "s"),
    "cpu": ("aml_kernels", "#cf222e", "o"),
}
DTYPE = "float32"
#: Of the table's rows; a file without any of them is drawn whole.
SHOWN = {
    ("masked_loss", "448x448, logits 448x448, map 14x14"): "masked_loss, logits 448x448",
    ("masked_loss", "448x448, logits 112x112, map 14x14"): "masked_loss, logits 112x112",
    ("aml_loss", "448x448, logits 448x448, features 14x14x1024"): "aml_loss, logits 448x448",
    ("aml_loss", "448x448, logits 112x112, features 14x14x1024"): "aml_loss, logits 112x112",
    ("aml_loss", "448x448, logits 112x112, features 112x112x256"): "aml_loss, features 112x112x256",
    ("pixel_text_similarity", "14x14x1024, 20 words"): "pixel_text_similarity, 14x14x1024",
    ("pixel_text_similarity", "112x112x256, 20 words"): "pixel_text_similarity, 112x112x256",
    ("sample_quantile", "448x448"): "sample_quantile, 448x448",
    ("sample_quantile", "448x448, valid"): "sample_quantile, 448x448, masked",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--output", type=Path, default=CHART)
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    draw(report, options.output)
    print(options.output)
    if (options.results, options.output) == (RESULTS, CHART):
        page = ROOT / "README.md"
        page.write_text(with_table(page.read_text(), tables.readme(report)))
        print(page)


def with_table(page: str, table: str) -> str:
    """The Markdown `page` with `table` in place of its table with the same heading."""
    heading = re.escape(table.partition("\n")[0])
    changed, found = re.subn(rf"^{heading}\n(\|.*\n)*", lambda _: table + "\n", page, flags=re.MULTILINE)
    if found != 1:
        raise SystemExit(f"README.md: expected one table headed {table.partition(chr(10))[0]}, found {found}")
    return changed


def draw(report: dict, output: Path) -> None:
    """Write the chart of `report`, a file that bench_fused.py stored, as PNG."""
    rows = [row for row in report["rows"] if row["dtype"] == DTYPE and row["provider"] in STYLE]
    workloads = group([row for row in rows if not row["sweep"]])
    workloads = {key: found for key, found in workloads.items() if key in SHOWN} or workloads
    sweep = group([row for row in rows if row["sweep"]])
    plt.rcParams.update({
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK,
        "ytick.color": INK, "figure.facecolor": CARD, "axes.facecolor": CARD, "font.family": "DejaVu Sans",
    })
    height = 1.7 + 0.44 * len(workloads)
    figure = plt.figure(figsize=(10, height + (3.6 if sweep else 0)), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[height, 3.6]) if sweep else [figure]
    time, memory = parts[0].subplots(1, 2, sharey=True)
    dots(time, workloads, lambda row: row["p50_ms"], "milliseconds, median; red: times faster than eager / compile")
    dots(memory, workloads, extra_megabytes, "peak extra memory, MB")
    for y, found in enumerate(workloads.values()):
        label_ratio(time, y, found)
    handles, labels = time.get_legend_handles_labels()
    parts[0].legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, handletextpad=0.2)
    if sweep:
        lines(parts[1], sweep)
    machine, made = report["machine"], report["provenance"]
    figure.supxlabel(
        f"{machine['name']}, threads: {machine['threads']}, PyTorch {made['torch']}, {DTYPE}, commit {made['commit']}",
        fontsize=8, color="#57606a",
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=200)
    plt.close(figure)


def extra_megabytes(row: dict) -> float:
    """By the meter that saw more; the axis is logarithmic, and neither is worth more than 10 kB."""
    return max(row["extra_memory_bytes"], row.get("resident_memory_bytes", 0), 1e4) / 1e6


def group(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """(operator, case) to the rows of its providers, of the longest pass that was measured."""
    longest = {(row["op"], row["case"]): row["pass"] for row in rows}  # forward+backward comes after forward
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        key = (row["op"], row["case"])
        if row["pass"] == longest[key]:
            found.setdefault(key, {})[row["provider"]] = row
    return found


def dots(axes, workloads: dict, value, label: str) -> None:
    names = list(workloads)
    for y, found in enumerate(workloads.values()):
        values = [value(row) for row in found.values()]
        axes.plot([min(values), max(values)], [y, y], color=FAINT, linewidth=3, zorder=1, solid_capstyle="round")
    for provider, (text, colour, marker) in STYLE.items():
        at = [(value(found[provider]), y) for y, found in enumerate(workloads.values()) if provider in found]
        if at:
            axes.scatter(*zip(*at, strict=True), color=colour, marker=marker, s=38, label=text, zorder=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), [describe(key, workloads[key]) for key in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    clean(axes, "x")


def describe(key: tuple[str, str], found: dict[str, dict]) -> str:
    name = SHOWN.get(key, ", ".join(key))
    return name + "\n" + next(iter(found.values()))["pass"].replace("+", " + ")


def label_ratio(axes, y: int, found: dict[str, dict]) -> None:
    """How much faster the fused operator is than the definition and than torch.compile of it."""
    for row in found.values():
        ratios = row["times_faster_than"]
        if row["provider"] == "cpu":
            text = f"{ratios['eager']:.0f}x" + (f" / {ratios['compile']:.0f}x" if "compile" in ratios else "")
            axes.annotate(
                text, (row["p50_ms"], y), xytext=(0, 5), textcoords="offset points", ha="center", va="bottom",
                fontsize=8, fontweight="bold", color=STYLE["cpu"][1],
            )


def lines(figure, sweep: dict) -> None:
    ops = list(dict.fromkeys(op for op, _ in sweep))
    for axes, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops, strict=True):
        for provider, (_, colour, marker) in STYLE.items():
            at = sorted(
                (row[provider]["pixels"] / 1e6, row[provider]["p50_ms"])
                for (name, _), row in sweep.items() if name == op and provider in row
            )
            if at:
                axes.plot(*zip(*at, strict=True), color=colour, marker=marker, markersize=4)
        axes.set(xscale="log", yscale="log", title=op, xlabel="megapixels in the batch")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        clean(axes, "both")
    figure.axes[0].set_ylabel("milliseconds (median)")


def clean(axes, grid: str) -> None:
    axes.grid(axis=grid, color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    main()
