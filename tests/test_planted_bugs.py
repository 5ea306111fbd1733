"""The emulation's runs find what they are there for: each bug below, planted in a copy of the kernels, is caught.

A bug is caught by a case of test_emulation_builds.py, in the kind of run named here, and that says what it should. The
same cases in the same runs pass with the kernels as they are.
"""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_emulation_builds import CASES, SCHEDULES

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

import builds  # noqa: E402
from emulated import Emulated, Failed, in_place_of_triton  # noqa: E402

pytestmark = pytest.mark.usefixtures("conditions")

WRONG = "wrong result"
RACE = "ThreadSanitizer: data race"


class Bug(NamedTuple):
    operator: str  #: whose .cu is compiled
    header: str  #: the source that is changed
    right: str
    wrong: str
    run: str  #: the kind of run that has to find it, ...
    case: str  #: ... in this case, ...
    found: str  #: ... saying this


BUGS = {
    "missing barrier before a read": Bug(
        "quantile", "selection.cuh", "warp_sum[warp] = inclusive;\n  __syncthreads();", "warp_sum[warp] = inclusive;",
        "plain", "quantile, one block", WRONG,
    ),
    "missing barrier before memory is used again": Bug(
        "similarity", "comparison.cuh", "__syncthreads();  // all pipelines are done with", "",
        "plain", "similarity of many words", WRONG,
    ),
    "copies that nobody waits for": Bug(
        "similarity", "comparison.cuh", "wait_for_copies<kStages - 2>();", "",
        "plain", "similarity of rows that begin anywhere, bf16", WRONG,
    ),
    "missing barrier of a warp": Bug(
        "similarity", "comparison_by_lanes.cuh", "word_.put(words_);\n    __syncwarp();",
        "word_.put(words_);", "races", "similarity of rows that begin anywhere, fp32", RACE,
    ),
    "missing barrier between histograms": Bug(
        "quantile", "few_values.cuh", "}\n    __syncthreads();\n    const WarpBins all(bins);",
        "}\n    const WarpBins all(bins);", "races", "quantile of few", RACE,
    ),
    "missing barrier before copies are read": Bug(
        "similarity", "similarity_backward.cuh",
        "__syncthreads();  // the tile is done with, and the next features are here", "",
        "races", "similarity of rows that begin anywhere, bf16", RACE,
    ),
    "gradients where features are still read": Bug(
        "similarity", "similarity_gradient_tile.cuh", "__syncthreads();  // the features are done with", "",
        "races", "similarity of rows that begin anywhere, fp32", RACE,
    ),
    "copies into memory that is still read": Bug(
        "similarity", "comparison.cuh", "__syncwarp();  // this step's features are here, and the words and the "
        "features before are done with", "", "plain", "similarity of rows that begin anywhere, bf16", WRONG,
    ),
    "copy beyond the end of a tensor": Bug(
        "similarity", "comparison_features.cuh", "const bool followed = channel + row + 1 < call_.channels",
        "const bool followed = channel + row < call_.channels", "bounds",
        "similarity of rows that begin anywhere, fp32", "AddressSanitizer: heap-buffer-overflow",
    ),
    "histogram without atomics": Bug(
        "quantile", "selection.cuh", "atomicAdd(&bins[distance >> shift], 1u);",
        "++bins[distance >> shift];", "stepped", "quantile, one block", WRONG,
    ),
    "read beyond the input": Bug(
        "quantile", "selection.cuh", "const bool has_next = p + threads < packs;", "const bool has_next = true;",
        "bounds", "quantile, one block", "AddressSanitizer: heap-buffer-overflow",
    ),
    "index beyond shared memory": Bug(
        "quantile", "selection.cuh", "&bins[distance >> shift]", "&bins[(distance >> shift) + kBins / 2]",
        "bounds", "quantile, one block", "out of bounds for type 'unsigned int [2048]'",
    ),
    "vector load of misaligned memory": Bug(
        "quantile", "selection.cuh", "return int64_t(-reinterpret_cast<uintptr_t>(values) % 16 / sizeof(T));",
        "return 0;", "bounds", "quantile, one block", "misaligned address",
    ),
    "missing fence of the blocks that write": Bug(
        "similarity", "similarity_backward.cuh", "__threadfence();\n    const uint32_t blocks", "const uint32_t blocks",
        "races", "similarity along cells", RACE,
    ),
    "missing fence of the block that reads": Bug(
        "similarity", "similarity_backward.cuh", "== blocks - 1;\n    __threadfence();", "== blocks - 1;",
        "races", "similarity along cells", RACE,
    ),
    "missing barrier of the grid": Bug(
        "region_filter", "region_filter.cuh", "find_weak(call, scratch);\n  grid_barrier();",
        "find_weak(call, scratch);", "plain", "region filter", WRONG,
    ),
    "barrier of the grid that some blocks skip": Bug(
        "masked_loss", "loss_strips.cuh", "grid_barrier();\n  if (blockIdx.x >= call.samples) return;",
        "if (blockIdx.x >= call.samples) return;\n  grid_barrier();", "plain", "loss of small logits",
        "a barrier of the grid waits for a block that has finished",
    ),
    "divergent barrier": Bug(
        "quantile", "selection.cuh",
        "if (threadIdx.x == 0) s.wanted = place_of(all, team.count(s, pass, kBins - 1));\n      __syncthreads();",
        "if (threadIdx.x == 0) {\n s.wanted = place_of(all, team.count(s, pass, kBins - 1));\n __syncthreads();\n }",
        "plain", "quantile, one block", "divergent barrier: others wait at selection.cuh",
    ),
    "lanes missing from a mask": Bug(
        "similarity", "comparison.cuh", "__ballot_sync(kAllLanes, call.is_word", "__ballot_sync(0xFFFFu, call.is_word",
        "plain", "similarity along cells", "the mask does not name the calling lane",
    ),
    "shared memory that nobody has set": Bug(
        "quantile", "selection.cuh", "for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s.bins[bin] = 0;", "",
        "plain", "quantile, one block", WRONG,
    ),
    "scratch that nobody has set": Bug(
        "region_filter", "region_filter.cuh", "for (uint32_t i = threadIdx.x; i < call.regions(); i += kFilterThreads) "
        "scratch.flags[int64_t(b) * call.regions() + i] = 0;", "",
        "plain", "region filter", WRONG,
    ),
    "more blocks than run at once": Bug(
        "masked_loss", "loss_division.cuh", "std::min<int64_t>(grouped ? each : resident, call.group_strips)",
        "call.group_strips", "plain", "loss of samples each",
        "are resident together",
    ),
}


