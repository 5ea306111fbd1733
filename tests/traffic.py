"""How many bytes the CUDA operators read and write, and in how many launches, counted while their source runs emulated.

The table is that of docs/verification.md; tests/verification.py prints it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from helpers import coin, normal

import aml_kernels

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

import builds  # noqa: E402
from emulated import Emulated, in_place_of_triton  # noqa: E402

BF16 = torch.bfloat16
SAMPLES = 2


class Row(NamedTuple):
    case: str
    operator: str
    launches: list[str]  #: kernels, in order
    read: dict[str, float]  #: how many times each input is read, by name; those of at least a hundredth of all bytes
    written: float  #: how many times the results are written
    complete: bool  #: every byte of the results is written
    own: float  #: what the kernels write and read again themselves, as a share of `least`
    least: int  #: bytes of the inputs and the results: each once
    moved: float  #: different bytes read and different bytes written, as a multiple of `least`: where caches hold all
    total: float  #: all bytes read and written, as a multiple of `least`


def row_of(case: str, last: dict) -> Row:
    schema = getattr(torch.ops.aml_kernels, last["operator"]).default._schema
    read, sizes, moved, total, results, written, own, complete = {}, {}, 0, 0, 0, 0, 0, True
    for what, size, bytes_read, distinct_read, bytes_written, distinct_written in last["counts"]:
        moved, total = moved + distinct_read + distinct_written, total + bytes_read + bytes_written
        if isinstance(what, int):
            name = schema.arguments[last["owners"][what]].name
            read[name], sizes[name] = bytes_read / size, size
        elif what == "scratch":
            own += bytes_read + bytes_written
        else:
            results, written, own = results + size, written + bytes_written, own + bytes_read
            complete &= distinct_written == size
    least = sum(sizes.values()) + results
    read = {name: number for name, number in read.items() if sizes[name] >= least / 100}
    return Row(
        case, last["operator"], last["launches"], read, written / results, complete, own / least, least, moved / least,
        total / least,
    )


def losses(backend: str, logits: tuple[int, int], grid: tuple[int, int] = (16, 16)):
    """aml_loss with a target of 128 x 128 and features of 64 channels, then its backward."""
    mask = torch.ones(SAMPLES, 20, dtype=torch.bool)
    mask[:, 14:] = False
    leaf = normal(0, SAMPLES, *logits, dtype=BF16).requires_grad_()
    loss = aml_kernels.aml_loss(
        leaf, coin(1, SAMPLES, 128, 128).to(torch.uint8), normal(2, SAMPLES, 64, *grid, dtype=BF16),
        normal(3, SAMPLES, 20, 64, dtype=BF16), mask, quantile=0.25, protect_target=True, backend=backend,
    )
    yield "forward"
    loss.backward()
    yield "backward"


def masked_loss(backend: str):
    leaf = normal(0, SAMPLES, 128, 128).requires_grad_()
    target, map_ = coin(1, SAMPLES, 128, 128).to(torch.uint8), normal(2, SAMPLES, 16, 16)
    loss = aml_kernels.masked_loss(leaf, target, map_, quantile=0.25, backend=backend)
    yield "forward"
    loss.backward()
    yield "backward"


def similarity(backend: str):
    leaves = [normal(0, SAMPLES, 64, 16, 16).requires_grad_(), normal(1, SAMPLES, 20, 64).requires_grad_()]
    result = aml_kernels.pixel_text_similarity(*leaves, backend=backend)
    yield "forward"
    result.backward(normal(2, SAMPLES, 16, 16))
    yield "backward"


def quantile(backend: str, samples: int, length: int):
    aml_kernels.sample_quantile(normal(0, samples, length), 0.25, backend=backend)
    yield "forward"


def region_filter(backend: str):
    image, map_ = normal(0, SAMPLES, 3, 128, 128), normal(1, SAMPLES, 16, 16)
    aml_kernels.filter_regions(image, map_, quantile=0.25, block_size=32, seed=1, backend=backend)
    yield "forward"


CASES = {
    "`aml_loss`, logits of the target's size": lambda b: losses(b, (128, 128)),
    "`aml_loss`, logits at a quarter": lambda b: losses(b, (32, 32)),
    "`aml_loss`, features of 15 x 15": lambda b: losses(b, (128, 128), (15, 15)),
    "`masked_loss`": masked_loss,
    "`pixel_text_similarity`": similarity,
    "`sample_quantile`, short": lambda b: quantile(b, SAMPLES, 4096),
    "`sample_quantile`, long": lambda b: quantile(b, 1, 65536),
    "`filter_regions`": region_filter,
}


def missing() -> str | None:
    """Why nothing can be counted here."""
    return builds.missing("stepped")


def rows() -> list[Row]:
    emulated, found = Emulated("stepped"), []
    with in_place_of_triton(emulated) as backend:
        for name, case in CASES.items():
            for direction in case(backend):
                found.append(row_of(f"{name}, {direction}", emulated.last))
    emulated.close()
    return found


def times(number: float) -> str:
    return f"{number:.0f}" if number == round(number) else f"{number:.2f}" if number < 10 else f"{number:.1f}"


def table(measured: list[Row]) -> str:
    """Markdown: a row per operator and direction."""
    lines = ["| operator | launches | inputs read, times | results written, times | own memory | moved | in all |",
             "|---|--:|---|--:|--:|--:|--:|"]
    for row in measured:
        read = ", ".join(f"{name} {times(number)}" for name, number in row.read.items())
        shares = f"{row.own:.1%} | {row.moved:.2f} | {row.total:.2f}"
        lines.append(f"| {row.case} | {len(row.launches)} | {read} | {times(row.written)} | {shares} |")
    return "\n".join(lines)
