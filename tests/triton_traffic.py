"""What calls of the Triton operators launch, and which memory their kernels read and write: counted in the interpreter.

`TRITON_INTERPRET=1 python tests/triton_traffic.py` prints the table of docs/verification.md.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases  # noqa: E402
import interpreter  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from aml_kernels import _library  # noqa: E402


@dataclass
class Launch:
    """A launch of a kernel. Bytes at different addresses, and bytes in all: what is read twice comes from a cache."""

    kernel: str
    loads: list[tuple[int, np.ndarray]] = field(default_factory=list)  #: bytes of an element, addresses
    stores: list[tuple[int, np.ndarray]] = field(default_factory=list)

    @property
    def read(self) -> int:
        return distinct(self.loads)

    @property
    def written(self) -> int:
        return distinct(self.stores)

    @property
    def requested(self) -> int:
        return sum(width * len(addresses) for width, addresses in self.loads + self.stores)

    def requested_from(self, tensor: torch.Tensor) -> int:
        """Bytes read from between the first and the last element of a tensor."""
        first = tensor.data_ptr()
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        last = first + extent * tensor.element_size()
        return sum(width * int(((first <= read) & (read < last)).sum()) for width, read in self.loads)


def distinct(accesses: list[tuple[int, np.ndarray]]) -> int:
    """Bytes at different addresses."""
    widths = {width for width, _ in accesses}
    return sum(w * len(np.unique(np.concatenate([x for width, x in accesses if width == w]))) for w in widths)


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """The launches within, those of PyTorch's own kernels too (without their bytes)."""
    launches: list[Launch] = []
    builder, run = interpreter.interpreter.interpreter_builder, InterpretedFunction.run

    def of_kernel(kernel, *arguments, **options):
        launches.append(Launch(kernel.fn.__name__))
        with torch.utils._python_dispatch._disable_current_modes():
            return run(kernel, *arguments, **options)

    def accessed(pointers, mask) -> tuple[int, np.ndarray]:
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data != 0]  # what is true may be an integer
        return pointers.get_element_ty().primitive_bitwidth // 8, addresses.ravel()

    def load(pointers, mask, *rest):
        launches[-1].loads.append(accessed(pointers, mask))
        return type(builder).create_masked_load(builder, pointers, mask, *rest)

    def store(pointers, value, mask, *rest):
        launches[-1].stores.append(accessed(pointers, mask))
        return type(builder).create_masked_store(builder, pointers, value, mask, *rest)

    def atomic(operation, pointers, value, mask, *rest):
        launches[-1].loads.append(accessed(pointers, mask))
        launches[-1].stores.append(accessed(pointers, mask))
        return type(builder).create_atomic_rmw(builder, operation, pointers, value, mask, *rest)

    class Others(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            results = function(*arguments, **(options or {}))
            given, made = ({x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}
                           for values in (arguments, results))
            if not made <= given and "empty" not in function.name():
                launches.append(Launch(str(function)))
            return results

    is_traced, _library.is_traced = _library.is_traced, lambda *_: False  # a mode is no reason to take another path
    InterpretedFunction.run = of_kernel
    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
    try:
        with Others():
            yield launches
    finally:
        InterpretedFunction.run, _library.is_traced = run, is_traced
        del builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw


def workloads() -> list[cases.Workload]:
    """One sample, a quarter of the pixels that are trained with: the bytes of more are in proportion."""
    at = {"dtype": torch.bfloat16, "device": "cpu"}
    return [
        cases.aml_loss(1, 240, 240, 15, 512, **at), cases.aml_loss(1, 240, 60, 30, 256, **at),
        cases.masked_loss(1, 240, 240, 15, **at), cases.masked_loss(1, 240, 60, 60, **at),
        cases.similarity(1, 30, 30, 512, **at), cases.quantile(1, 30, 30, **at), cases.quantile(1, 240, 240, **at),
        cases.filter_regions(1, 240, 15, **at),
    ]


@dataclass
class Row:
    operator: str
    case: str
    passed: str  #: forward or backward
    launches: list[Launch]
    least: int  #: bytes, with each input read and each output written once

    @property
    def moved(self) -> int:
        return sum(launch.read + launch.written for launch in self.launches)

    @property
    def requested(self) -> int:
        return sum(launch.requested for launch in self.launches)


def rows(workload: cases.Workload) -> list[Row]:
    given = list(workload.inputs)
    leaves = [given[i].detach().requires_grad_() for i in workload.differentiable]
    for i, leaf in zip(workload.differentiable, leaves, strict=True):
        given[i] = leaf
    with counted() as forward:
        outputs = workload.fused("triton")(*given)
    found = [Row(workload.op, workload.case, "forward", forward, workload.forward_bytes)]
    if leaves:
        grad = torch.ones_like(outputs[0]) if workload.grad_output is None else workload.grad_output
        with counted() as backward:
            torch.autograd.grad(outputs[0], leaves, grad)
        found.append(Row(workload.op, workload.case, "backward", backward, workload.backward_bytes))
    return found


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| operator | case | pass | launches | least MB | moved MB | moved / least | asked for / moved |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| `{row.operator}` | {row.case} | {row.passed} | {len(row.launches)} | {row.least / 1e6:.2f} | "
            f"{row.moved / 1e6:.2f} | {row.moved / row.least:.2f} | {row.requested / row.moved:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    interpreter.quicken()
    print(table([row for workload in workloads() for row in rows(workload)]))