def table() -> str:
    """Markdown, for docs/verification.md."""
    rows = [
        f"| {name} | `{bug.header}` | {bug.run} | {bug.found} |"
        for name, bug in BUGS.items()
    ]
    return "\n".join(["| bug | planted in | caught in the run | as |", "|---|---|---|---|", *rows])


def planted(bug: Bug, folder: Path) -> Path:
    """A copy of the sources with the bug."""
    for name in ("common", "cuda"):
        shutil.copytree(builds.ROOT / "csrc" / name, folder / "csrc" / name)
    path = folder / "csrc" / "cuda" / bug.header
    source = path.read_text()
    assert source.count(bug.right) == 1, f"{bug.header}: expected this once, to plant a bug in:\n{bug.right}"
    path.write_text(source.replace(bug.right, bug.wrong))
    return folder


def outcome(emulated: Emulated, case: str) -> str | None:
    """What is wrong in a case, under the schedules of the suite."""
    with in_place_of_triton(emulated) as backend:
        for seed in SCHEDULES[emulated.mode]:
            emulated.seed = seed
            try:
                CASES[case](backend)
            except Failed as failed:
                return str(failed)
            except AssertionError:
                return WRONG
    return None


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Where each bug is planted; they are being compiled."""
    folders = {name: planted(bug, tmp_path_factory.mktemp("sources")) for name, bug in BUGS.items()}
    for name, bug in BUGS.items():
        if not builds.missing(bug.run):
            builds.start(bug.run, folders[name], builds.files_of(bug.operator))
    return folders


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_caught(sources, name):
    bug = BUGS[name]
    if reason := builds.missing(bug.run):
        pytest.skip(reason)
    emulated = Emulated(bug.run, sources[name], builds.files_of(bug.operator))
    found = outcome(emulated, bug.case)
    emulated.close()
    assert found, f"no schedule of the {bug.run} run shows it in the case {bug.case!r}"
    assert bug.found in found, found


@pytest.mark.parametrize("run, operator, case", sorted({(bug.run, bug.operator, bug.case) for bug in BUGS.values()}))
def test_without_it_nothing_is_found(run, operator, case):
    if reason := builds.missing(run):
        pytest.skip(reason)
    emulated = Emulated(run, builds.ROOT, builds.files_of(operator))
    found = outcome(emulated, case)
    emulated.close()
    assert found is None, found


def test_the_table_in_the_documentation_is_this():
    document = (builds.ROOT / "docs" / "verification.md").read_text()
    assert table() in document, "put the output of tests/verification.py into docs/verification.md"
