"""What AML costs in training: `python benchmarks/bench_training.py [--device cuda] [--batch N] [--json PATH]`.

Operations, peak memory and time of a training step under each strategy, relative to a step without any similarity map,
for CARIS (Swin-B, BERT-base, random weights) at 448 pixels. A step is forward, backward, clipping and AdamW, on one
batch that lies on the device; no data is loaded. The strategies take their steps in turn, in another order each round,
on the same weights, so that the machine's speed is the same for all of them; the ratio of times is the median over
rounds of the ratio within one. "Alone" is the time of map and loss, forward and backward, on given features and logits,
for strategies that need no other pass: a cost below one percent is lost in the noise of whole steps. Operations are
multiplications and additions of matrix products, convolutions and attention, as PyTorch counts them.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import measure
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aml.alignment import AlignmentLoss
from aml.models import RISModel, build_model
from aml.strategies import BLOCK_STRATEGIES

#: name -> settings of `AlignmentLoss`. The first is what the others are compared with. Nothing else draws a map there,
#: and the filters act from the first step.
STRATEGIES = {
    "none": {"strategy": "none", "projection": "gaussian"},
    "loss": {"strategy": "loss", "projection": "trained"},
    "loss (gaussian)": {"strategy": "loss", "projection": "gaussian"},
    "image": {"strategy": "image", "projection": "trained"},
    "released": {
        "strategy": "released", "projection": "linear", "words": "all", "normalize": False, "softmax": True,
        "threshold": 0.4, "protect_target": False, "dice_weight": 0.0, "class_weight": (0.9, 1.1),
    },
}
REFERENCE = "the paper: +17.2 % time, +4.9 % memory; the released program: about 2.5 times the operations"

Step = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="default: 1 on a CPU, 8 on a GPU")
    parser.add_argument("--precision", choices=("no", "bf16"), help="default: no on a CPU, bf16 on a GPU")
    parser.add_argument("--parts", default="operations,memory,alone,time", help="what to measure; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=120, help="of timed steps; default: %(default)s")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="in this list; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to store the rows, beside those of others")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: needs an NVIDIA GPU that PyTorch sees (torch.cuda.is_available() is False)")
    torch.manual_seed(0)
    model = build_model("caris", pretrained=False).to(options.device)
    model.train()
    case = {
        "model": "CARIS, Swin-B", "device": options.device, "batch": options.batch or (8 if on_gpu else 1),
        "precision": options.precision or ("bf16" if on_gpu else "no"), "threads": torch.get_num_threads(),
    }
    wanted = {name: STRATEGIES[name] for name in STRATEGIES if name == "none" or name in options.strategies.split(",")}
    report = {"provenance": measure.provenance(), "machine": machine(options.device), **case}
    report["rows"] = benchmark(model, case, wanted, options.parts.split(","), options.seconds)
    print(table(report))
    if options.json is not None:
        store(report, options.json)


def benchmark(
    model: RISModel, case: dict, strategies: dict[str, dict], parts: Sequence[str], seconds: float
) -> list[dict]:
    """One row per strategy; the first is what the others are compared with."""
    batch = make_batch(model, case["batch"], case["device"])
    steps = dict(make_steps(model, batch, strategies, case["device"], case["precision"]))
    base = next(iter(steps))
    rows = {name: {"strategy": name} for name in steps}
    if "operations" in parts:
        counted = {name: count_operations(step) for name, step in steps.items()}
        for name, count in counted.items():
            rows[name] |= {"operations": count, "operations_ratio": count / counted[base]}
    if "memory" in parts:
        steps[base]()  # AdamW makes its moments, which belong to what a step finds
        peaks = {name: peak_memory(step, model, case["device"]) for name, step in steps.items()}
        for name, peak in peaks.items():
            rows[name] |= {"peak_bytes": peak, "memory_ratio": peak / peaks[base]}
    if "alone" in parts:
        alone = measure.alternate(losses_alone(model, batch, strategies), timer(case["device"]), seconds=5, least=15)
        for name, seconds_alone in alone.items():
            rows[name] |= dict(zip(("alone_p20_s", "alone_p50_s"), measure.percentiles(seconds_alone), strict=False))
    if "time" in parts:
        times = measure.alternate(steps, timer(case["device"]), seconds=seconds, least=3, warm_up=1)
        for name in steps:
            rows[name] |= timing(times[name], times[base])
    return list(rows.values())


def timing(own: list[float], base: list[float]) -> dict:
    p20, p50, p80 = measure.percentiles(own)
    low, middle, high = measure.percentiles([a / b for a, b in zip(own, base, strict=True)])
    return {
        "rounds": len(own), "p20_s": p20, "p50_s": p50, "p80_s": p80,
        "time_ratio": middle, "time_ratio_p20": low, "time_ratio_p80": high,
    }


def make_batch(model: RISModel, size: int, device: str) -> dict[str, Tensor]:
    """Noise with a disc as its target, and sentences of two to nine words."""
    side = model.image_size
    words = "the small red dog that sits left of".split()
    tokens, text_mask = model.tokenize([" ".join(words[: 2 + i % 8]) for i in range(size)])
    axis = torch.linspace(-1, 1, side)
    target = (axis[:, None] ** 2 + axis**2 < 0.3).to(torch.uint8).expand(size, side, side)
    batch = {"image": torch.randn(size, 3, side, side), "tokens": tokens, "text_mask": text_mask, "target": target}
    return {name: tensor.to(device).contiguous() for name, tensor in batch.items()}


def make_steps(
    model: RISModel, batch: dict[str, Tensor], strategies: dict[str, dict], device: str, precision: str
) -> Iterator[tuple[str, Step]]:
    """Per strategy a call that trains one step. They share the model's weights and moments."""
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-6, 0.01), fused=True)
    for name, settings in strategies.items():
        aligner = make_aligner(model, settings, device)
        own = list(aligner.parameters())
        optimizers = [optimizer, *([torch.optim.AdamW(own, lr=1e-6, fused=True)] if own else [])]
        yield name, make_step(model, aligner, batch, optimizers, device, precision)


