"""The emulator of tests/emulation does what CUDA does, and finds what it is there to find."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

import builds  # noqa: E402
from emulated import Emulated, Failed  # noqa: E402

EXAMPLES = (builds.ROOT, (str(builds.HERE / "examples.cu"),))
SCHEDULES = {"plain": 12, "stepped": 12, "bounds": 2, "races": 2}
MISTAKES = (
    "none", "no barrier", "no atomic", "no fence of the writer", "no fence of the reader", "beyond shared memory",
    "beyond global memory", "misaligned",
)
WAITS = {
    "divergent": r"divergent barrier: others wait at examples.cu:\d+: block \d thread \d+ at examples.cu:\d+",
    "deadlock":
        r"deadlock: 128 threads wait for ever; 63 of block 0 at examples.cu:\d+; 1 of block 0 at examples.cu:\d+",
    "finished lane": r"(a lane finished that is named in the mask|the mask names a lane that has finished)",
    "not in mask": r"the mask does not name the calling lane: block \d thread \d+ at examples.cu:\d+",
    "grid barrier": r"a barrier of the grid in a launch that is not cooperative",
    "finished block": r"a barrier of the grid waits for a block that has finished: block \d thread \d+ at",
    "polling": r"endless wait: all that still run only poll",
    "trap": r"trap: block \d thread 3 at examples.cu:\d+",
}


@pytest.fixture(scope="module")
def emulated():
    """The examples in a kind of run, skipped where that cannot be."""
    started = {}

    def get(mode: str) -> Emulated:
        if reason := builds.missing(mode):
            pytest.skip(reason)
        if mode not in started:
            started[mode] = Emulated(mode, *EXAMPLES)
        return started[mode]

    if not builds.missing("plain"):
        for mode in builds.MODES:
            builds.start(mode, *EXAMPLES)
    yield get
    for each in started.values():
        each.close()


@pytest.fixture(params=builds.MODES)
def run(request, emulated) -> Emulated:
    each = emulated(request.param)
    each.seed = 0
    return each


def test_warp_functions(run):
    lane = torch.arange(32)
    half = torch.where(lane < 16, 0, 16)
    expected = [
        torch.full((32,), 5), half + 3, lane ^ 9, torch.where(lane < 2, lane, lane - 2),
        torch.where(lane % 8 < 6, lane + 2, lane), torch.full((32,), sum(1 << i for i in range(0, 32, 3)) - 2**32 * 0),
        lane >= 16, lane < 16, torch.tensor([0x11111111 << i % 4 for i in range(32)]), torch.full((32,), 496),
        torch.where(lane < 16, -7, 9), torch.full((32,), 255), torch.full((32,), 11), torch.zeros(32), torch.ones(32),
    ]
    expected = torch.stack([row.long() for row in expected])
    for _ in range(SCHEDULES[run.mode]):
        assert torch.equal(run.call("warp", torch.zeros(1)).long() % 2**32, expected % 2**32)


def test_half_types_round_as_pytorch(emulated):
    run = emulated("plain")
    bits = torch.arange(2**16, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    numbers = [
        bits.to(torch.int16).view(torch.float16).float(), (bits << 16).view(torch.float32),
        torch.randn(4096, generator=generator), torch.randn(4096, generator=generator) * 2.0**-20,
        torch.tensor([65519.996, 65520.0, 2.0**-25, 2.0**-24 * 1.5, 2.0**-14 * (1 - 2.0**-12), 3.4e38]),
    ]
    middle = torch.arange(1, 2**15 - 1024, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    numbers += [(middle[1:] + middle[:-1]) / 2]  # ties
    for x in numbers:
        half, bfloat, half_again, bfloat_again = run.call("halves", x)
        finite = ~x.isnan()
        for ours, again, dtype in ((half, half_again, torch.float16), (bfloat, bfloat_again, torch.bfloat16)):
            assert torch.equal(ours[finite].view(torch.int16), x[finite].to(dtype).view(torch.int16))
            assert torch.equal(again[finite], x[finite].to(dtype).float()) and again[~finite].isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_products_of_tensor_cores(run, dtype):
    """Where a lane's numbers stand in the matrices is written down here as in the PTX ISA, mma.m16n8k16."""
    lane = torch.arange(32)[:, None]
    group, in_group = lane // 4, lane % 4
    i = torch.arange(8)
    a_row, a_column = group + 8 * ~((i < 2) | ((i >= 4) & (i < 6))), in_group * 2 + (i & 1) + 8 * (i >= 4)
    i = torch.arange(4)
    b_row, b_column = in_group * 2 + (i & 1) + 8 * (i >= 2), group.expand(32, 4)
    c_row, c_column = group + 8 * (i >= 2), in_group * 2 + (i & 1)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator)
    given = a[a_row, a_column].contiguous(), b[b_row, b_column].contiguous(), c[c_row, c_column].contiguous()
    for _ in range(SCHEDULES[run.mode]):
        result = torch.full((16, 8), torch.nan)
        result[c_row, c_column] = run.call("product", *given, dtype == torch.bfloat16)
        exact, size = c.double() + a.double() @ b.double(), c.abs() + a.abs().float() @ b.abs().float()
        assert ((result - exact).abs() <= 2 * 10 * 2.0**-23 * size).all()  # ten numbers are cut off, twice
        assert (result - exact).mul(exact.sign()).mean() < 0  # towards zero


