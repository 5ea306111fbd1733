"""The report as Markdown."""

import math
import operator
from collections.abc import Callable

PEERS = ("eager", "torch", "compile")


def heading(report: dict) -> str:
    made, machine = report["provenance"], report["machine"]
    on = on_gpu(machine) if machine["device"] == "cuda" else on_cpu(machine)
    text = (
        f"{on}\naml_kernels {made['aml_kernels']} at {made['commit']}, PyTorch {made['torch']}, Python "
        f"{made['python']}, {made['compiler']}, {made['date']}\n\n"
        "Times: p50 [p20, p80] in ms. Batch 8 unless the case says otherwise. MB: each input once, each output once, "
        "per pass; GB/s: that over the median. Extra memory: peak beyond inputs, outputs and gradients. Difference: "
        "relative L2 from the definition."
    )
    if machine["device"] == "cuda":
        text += (
            " Times are the GPU's, of calls in a CUDA graph (* where the call makes the host wait: of eager calls), on "
            "inputs that are not in the L2 cache. Share: of the bandwidth of a large copy, and of a copy of as many "
            "bytes; more than the memory's with a backward that finds in the L2 cache what the forward has read. "
            "Launches: kernels, copies and fills per call. Host: microseconds until the call returns."
        )
    return text


def on_cpu(machine: dict) -> str:
    return (
        f"{machine['name']}, threads: {machine['threads']} of {machine['cores']} cores, copy bandwidth "
        f"{machine['copy_gb_per_s']:.1f} GB/s (read + written), load before the run {machine['load_before']:.1f}"
    )


def on_gpu(machine: dict) -> str:
    return (
        f"{machine['name']}, {machine['processors']} multiprocessors of capability {machine['capability']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, L2 cache {machine['l2_bytes'] / 2**20:.0f} MiB, copy bandwidth "
        f"{machine['copy_gb_per_s']:.0f} GB/s (read + written), driver {machine['driver']}, CUDA {machine['cuda']}, "
        f"Triton {machine['triton']}"
    )


def head(fused: list[str], device: str) -> str:
    best, who = fused[-1:], " / ".join([*PEERS, *fused])
    columns = [
        "op", "case", "dtype", "pass", *PEERS, *fused, *(f"{b} faster than {' / '.join(PEERS)}" for b in best), "MB",
        *(f"{b} GB/s" for b in best), f"extra MB: {who}", f"difference: {who}",
    ]
    if device == "cuda":
        columns += [*(f"{b} share" for b in best), f"launches: {who}", f"host us: {who}"]
    return _line(columns) + "\n" + _line(["---"] * 4 + ["--:"] * (len(columns) - 4))


def line(rows: list[dict], fused: list[str]) -> str:
    """One workload and pass."""
    row = {r["provider"]: r for r in rows}
    who = [*PEERS, *fused]
    best = [row[b] for b in fused[-1:]]
    cells = [
        *(rows[0][key] for key in ("op", "case", "dtype", "pass")),
        *(_time(row.get(w)) for w in who),
        *(" / ".join(_ratio(b["times_faster_than"].get(p)) for p in PEERS) for b in best),
        f"{rows[0]['bytes'] / 1e6:.2f}", *(f"{b['gb_per_s']:.1f}" for b in best),
        " / ".join(f"{row[w]['extra_memory_bytes'] / 1e6:.2f}" if w in row else "-" for w in who),
        " / ".join(f"{row[w]['difference']:.0e}" if w in row else "-" for w in who),
    ]
    if "launches" in rows[0]:
        cells += [
            *(f"{b['share_of_copy']:.0%}, {b['share_of_copy_as_large']:.0%}" for b in best),
            " / ".join(str(row[w]["launches"] or "n/a") if w in row else "-" for w in who),
            " / ".join(f"{row[w]['host_us']:.0f}" if w in row else "-" for w in who),
        ]
    return _line(cells)


GOAL = (  # of the workloads of cases.goal: what, how to read it from a row, the bound, how it is written
    ("share of a copy's bandwidth", lambda row: row["share_of_copy"], "at least", 0.85, "{:.1%}"),
    ("times as fast as eager", lambda row: row["times_faster_than"].get("eager"), "at least", 10, "{:.1f}"),
    ("times as fast as torch.compile", lambda row: row["times_faster_than"].get("compile"), "at least", 3, "{:.1f}"),
    ("launches of a forward", lambda row: row["launches"] if row["pass"] == "forward" else 1, "at most", 1, "{}"),
    ("extra memory in MB", lambda row: row["extra_memory_bytes"] / 1e6, "less than", 1, "{:.2f}"),
)
REACHES = {"at least": operator.ge, "at most": operator.le, "less than": operator.lt}


def goal(rows: list[dict], fused: list[str]) -> str:
    """A line for each part of the goal: the pass of a workload that is furthest from it, and whether it reaches it."""
    rows = [row for row in rows if row["goal"] and row["provider"] in fused[-1:]]
    if not rows:
        return ""
    lines = [""]
    for what, read, relation, bound, form in GOAL:
        values = [read(row) for row in rows]
        if None in values:
            outcome = "not measured"
        else:
            worst = (min if relation == "at least" else max)(values)
            row, reached = rows[values.index(worst)], REACHES[relation](worst, bound)
            where = ", ".join(row[key] for key in ("op", "case", "dtype", "pass"))
            outcome = f"{'reached' if reached else 'not reached'}, {form.format(worst)} ({where})"
        lines.append(f"Goal of {fused[-1]}, {what} {relation} {form.format(bound)}: {outcome}")
    return "\n".join(lines)


