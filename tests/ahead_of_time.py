"""Compiles, on a machine without a GPU, the kernels that calls of the Triton launchers would run on one.

`python tests/ahead_of_time.py` compiles every call of triton_calls.py for every architecture (3 minutes), prints the
table of docs/verification.md and fails if a kernel is not as it should be; test_triton_compile.py does the same for
the calls that REPRESENTATIVE names. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import machine_code
import planted_kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton_calls import ALIKE, CALLS, EXPECTED, REPRESENTATIVE

from aml_kernels import _backend

sys.path.insert(0, str(Path(__file__).with_name("gpu")))

import every_kernel  # noqa: E402

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    (AMD := "gfx942"): GPUTarget("hip", "gfx942", 64),
}


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, dict, dict]]:
    """The kernels that `call` would launch on a GPU, each with its arguments and options."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        found.append((kernel, kernel.signature.bind(*args, **named).arguments, options))

    original, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = original
    return found


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """What Triton compiles for these arguments: types, numbers that are 1, and what is divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, value, specialized = parameter.name, arguments[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name], aligned = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and specialized
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[kernel.arg_names.index(name),] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def programs(call: Callable[[], object]) -> dict[tuple, tuple[JITFunction, ASTSource, dict]]:
    """What Triton would compile for a call: kernels, sources and options, by what makes them differ."""
    found = {}
    for kernel, arguments, options in launches(call):
        what = source(kernel, arguments)
        found[what.hash(), json.dumps(options, sort_keys=True)] = (kernel, what, options)
    return found


def compiled(calls: dict[str, Callable[[], object]], targets: Iterable[str]) -> Iterator[dict]:
    """A row of figures and faults for each program of these calls and each target (for AMD: that it compiles)."""
    seen = set()
    for name, call in calls.items():
        for key, (kernel, what, options) in programs(call).items():
            if key in seen:
                continue
            seen.add(key)
            for target in targets:
                known = triton.compiler.make_backend(TARGETS[target]).parse_options(dict(options)).__dict__
                program = triton.compile(what, target=TARGETS[target], options=options)
                row = {
                    "call": name, "module": kernel.__module__.rpartition(".")[2], "kernel": kernel.__name__,
                    "target": target, "warps": options["num_warps"],
                    "faults": [f"{option}: an option that a launch there refuses" for option in options.keys() - known],
                }
                if "cubin" in program.asm:
                    row |= figures(program, target)
                    row["faults"] += faults(row)
                yield row


def figures(program, target: str) -> dict[str, int]:
    cuobjdump = str(machine_code.tool("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing))
    code = machine_code.Kernel(
        program.metadata.name, target, numbers["REG"], program.metadata.shared, numbers["STACK"] + numbers["LOCAL"],
        opcodes, 32 * program.metadata.num_warps, 1,
    )
    wide_copies = code.count(r"LDGSTS\..*\.128(\..*)?")  # to shared memory
    return {
        "registers": code.registers, "shared": code.shared,
        "spilled": code.stack if code.local_accesses else 0,  # ptxas may reserve bytes that it then has no use for
        "local": code.local_accesses, "fp64": code.double_instructions, "wide": code.wide_loads + wide_copies,
        "half": code.count(r"LDG\.E(\.\w+)*\.64(\.\w+)*"),
        "tensor cores": code.count(r"[HQ]G?MMA\..*|UTC\w*MMA.*"), "tf32": code.count(r".*MMA.*TF32.*"),
    }


def faults(row: dict) -> list[str]:
    """What is wrong with a program."""
    wide, products, *half = EXPECTED.get((row["call"], f"{row['module']}.{row['kernel']}"), (0, 0))
    found = {
        "spilled bytes": row["spilled"], "accesses to local memory": row["local"],
        "fp64 instructions": row["fp64"], "products rounded to TF32": row["tf32"],
        "128-bit loads missing": max(0, wide - row["wide"]),
        "64-bit loads missing": max(0, sum(half) - row["half"]),
        "tensor core instructions missing": max(0, products - row["tensor cores"]),
    }
    return [f"{number} {what}" for what, number in found.items() if number]


def alike() -> dict[str, list[str]]:
    """For each group of calls that should run the same programs the kernels of which that is not so."""
    result = {}
    for name, calls in ALIKE.items():
        first, *rest = (programs(call) for call in calls)
        result[name] = sorted({entry[0].__name__ for other in rest for key, entry in other.items() if key not in first})
    return result


def sanitized() -> Counter:
    """How many programs of each kernel tests/gpu/every_kernel.py makes Triton compile."""
    before, _backend.INTERPRETED = _backend.INTERPRETED, True  # for tensors on the CPU; nothing is run
    try:
        found = programs(lambda: every_kernel.run("triton", "cpu"))
    finally:
        _backend.INTERPRETED = before
    return Counter(kernel.__name__ for kernel, _, _ in found.values())


def table(rows: list[dict]) -> str:
    """Markdown: a row per kernel, over all its programs; the architectures beside each other."""
    lines = [
        "| kernel | programs | registers | spilled bytes | fp64 instructions | 128-bit loads |",
        "|---|--:|--:|--:|--:|--:|",
    ]

    def span(numbers: list[int]) -> str:
        return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"

    rows = [row for row in rows if "registers" in row]
    for module in sorted({row["module"] for row in rows}):
        for kernel in dict.fromkeys(row["kernel"] for row in rows if row["module"] == module):
            own = [[row for row in rows if (row["module"], row["kernel"], row["target"]) == (module, kernel, target)]
                   for target in machine_code.ARCHITECTURES]
            cells = [" / ".join(span([row[name] for row in each]) for each in own if each)
                     for name in ("registers", "spilled", "fp64", "wide")]
            lines.append(f"| `{module}.{kernel}` | {len(own[0])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--representative", action="store_true", help="only what test_triton_compile.py looks at")
    parser.add_argument("--json", action="store_true", help="print rows instead of the table")
    options = parser.parse_args()
    names = REPRESENTATIVE if options.representative else tuple(CALLS)
    rows = list(compiled({name: CALLS[name] for name in names}, machine_code.ARCHITECTURES))
    with unittest.mock.patch("torch.version.hip", "7.0"):  # as the launchers see a PyTorch for AMD
        rows += compiled({name: CALLS[name] for name in (names[:1] if options.representative else names)}, [AMD])
    if options.json:
        planted = list(compiled({"planted": planted_kernels.call}, ["sm_90"]))
        print(json.dumps({"rows": rows, "planted": planted, "alike": alike(), "sanitized": sanitized()}))
        return 0
    print(table(rows))
    wrong = [row for row in rows if row["faults"]]
    for row in wrong:
        print(f"{row['call']}, {row['kernel']}, {row['target']}: {', '.join(row['faults'])}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