def make_step(
    model: RISModel, aligner: AlignmentLoss, batch: dict[str, Tensor], optimizers: list, device: str, precision: str
) -> Step:
    clipped = [part for part in (model, aligner) if any(True for _ in part.parameters())]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss, record = aligner.training_step(model, batch, 0)
        loss.backward()
        for part in clipped:
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return (record["loss"],)

    return step


def losses_alone(model: RISModel, batch: dict[str, Tensor], strategies: dict[str, dict]) -> dict[str, Step]:
    """What a strategy without another pass does with the model's outputs."""
    with torch.no_grad():
        logits, alignment = model(batch["image"], batch["tokens"], batch["text_mask"], return_alignment=True)
    logits.requires_grad_()

    def alone(aligner: AlignmentLoss) -> Step:
        def step() -> tuple[Tensor, ...]:
            loss, _ = aligner(logits, batch["target"], alignment, 0)
            loss.backward()
            return (loss,)

        return step

    return {
        name: alone(make_aligner(model, settings, batch["image"].device))
        for name, settings in strategies.items()
        if settings["strategy"] not in (*BLOCK_STRATEGIES, "released")
    }


def make_aligner(model: RISModel, settings: dict, device: str | torch.device) -> AlignmentLoss:
    sizes = {"visual_dim": model.visual_dim, "text_dim": model.text_dim}
    return AlignmentLoss(**settings, **sizes, warmup_steps=0).to(device)


def timer(device: str) -> Callable[[Step], float]:
    def sample(step: Step) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return sample


def count_operations(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(step: Step, model: nn.Module, device: str) -> int:
    """Bytes at the fullest moment of a step, with weights and moments. On a CPU those of PyTorch's allocator."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    weights = sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())  # two moments each
    return weights + measure.allocator_peak(step, device)


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else measure.CpuMeter().describe()["name"]
    return {"name": name, "load_before": round(measure.os.getloadavg()[0], 2)}


def table(report: dict) -> str:
    """Markdown."""
    made = report["provenance"]
    lines = [
        f"{report['model']}, batch {report['batch']}, precision {report['precision']}, on {report['machine']['name']} "
        f"({report['threads']} threads, load before the run {report['machine']['load_before']}), aml_kernels "
        f"{made['aml_kernels']} at {made['commit']}, PyTorch {made['torch']}, {made['date']}. Ratios: median over "
        f"rounds [p20, p80]. To compare with: {REFERENCE}.",
        "",
        "| strategy | 10^12 operations | / none | peak memory | / none | map and loss alone, p50 [p20] | "
        "step, p50 [p20, p80] | / none | rounds |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in report["rows"]:
        cells = [row["strategy"], *["-"] * 8]
        if "operations" in row:
            cells[1:3] = f"{row['operations'] / 1e12:.3f}", f"{row['operations_ratio']:.3f}"
        if "peak_bytes" in row:
            cells[3:5] = f"{row['peak_bytes'] / 2**30:.3f} GiB", f"{row['memory_ratio']:.4f}"
        if "alone_p50_s" in row:
            cells[5] = f"{row['alone_p50_s'] * 1e3:.2f} [{row['alone_p20_s'] * 1e3:.2f}] ms"
        if "rounds" in row:
            cells[6:] = (
                f"{row['p50_s']:.3f} [{row['p20_s']:.3f}, {row['p80_s']:.3f}] s",
                f"{row['time_ratio']:.3f} [{row['time_ratio_p20']:.3f}, {row['time_ratio_p80']:.3f}]",
                str(row["rounds"]),
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def store(report: dict, path: Path) -> None:
    """In place of an earlier report of the same case, strategies and parts; others stay."""
    stored = json.loads(path.read_text()) if path.exists() else []
    others = [other for other in stored if _key(other) != _key(report)]
    measure.store([*others, report], path)


def _key(report: dict) -> list:
    case = ("model", "device", "batch", "precision")
    return [*(report[name] for name in case), [(row["strategy"], sorted(row)) for row in report["rows"]]]


if __name__ == "__main__":
    main()