README = {  # the rows of its table: (op, case, pass)
    "`masked_loss`, logits 448 x 448, map 14 x 14":
        ("masked_loss", "448x448, logits 448x448, map 14x14", "forward+backward"),
    "`masked_loss`, logits 112 x 112, map 112 x 112":
        ("masked_loss", "448x448, logits 112x112, map 112x112", "forward+backward"),
    "`aml_loss`, logits 112 x 112, features 14 x 14 x 1024":
        ("aml_loss", "448x448, logits 112x112, features 14x14x1024", "forward+backward"),
    "`pixel_text_similarity`, 112 x 112 x 256, 20 words":
        ("pixel_text_similarity", "112x112x256, 20 words", "forward+backward"),
    "`pixel_text_similarity`, 14 x 14 x 1024, 20 words":
        ("pixel_text_similarity", "14x14x1024, 20 words", "forward+backward"),
    "`sample_quantile`, 448 x 448 (forward)": ("sample_quantile", "448x448", "forward"),
}


def readme(report: dict) -> str:
    """The table in README.md."""
    lines = [
        _line(["", "eager", "PyTorch", "`torch.compile`", "fused", "times faster"]), _line(["---"] + ["--:"] * 5),
    ]
    for label, key in README.items():
        row = {
            r["provider"]: r for r in report["rows"]
            if (r["op"], r["case"], r["pass"]) == key and r["dtype"] == "float32" and not r["sweep"]
        }
        times = (f"{_short(row[who]['p50_ms'])} ms" for who in (*PEERS, "cpu"))
        lines.append(_line([label, *times, " / ".join(f"{row['cpu']['times_faster_than'][p]:.1f}" for p in PEERS)]))
    return "\n".join(lines)


def linearity(rows: list[dict]) -> str:
    """Nanoseconds per pixel over the sweep, and by how much a size costs more per pixel than any smaller one.

    Only sizes of one kind are compared, more images of one size or larger ones in a batch of one size: as many pixels
    in more images are also more words, thresholds and samples to divide among threads.
    """
    lines = ["", "Nanoseconds per pixel over the sweep (smallest, median, largest), largest over smallest, and by how"]
    lines += ["much more images, and larger ones, are beyond their share of the time of fewer or smaller ones (0: time"]
    lines += ["grows no faster than pixels):", ""]
    lines += [_line(["op", "pass", "provider", "ns per pixel", "spread", "more", "larger"])]
    lines += [_line(["---"] * 3 + ["--:"] * 4)]
    sizes: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["sweep"]:
            sizes.setdefault((row["op"], row["pass"], row["provider"]), []).append(row)
    for key, group in sizes.items():
        values = sorted(_cost(row) for row in group)
        more = _beyond(group, lambda row: row["pixels"] // row["batch"])
        larger = _beyond(group, lambda row: row["batch"])
        cells = [f"{values[0]:.2f}, {values[len(values) // 2]:.2f}, {values[-1]:.2f}", f"{values[-1] / values[0]:.2f}"]
        lines.append(_line([*key, *cells, f"{more:.0%}", f"{larger:.0%}"]))
    return "\n".join(lines)


def overhead(rows: list[dict]) -> str:
    if not rows:
        return ""
    ways = list(dict.fromkeys(row["call"] for row in rows))
    lines = ["", "Host overhead: one call on one 8x8 image, p50 [p20, p80] in us.", ""]
    lines += [_line(["op", "pass", *ways]), _line(["---"] * 2 + ["--:"] * len(ways))]
    groups: dict[tuple, dict] = {}
    for row in rows:
        groups.setdefault((row["op"], row["pass"]), {})[row["call"]] = row
    for key, row in groups.items():
        times = (f"{row[w]['p50_us']:.1f} [{row[w]['p20_us']:.1f}, {row[w]['p80_us']:.1f}]" for w in ways)
        lines.append(_line([*key, *times]))
    return "\n".join(lines)


def memory(rows: list[dict]) -> str:
    """Does the process grow by more than PyTorch's allocator knows of?"""
    lines = ["", "Extra memory by two meters, MB: PyTorch's allocator, and growth of a whole process (+-0.3 MB).", ""]
    lines += [_line(["op", "case", "dtype", "pass", "provider", "allocator", "process"])]
    lines += [_line(["---"] * 5 + ["--:"] * 2)]
    for row in rows:
        if "resident_memory_bytes" in row:
            sizes = (f"{row[key] / 1e6:.2f}" for key in ("extra_memory_bytes", "resident_memory_bytes"))
            lines.append(_line([*(row[key] for key in ("op", "case", "dtype", "pass", "provider")), *sizes]))
    return "\n".join(lines)


def _beyond(rows: list[dict], kind: Callable[[dict], int]) -> float:
    """Of rows of one kind, the largest share by which one costs more per pixel than one with fewer pixels."""
    most, least = 0.0, {}
    for row in sorted(rows, key=lambda row: row["pixels"]):
        least[kind(row)] = min(least.get(kind(row), math.inf), _cost(row))
        most = max(most, _cost(row) / least[kind(row)] - 1)
    return most


def _cost(row: dict) -> float:
    return 1e6 * row["p50_ms"] / row["pixels"]


def _time(row: dict | None) -> str:
    if row is None:
        return "-"
    mark = "" if row.get("cuda_graph", True) else "*"
    return " ".join([_short(row["p50_ms"]) + mark, f"[{_short(row['p20_ms'])}, {_short(row['p80_ms'])}]"])


def _short(value: float) -> str:
    places = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{places}f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