@pytest.mark.parametrize("blocks", (1, 3, 7))
def test_right_kernels_pass(run, blocks):
    numbers = torch.arange(1000, dtype=torch.int32)
    for _ in range(SCHEDULES[run.mode]):
        assert run.call("sum", numbers, blocks, 0) == numbers.sum()
    assert run.last["launches"] == ["sum_up"]


@pytest.mark.parametrize("own", (False, True), ids=("grid's barrier", "own barrier"))
def test_blocks_that_wait_for_each_other(run, own):
    rows = torch.randn(4, 96)
    for _ in range(SCHEDULES[run.mode]):
        assert torch.equal(run.call("rotated", rows, own), rows.roll(-1, 0))


@pytest.mark.parametrize(
    "mode, mistake, message",
    (
        ("plain", "no barrier", "wrong"),
        ("stepped", "no atomic", "wrong"),
        ("bounds", "beyond shared memory", r"examples.cu:.*index \d+ out of bounds for type 'int \[8\]'"),
        ("bounds", "beyond global memory", "AddressSanitizer: heap-buffer-overflow"),
        ("bounds", "misaligned", "misaligned address"),
        ("races", "no barrier", "ThreadSanitizer: data race"),
        ("races", "no atomic", "ThreadSanitizer: data race"),
        ("races", "no fence of the writer", "ThreadSanitizer: data race"),
        ("races", "no fence of the reader", "ThreadSanitizer: data race"),
    ),
)
def test_mistakes_are_found(emulated, mode, mistake, message):
    run, numbers = emulated(mode), torch.arange(1000, dtype=torch.int32)
    run.seed, found = 0, []
    for _ in range(SCHEDULES[mode]):
        try:
            if run.call("sum", numbers, 3, MISTAKES.index(mistake)) != numbers.sum():
                found.append("wrong")
        except Failed as failed:
            found.append(str(failed))
            break
    assert found, "nothing was found"
    assert re.search(message, found[-1], re.DOTALL), found[-1]


COPY_MISTAKES = ("none", "not waited for", "waited for the group before", "no barrier", "read at once", "misaligned")


def reversed_packs(numbers):
    packs = torch.zeros(256, dtype=torch.int32)
    packs[: len(numbers)] = numbers
    return packs.view(64, 4).flip(0).flatten()


@pytest.mark.parametrize("count", (256, 232, 4))
def test_copies_to_shared_memory(run, count):
    numbers = torch.arange(1, count + 1, dtype=torch.int32)
    for _ in range(SCHEDULES[run.mode]):
        assert torch.equal(run.call("reversed", numbers, 0), reversed_packs(numbers))


@pytest.mark.parametrize(
    "mode, mistake, message",
    (
        ("plain", "not waited for", "wrong"), ("plain", "waited for the group before", "wrong"),
        ("plain", "no barrier", "wrong"), ("plain", "read at once", "wrong"),
        ("plain", "misaligned", r"trap: .* at examples.cu:\d+"),
        ("races", "no barrier", "ThreadSanitizer: data race"), ("races", "read at once", "ThreadSanitizer: data race"),
    ),
)
def test_mistakes_with_copies_are_found(emulated, mode, mistake, message):
    run, numbers, found = emulated(mode), torch.arange(256, dtype=torch.int32), []
    for run.seed in range(SCHEDULES[mode]):
        try:
            if not torch.equal(run.call("reversed", numbers, COPY_MISTAKES.index(mistake)), reversed_packs(numbers)):
                found.append("wrong")
        except Failed as failed:
            found.append(str(failed))
            break
    assert found, "nothing was found"
    assert re.search(message, found[-1], re.DOTALL), found[-1]


@pytest.mark.parametrize("wait", WAITS)
def test_endless_waits_are_errors(emulated, wait):
    run, cooperative = emulated("plain"), wait in ("finished block", "polling", "deadlock")
    for run.seed in range(2):
        with pytest.raises(Failed, match=WAITS[wait]):
            run.call("waits", torch.zeros(1), list(WAITS).index(wait), cooperative)
    assert torch.equal(run.call("rotated", torch.eye(4), False), torch.eye(4).roll(-1, 0))  # usable after an error


def test_unwritten_shared_memory_is_nan(run):
    assert run.call("unwritten", torch.zeros(1)).isnan().all()


def test_bytes_are_counted(emulated):
    run = emulated("stepped")
    run.call("sum", torch.arange(1000, dtype=torch.int32), 3, 0)
    (_, *from_), (_, *partial), (_, *ticket), (_, *out) = run.last["counts"]
    assert from_ == [4000, 4000, 4000, 0, 0]
    assert partial == [12, 12, 12, 12, 12]
    assert ticket == [4, 12, 4, 12, 4]
    assert out[0] == 4 and out[4] == 4
